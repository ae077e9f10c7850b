"""A folder of bounded size: windows, and two processes that write and use it."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import BOS, command, settings_of, write_activations

from tests.benchmarks.rolling import run_together
from utils.activations import following
from utils.activations.batches import ShuffledBatches
from utils.activations.following import FollowedBatches, free_all, open_first_window
from utils.activations.manifest import Manifest
from utils.activations.rolling import BESIDES, Rolling
from utils.activations.store import KEPT_SHARDS, ActivationStore
from utils.artifacts import write_json
from utils.autoencoder import training
from utils.autoencoder.saved import load_autoencoder
from utils.settings import InputError, TimeIsUp, TimeLimit

SHARD = 2_048 * (32 * 2 + 14)  # bytes, of the tiny model


@pytest.mark.parametrize("n_shards", [1, 2, 3, 10, 97])
@pytest.mark.parametrize("max_shards", [3, 4, 7, 50])
def test_windows_hold_every_shard_once_and_two_fit_beside_what_is_kept(n_shards, max_shards):
    rolling = Rolling.plan(n_shards, 1_000_000, (max_shards * 1e6 + BESIDES) / 1e9, 1e-3)
    windows = [rolling.shards(window) for window in range(rolling.n_windows)]
    assert [shard for window in windows for shard in window] == list(range(n_shards))
    for window, shards in enumerate(windows):
        assert all(rolling.window_of(shard) == window for shard in shards)
        assert 2 * len(shards) + len(rolling.kept) <= max(3, max_shards)
    assert len(rolling.kept) == rolling.n_kept == 1 and 0 in rolling.kept


def test_a_bound_that_is_too_small_names_the_least_that_would_do():
    with pytest.raises(InputError, match=r"it is 0\.02\. At least 0\.0342 would do"):
        Rolling.plan(100, 10_000_000, 0.02, 0.01)
    with pytest.raises(InputError, match=r"KEEP_GB must hold a shard, 0\.01 GB; it is 0\.001"):
        Rolling.plan(100, 10_000_000, 1.0, 0.001)


N_SHARDS, A_SHARD, D_MODEL, BATCH = 6, 5, 4, 16
NO_LIMIT = TimeLimit(None)


@pytest.fixture
def folder(tmp_path):
    """Six shards of a folder of bounded size, three windows, each row told by its first number."""
    shape = (N_SHARDS * A_SHARD, 32)
    tokens = np.ones(shape, np.int32)
    tokens[:, 0] = BOS
    activations = np.random.default_rng(0).normal(size=(*shape, D_MODEL)).astype(np.float16)
    activations[..., 0] = 1 + np.arange(tokens.size).reshape(shape)
    documents = np.repeat(np.arange(shape[0] * 2, dtype=np.int32).reshape(-1, 2), 16, axis=1)
    arrays = {"activations": activations, "tokens": tokens, "norms": np.ones(shape, np.float32)}
    rest = {"documents": documents, "subsets": np.zeros(shape, np.int16)}
    write_activations(tmp_path, {**arrays, "kept": tokens != BOS, **rest}, A_SHARD)
    change_manifest(tmp_path, rolling=[N_SHARDS, 3, 1])
    write_json(tmp_path / "settings.json", {})
    return tmp_path


def change_manifest(folder, **values):
    manifest = Manifest.read(folder / "manifest.json")
    dataclasses.replace(manifest, **values).write(folder / "manifest.json")


def followed(folder, n_passes=1.0):
    def shuffled(store, window):
        return ShuffledBatches(store, store.split(0.1, 1_000).training, BATCH, window, 1e-4)

    store = open_first_window(folder, NO_LIMIT)
    rows = shuffled(store, 0).n_rows / len(store.shards)
    batches = FollowedBatches(store, folder, BATCH, rows, 0, shuffled, NO_LIMIT)
    return batches, batches.n_steps(n_passes)


def first_numbers(batches):
    return [batch[:, 0].tolist() for batch in batches]


def test_batches_are_of_one_window_after_another_and_go_on_from_any_step(folder):
    batches, n_steps = followed(folder)
    every = first_numbers(batches.from_step(0))
    assert len(every) == n_steps == int(N_SHARDS * batches.rows_a_shard) // BATCH
    for window, (begin, end) in enumerate(itertools.pairwise([0, *batches.ends])):
        rows = {row for batch in every[begin:end] for row in batch}
        shards = {int(row - 1) // 32 // A_SHARD for row in rows}
        assert shards == set(batches.rolling.shards(window))
        assert len(rows) == (end - begin) * BATCH  # none twice in a pass
    for step in (1, batches.ends[0], n_steps - 1):
        assert first_numbers(batches.from_step(step)) == every[step:]


def test_a_window_is_freed_when_training_goes_on_behind_it_and_the_next_is_there(folder):
    batches, _ = followed(folder)
    scale, mean = batches.store.scale, batches.store.mean
    batches.free(batches.ends[0] - 1)
    assert batches.rolling.freed(folder) == set()
    assert not batches.rolling.has_room(folder, 4)
    batches.free(batches.ends[0])
    assert batches.rolling.freed(folder) == {1}
    assert not list(folder.glob("*-00001.npy")) and len(list(folder.glob("*-00000.npy"))) == 5
    assert batches.rolling.has_room(folder, 4)
    again, _ = followed(folder)  # of what is left of the first window
    assert (again.store.scale, again.store.mean.tolist()) == (scale, mean.tolist())
    assert first_numbers(batches.from_step(batches.ends[0]))
    free_all(folder)
    assert [shard.number for shard in ActivationStore(folder).shards] == [0]


def test_a_window_is_freed_as_soon_as_the_next_is_there(folder):
    """The extraction may wait for it, and training for what the extraction writes then."""
    every = Manifest.read(folder / "manifest.json").shards
    change_manifest(folder, shards=every[:2], finished=False)
    batches, _ = followed(folder)
    coming = batches.from_step(0)
    for _ in range(batches.ends[0]):
        next(coming)
    batches.free(batches.ends[0])
    assert batches.rolling.freed(folder) == set()
    change_manifest(folder, shards=every[:4])
    next(coming)
    assert batches.rolling.freed(folder) == {1}
    again, _ = followed(folder)  # as after a kill
    change_manifest(folder, shards=every)
    next(again.from_step(again.ends[1]))
    assert again.rolling.freed(folder) == {1, 2, 3}


def test_statistics_are_those_of_the_first_window(folder):
    store = followed(folder)[0].store
    rows = store.kept_rows(range(2 * A_SHARD)).astype(float)
    assert store.n_contexts == 2 * A_SHARD
    np.testing.assert_allclose(store.mean, rows.mean(axis=0), rtol=1e-6)
    assert np.square(rows * store.scale).sum(axis=1).mean() == pytest.approx(D_MODEL)


def test_where_the_corpus_ends_early_the_last_window_is_begun_again(folder):
    change_manifest(folder, rolling=[2 * N_SHARDS, 6, 1])
    batches, n_steps = followed(folder)
    every = first_numbers(batches.from_step(0))
    assert len(every) == n_steps > batches.ends[3]
    last = {row for batch in every[batches.ends[3] :] for row in batch}
    assert {int(row - 1) // 32 // A_SHARD for row in last} == {4, 5}
    batches.free(n_steps)
    assert batches.rolling.freed(folder) == {1, 2, 3}


def test_a_training_of_an_earlier_version_goes_on_with_its_steps(folder, tmp_path):
    values = {"follow": True, "activations_dir": str(folder), "batch_size": BATCH, "n_passes": 1}
    begun = {"rows_a_shard": 155.0}  # 310 a window
    for name, chosen, ends in (("new", {}, [19, 38, 58]), ("begun", begun, [19, 38, 57])):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "chosen.json", chosen)
        settings = settings_of("train_autoencoder", **values, pool_gib=1e-4)
        store = open_first_window(folder, NO_LIMIT)
        batches = training.batches_of(settings, store, [], tmp_path / name)
        batches.n_steps(1)
        assert batches.ends == ends
        batches._lock.release()


def test_who_follows_nobody_says_what_it_waits_for(folder, monkeypatch, capsys):
    monkeypatch.setattr(following, "POLL", 0.01)
    monkeypatch.setattr(following, "TOLD_AFTER", 0.02)
    monkeypatch.setattr(following, "PATIENCE", 0.1)
    with pytest.raises(InputError, match=r"FOLLOW waits for the shards of window 1 .* Start it"):
        open_first_window(folder / "none", NO_LIMIT)
    assert "Waiting for the shards of window 1" in capsys.readouterr().out


def test_a_training_cannot_begin_with_what_another_has_freed(folder):
    followed(folder)
    free_all(folder)
    batches, _ = followed(folder)
    with pytest.raises(InputError, match=r"Window 1 of .* was used and freed by another training"):
        next(batches.from_step(0))


def test_two_trainings_cannot_follow_one_folder(folder):
    first, second = followed(folder)[0], followed(folder)[0]
    first.claim()
    with pytest.raises(InputError, match="Another training follows"):
        second.claim()
    first._lock.release()
    second.claim()


def test_a_last_window_of_less_than_a_batch_is_gone_through_often(folder):
    every = Manifest.read(folder / "manifest.json").shards
    change_manifest(folder, shards=every[:5])
    batches, n_steps = followed(folder)
    batches.batch_size = 200  # more rows than the last window has
    shuffled = batches.shuffled

    def in_larger_batches(store, window):
        made = shuffled(store, window)
        made.batch_size = 200
        return made

    batches.shuffled = in_larger_batches
    n_steps = batches.n_steps(1.0)
    assert [len(batch) for batch in batches.from_step(0)] == [200] * n_steps


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_what_is_freed_is_not_kept_open(folder):
    batches, _ = followed(folder)
    first, second, _ = batches.ends
    coming = batches.from_step(first)
    every = [next(coming) for _ in range(second - first)]
    batches.free(second)
    maps = Path("/proc/self/maps").read_text()
    assert len(every) == second - first  # and what gave them is still there
    assert not [number for number in (1, 2, 3) if f"activations-0000{number}.npy" in maps]


def test_steps_count_the_rows_that_are_held_out(folder, tmp_path):
    """All of them are in the first shard, and later windows have others."""
    values = {"follow": True, "activations_dir": str(folder), "batch_size": BATCH, "held_out": 0.3}
    settings = settings_of("train_autoencoder", **values, pool_gib=1e-4)
    store = open_first_window(folder, NO_LIMIT)
    (tmp_path / "stage").mkdir()
    batches = training.batches_of(settings, store, [], tmp_path / "stage")
    assert batches.rows_a_shard == store.n_tokens / 2
    rounds = training.cut_into_rounds(
        settings_of("train_autoencoder", **values, log_every=5), batches
    )
    assert rounds.limit is batches.limit
    rows = 3 * 2 * A_SHARD * 31  # of three passes over a window; each first token is left out
    assert batches.ends == [n * rows // BATCH for n in (1, 2, 3)]
    batches._lock.release()


def test_a_folder_of_several_layers_is_told(tmp_path):
    (tmp_path / "layer-3").mkdir()
    with pytest.raises(InputError, match=r"holds several layers\. Run the same command again"):
        open_first_window(tmp_path, NO_LIMIT)


def test_the_time_limit_comes_while_waiting(folder):
    with pytest.raises(TimeIsUp, match="all up to the last backup is saved"):
        open_first_window(folder / "none", TimeLimit(0.0))


class Run:
    """Both commands on the tiny model, below a folder."""

    def __init__(self, folder, model, text, max_gb):
        self.activations, self.autoencoder = folder / "activations", folder / "autoencoder"
        self.max_bytes = max_gb * 1e9
        self.writer = [
            "--model-name", model, "--layer", 1, "--dtype", "float32", "--dataset", text,
            "--n-tokens", 49_152, "--context-length", 32, "--contexts-per-batch", 16,
            "--tokens-per-shard", 2_048, "--activations-dir", self.activations,
            "--max-disk-gb", max_gb, "--keep-gb", 2.5 * SHARD / 1e9,
        ]  # fmt: skip
        self.trainer = [
            "--n-latents", 64, "--k", 4, "--batch-size", 256, "--n-passes", 2, "--log-every", 20,
            "--backup-every", 2, "--dead-after", 20_000, "--learning-rate", 1e-3, "--follow",
            "--backend", "torch", "--activations-dir", self.activations,
            "--autoencoder-dir", self.autoencoder,
        ]  # fmt: skip

    def together(self, n_kills):
        commands = [
            command("save_activations", *self.writer), command("train_autoencoder", *self.trainer),
        ]  # fmt: skip
        log = self.activations / "freed.jsonl"

        def is_due(n_killed):  # one when a window was freed, then after every second
            n_freed = len(log.read_text().splitlines()) if log.exists() else 0
            return n_killed < n_kills and n_freed > 2 * n_killed

        self.most, self.n_killed = run_together(commands, self.activations, is_due)
        return self


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, tiny_text):
    """One run undisturbed, one killed three times: two kept shards, windows of up to three."""
    max_gb = (8 * SHARD + BESIDES) / 1e9
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "killed")]
    runs = [Run(folder, tiny_model, tiny_text, max_gb) for folder in folders]
    return [run.together(n_kills) for run, n_kills in zip(runs, (0, 3), strict=True)]


def test_the_folder_stays_below_its_bound_and_ends_with_what_is_kept(runs):
    for run in runs:
        assert 3 * SHARD < run.most <= run.max_bytes
        assert {path.name for path in run.activations.glob("activations-*.npy")} == {
            "activations-00000.npy", "activations-00012.npy",
        }  # fmt: skip
        assert ActivationStore(run.activations).n_contexts == 2 * 64


def test_killed_or_not_shards_and_weights_are_the_same(runs):
    whole, killed = runs
    assert killed.n_killed == 3
    for path in whole.activations.glob("*.npy"):
        assert path.read_bytes() == (killed.activations / path.name).read_bytes()
    weights = [load_autoencoder(r.autoencoder / "autoencoder.keras").get_weights() for r in runs]
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_held_out_documents_lie_within_kept_shards_and_are_found_again(runs):
    run = runs[0]
    metrics = json.loads((run.autoencoder / "metrics.json").read_text())
    store = ActivationStore(run.activations)
    split = store.split(0.05, 1_000_000)
    assert split.rule == metrics["split"] == KEPT_SHARDS
    n_held_out = int(store.read("kept", split.held_out).sum())
    assert metrics["n_held_out_tokens"] == n_held_out > 0
    documents = [set(store.read("documents", part)[:, 1]) for part in split[:2]]
    assert documents[0].isdisjoint(documents[1])


def test_the_analysis_takes_what_is_kept(runs, run_here, tmp_path):
    run = runs[0]
    done = run_here(
        "analyze_features", "--activations-dir", run.activations, "--autoencoder-dir",
        run.autoencoder, "--analysis-dir", tmp_path, "--studies", "specificity",
        "--n-loss-tokens", 256, "--no-map-features",
    )  # fmt: skip
    assert "features alive" in done.stdout


def test_followed_or_not_is_told_from_the_folder(runs, tiny_run, run_here):
    off = [flag for flag in runs[0].trainer if flag != "--follow"]
    assert "FOLLOW must be on" in run_here("train_autoencoder", *off, check=False).message
    on = [*tiny_run.flags.train_autoencoder, "--follow"]
    assert "FOLLOW is for activations saved with MAX_DISK_GB" in (
        run_here("train_autoencoder", *on, check=False).message
    )
