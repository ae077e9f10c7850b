"""Each script killed with SIGKILL at five random moments, then run to the end."""

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import start

from utils.artifacts import BACKUP_FILE

N_KILLS = 5
OUTPUT = {  # the longest first
    "analyze_features": "analysis",
    "save_activations": "activations",
    "train_autoencoder": "autoencoder",
    "influence_llm": "influence",
}
# Share of a whole run's time that kills are drawn from: most of it where a script starts again
# from nothing; less where it goes on from where it was, so that the fifth kill finds it at work.
SHARE = dict(zip(OUTPUT, (0.9, 0.3, 0.3, 0.3), strict=True))
# Written last: a kill after it, while the process ends, hits nothing at work.
LAST = {"train_autoencoder": "metrics.json", "analyze_features": "browser/index.html"}


@pytest.fixture(scope="module")
def killed(tiny_run, tmp_path_factory) -> dict[str, SimpleNamespace]:
    """By script: the folder of a whole run, and that of the same run killed five times.

    On a machine that becomes faster meanwhile a kill may come too late: at least three must not.
    """
    folder = tmp_path_factory.mktemp("killed")

    def kill_and_finish(name: str) -> SimpleNamespace:
        whole, broken = tiny_run.folder / OUTPUT[name], folder / OUTPUT[name]
        words = [*getattr(tiny_run.flags, name), f"--{OUTPUT[name]}-dir", broken]
        draw = random.Random(name)
        for sooner in (1, 2, 4, 8):  # where the machine is less busy now than for the whole run
            shutil.rmtree(broken, ignore_errors=True)
            hits = 0
            for kill in range(N_KILLS):  # one in each fifth, so that early and late ones are drawn
                share = SHARE[name] * draw.uniform(kill, kill + 1) / N_KILLS
                delay = share * tiny_run.seconds[name] / sooner
                hits += start(name, *words, kill_after=delay)[0] is None
                nothing_half_written(broken, whole)
            if hits == N_KILLS and not (broken / LAST.get(name, "none")).exists():
                break
        if name == "train_autoencoder":  # however busy the machine is, once with a backup there
            start(name, *words, kill_at=broken / BACKUP_FILE)
        _, printed = start(name, *words)
        return SimpleNamespace(whole=whole, broken=broken, hits=hits, printed=printed)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(OUTPUT, pool.map(kill_and_finish, OUTPUT), strict=True))


def nothing_half_written(broken: Path, whole: Path) -> None:
    """Every file of fixed content has it, every JSON file can be read; partial ones apart."""
    for path in broken.rglob("*"):
        if path.name.startswith(".partial-"):
            continue
        if path.suffix in (".npy", ".parquet", ".html", ".js"):
            assert same_bytes(path, whole / path.relative_to(broken)), path
        elif path.suffix == ".json":
            json.loads(path.read_text())


def same_bytes(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.mark.parametrize("name", OUTPUT)
def test_the_same_files_and_no_partial_ones(killed, name):
    run = killed[name]
    assert run.hits >= 3
    assert {path.name for path in run.broken.iterdir()} == {p.name for p in run.whole.iterdir()}
    assert not list(run.broken.rglob(".partial-*"))


def test_shards_are_the_same_bytes(killed):
    run = killed["save_activations"]
    shards = list(run.whole.glob("*.npy"))
    assert len(shards) == 5 * 48
    for path in [*shards, run.whole / "manifest.json"]:
        assert same_bytes(path, run.broken / path.name), path.name


def test_training_goes_on_from_its_backup(killed):
    run = killed["train_autoencoder"]
    assert "Going on from step" in run.printed
    whole, broken = (
        pd.read_csv(folder / "training_log.csv").drop(columns="seconds")
        for folder in (run.whole, run.broken)
    )
    assert len(whole) >= 20
    pd.testing.assert_frame_equal(whole, broken, check_exact=False, rtol=1e-4)
    metrics = [json.loads((f / "metrics.json").read_text()) for f in (run.whole, run.broken)]
    for name in ("fvu", "l0", "dead_fraction", "n_tokens"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4), name


def test_analysis_is_the_same(killed):
    run = killed["analyze_features"]
    for name in ("features.parquet", "examples.parquet", "summary.json", "browser/data/index.js"):
        assert same_bytes(run.whole / name, run.broken / name), name


def test_every_text_is_recorded_once(killed):
    run = killed["influence_llm"]
    whole = read_lines(run.whole / "generations.jsonl")
    assert [record["request"]["strength"] for record in whole] == [0, 2, 4, 6, 8, 10]
    assert read_lines(run.broken / "generations.jsonl") == whole
