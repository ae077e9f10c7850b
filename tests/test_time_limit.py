"""MAX_HOURS: each long script stops between two parts of its work, and goes on to the same end."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import Flags

from utils import settings
from utils.activations.queues import ShardQueue
from utils.features import pass_backup
from utils.settings import TO_GO_ON, InputError, TimeIsUp, TimeLimit

TINY = ["--max-hours", 1e-9]  # over before a script begins: one part a run, which is always made


@pytest.fixture
def run_until_done(run_here):
    """Run a command until it ends with status 0; how often that was, and all that was printed."""

    def run(name: str, *flags: object) -> tuple[int, str]:
        printed = []
        for n_runs in range(1, 50):
            ended = run_here(name, *flags, *TINY, check=False)
            printed.append(ended.stdout)
            if ended.returncode == 0:
                return n_runs, "".join(printed)
            assert ended.returncode == TO_GO_ON == 75, ended.message
            assert "Run the same command again to go on from here." in ended.stdout
        raise AssertionError("it does not end")

    return run


def test_a_part_is_begun_only_if_one_as_long_as_the_longest_ends_in_time(monkeypatch):
    clock = [settings.STARTED + 100.0]
    monkeypatch.setattr(settings.time, "monotonic", lambda: clock[0])
    limit, free = TimeLimit(0.05), TimeLimit(None)  # 180 s
    for seconds, allowed in ((0, True), (10, True), (25, True), (10, True), (10, True), (1, False)):
        clock[0] += seconds  # 100, 110, 135, 145, 155: 155 + 25 is in time; 156 + 25 is not
        assert limit.allows_another() == allowed and free.allows_another()
    assert TimeLimit(1e-9).allows_another()  # however little there is, something is done


def test_a_wait_is_no_part_of_the_work(monkeypatch):
    clock = [settings.STARTED + 100.0]
    monkeypatch.setattr(settings.time, "monotonic", lambda: clock[0])
    limit = TimeLimit(0.1)  # 360 s
    assert limit.allows_another()
    clock[0] += 130  # 230; another part of so many would end at 360
    limit.leave_out(120)
    assert limit.allows_another()
    clock[0] += 110  # 340; those were of work
    assert not limit.allows_another()


def test_a_fault_of_the_disk_is_not_hidden_by_the_time():
    with pytest.raises(InputError, match="full"), ShardQueue() as queue:
        queue._writing.failure = InputError("full")
        raise TimeIsUp("it is over.")


def test_saving_and_training(run_here, run_until_done, tiny_model, tiny_text, tmp_path):
    folders = [tmp_path / name for name in ("whole", "cut")]
    whole, cut = (Flags(folder, tiny_model, tiny_text) for folder in folders)
    few = ["--n-tokens", 4_096, "--layer", 1, 2]
    run_here("save_activations", *whole.save_activations, *few)
    n_runs, printed = run_until_done("save_activations", *cut.save_activations, *few)
    assert n_runs == 4  # shards; after the last nothing is left to stop
    assert "Stopped for MAX_HOURS: 2,048 of 4,096 tokens are saved." in printed
    shards = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*-0000?.npy"))
    assert len(shards) == 2 * 4 * 5
    for path in (*shards, *(path.parent / "manifest.json" for path in shards)):
        assert (folders[0] / path).read_bytes() == (folders[1] / path).read_bytes(), path
    settings_files = [folder / "activations/layer-1/settings.json" for folder in folders]
    assert settings_files[0].read_text() == settings_files[1].read_text()

    rounds = ["--n-passes", 1, "--log-every", 10, "--seed", 3]
    for flags, folder in zip((whole, cut), folders, strict=True):
        flags.train_autoencoder += [*rounds, "--activations-dir", folder / "activations/layer-1"]
    run_here("train_autoencoder", *whole.train_autoencoder)
    n_runs, printed = run_until_done("train_autoencoder", *cut.train_autoencoder)
    assert n_runs == 3 and printed.count("Going on from step") == 2
    assert "Stopped for MAX_HOURS: 22 of 55 steps are made and saved." in printed
    logs = [pd.read_csv(f / "autoencoder/training_log.csv", index_col="step") for f in folders]
    pd.testing.assert_frame_equal(*(log.drop(columns="seconds") for log in logs), rtol=1e-4)
    fvu = [json.loads((f / "autoencoder/metrics.json").read_text())["fvu"] for f in folders]
    assert fvu[0] == pytest.approx(fvu[1], rel=1e-4)
    assert not (folders[1] / "autoencoder/backup.keras").exists()


def test_a_sweep(run_here, run_until_done, tiny_model, tiny_text, tmp_path):
    flags = Flags(tmp_path, tiny_model, tiny_text)
    run_here("save_activations", *flags.save_activations, "--n-tokens", 4_096)
    sizes = ["--k", 4, "--batch-size", 64, "--backend", "torch", "--sweep-latents", 16, 32]
    sizes += ["--sweep-steps", 3, 6, "--learning-rate", 1e-3, "--sweep-learning-rates", 1]
    sizes += ["--activations-dir", tmp_path / "activations"]
    places = [["--autoencoder-dir", tmp_path / name] for name in ("whole", "cut")]
    run_here("train_autoencoder", *sizes, *places[0])
    n_runs, printed = run_until_done("train_autoencoder", *sizes, *places[1])
    assert n_runs > 2 and "runs are finished, others backed up." in printed
    tables = [pd.read_csv(tmp_path / name / "scaling_laws.csv") for name in ("whole", "cut")]
    pd.testing.assert_frame_equal(*(table.drop(columns="seconds") for table in tables), rtol=1e-4)


def test_an_unfinished_pass_is_not_mixed_with_another(tiny_run, run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(pass_backup, "SAVE_EVERY", 0)
    flags = [*tiny_run.flags.analyze_features, "--studies", "outputs", "--analysis-dir", tmp_path]
    assert run_here("analyze_features", *flags, *TINY, check=False).returncode == TO_GO_ON
    assert (tmp_path / "pass-backup.npz").exists()
    other = [*flags, *TINY, "--seed", 1]
    refused = run_here("analyze_features", *other, check=False)
    assert refused.returncode == 1 and "SEED: 0 there, 1 now" in refused.message
    begun = run_here("analyze_features", *other, "--overwrite", check=False)
    assert begun.returncode == TO_GO_ON and "The pass goes on" not in begun.stdout
    assert "The pass goes on" in run_here("analyze_features", *other, check=False).stdout


def test_an_analysis_stops_between_its_steps(tiny_run, run_until_done, tmp_path, monkeypatch):
    ticks = itertools.count()  # one a batch, and one where the pass was saved
    monkeypatch.setattr(pass_backup, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(pass_backup, "SAVE_EVERY", 10)
    folder, studies = Path(tmp_path), ["specificity", "completeness", "outputs"]
    flags = [*tiny_run.flags.analyze_features, "--studies", *studies, "--analysis-dir", folder]
    n_runs, printed = run_until_done("analyze_features", *flags)
    assert "Stopped for MAX_HOURS: the pass and 0 of " in printed
    n_steps = 1 + len(list(folder.glob("study-*.json")))
    n_parts = printed.count("The pass goes on after")
    assert n_runs == n_steps + n_parts > n_steps + 2
    assert not (folder / "pass-backup.npz").exists()
    assert (folder / "browser/index.html").exists()
    whole = tiny_run.folder / "analysis"
    for name in ("pass.parquet", "examples.parquet"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    shutil.rmtree(folder)
