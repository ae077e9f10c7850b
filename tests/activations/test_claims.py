"""Any number of processes: the same shards, none twice, what one leaves undone made by another."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Flags, command, environment, settings_of
from filelock import FileLock
from tiny_llama import LAYER, tiny_language_model

from utils.activations.claims import Stream
from utils.activations.contexts import pack_contexts
from utils.activations.corpus import BEGINNING, Corpus
from utils.activations.extraction import Extraction, Ranks
from utils.activations.store import ActivationStore
from utils.settings import InputError

CONTEXT, PER_SHARD = 16, 6
SETTINGS = settings_of(
    "save_activations",
    model_name="tiny",
    dataset="text",
    n_tokens=CONTEXT * PER_SHARD * 20,
    context_length=CONTEXT,
    storage_dtype="float32",
    tokens_per_shard=CONTEXT * PER_SHARD,
    contexts_per_batch=2,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Documents of 1 to 90 words in two files, of four subsets that come one after another."""
    folder, draw = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for number in range(2):
        records = []
        for n in range(40):
            words = " ".join(f"w{word}" for word in draw.integers(2, 300, draw.integers(1, 90)))
            subset = {"pile_set_name": f"s{2 * number + n // 20}"}
            records += [{"text": words, "meta": subset}, {"text": ""}]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{number}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def new_model() -> Callable:
    """Makes the same model for each process, slow enough for all to take part."""

    def make(fail_at: int | None = None):
        model, calls = tiny_language_model(), []

        def count(*_):
            calls.append(1)
            time.sleep(0.02)
            if len(calls) == fail_at:
                raise ValueError("dead")

        model.blocks[LAYER].register_forward_hook(count)
        return model

    return make


def extract(folder: Path, text: Path, model, ranks: Ranks = Ranks(), **changes) -> None:  # noqa: B008
    folder.mkdir(exist_ok=True)
    settings = dataclasses.replace(SETTINGS, **changes)
    extraction = Extraction({LAYER: folder}, settings, ranks)
    if not extraction.is_finished():
        extraction.begin(model, Corpus(str(text)))
        extraction.run()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text, new_model) -> Path:
    """The folder of one process."""
    folder = tmp_path_factory.mktemp("alone")
    extract(folder, text, new_model())
    return folder


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def entries(folder: Path) -> dict[int, dict]:
    """The entry of each shard, of all manifests, none of which has another's."""
    found = {}
    for path in folder.glob("manifest*.json"):
        for entry in json.loads(path.read_text())["shards"]:
            assert found.setdefault(entry["shard"], entry) is entry
    return found


def run_together(*processes: Callable[[], None]) -> list[BaseException]:
    """Run each in a thread of its own, as processes; what they raised."""
    errors = []

    def run(process):
        try:
            process()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


def assert_same(folder: Path, alone: Path) -> None:
    assert arrays(folder) == arrays(alone) and entries(folder) == entries(alone)
    stores = ActivationStore(folder), ActivationStore(alone)
    for name in ("n_contexts", "n_tokens", "outlier_norm", "subset_names", "skipped", "excluded"):
        assert getattr(stores[0], name) == getattr(stores[1], name), name
    assert stores[0].scale == pytest.approx(stores[1].scale, rel=1e-12)
    np.testing.assert_allclose(stores[0].mean, stores[1].mean, rtol=1e-6)
    names = {path.name for path in folder.iterdir()} - {path.name for path in alone.iterdir()}
    assert all(re.fullmatch(r"(\.partial-)?manifest-\d+\.json|\.lock-\d", name) for name in names)


@pytest.mark.parametrize("n_processes", [2, 3])
def test_processes_make_what_one_makes(tmp_path, text, new_model, alone, n_processes):
    ranks = [Ranks(rank, n_processes) for rank in range(n_processes)]
    models = [new_model() for _ in ranks]
    errors = run_together(
        *(
            lambda one=one, model=model: extract(tmp_path, text, model, one)
            for one, model in zip(ranks, models, strict=True)
        )
    )
    assert not errors
    assert_same(tmp_path, alone)
    made = [len(json.loads(p.read_text())["shards"]) for p in tmp_path.glob("manifest*.json")]
    assert len(made) == n_processes and min(made) > 0 and sum(made) == 20


def test_to_the_end_of_the_corpus(tmp_path, text, new_model):
    extract(tmp_path / "alone", text, new_model(), n_tokens=10**6)
    models = [new_model() for _ in range(2)]
    (tmp_path / "both").mkdir()
    errors = run_together(
        *(
            lambda rank=rank: extract(
                tmp_path / "both", text, models[rank], Ranks(rank, 2), n_tokens=10**6
            )
            for rank in range(2)
        )
    )
    assert not errors
    assert_same(tmp_path / "both", tmp_path / "alone")
    assert ActivationStore(tmp_path / "both").skipped == {"with an empty text": 80}


def test_one_that_dies_is_finished_by_another_that_runs(tmp_path, text, new_model, alone):
    models = new_model(fail_at=14), new_model()
    errors = run_together(
        *(lambda r=r: extract(tmp_path, text, models[r], Ranks(r, 2)) for r in range(2))
    )
    assert list(map(str, errors)) == ["dead"]
    assert_same(tmp_path, alone)


def test_processes_come_and_go(tmp_path, text, new_model, alone):
    for rank, fail_at in ((0, 12), (3, 15), (1, 9), (3, 8), (0, None)):
        try:
            extract(tmp_path, text, new_model(fail_at), Ranks(rank, 4))
        except ValueError as error:
            assert str(error) == "dead"
        with pytest.raises(InputError) if fail_at else pytest.MonkeyPatch.context():
            ActivationStore(tmp_path)
    assert_same(tmp_path, alone)
    assert (tmp_path / "manifest-00003.json").exists()
    # Any number of processes makes damaged shards of all anew, and no manifest changes.
    manifests = {path: path.read_bytes() for path in tmp_path.glob("manifest*.json")}
    for number in (0, 7, 19):
        (tmp_path / f"tokens-{number:05d}.npy").write_bytes(b"damaged")
    for rank in range(2):
        extract(tmp_path, text, new_model(), Ranks(rank, 2))
    assert arrays(tmp_path) == arrays(alone)
    assert {path: path.read_bytes() for path in tmp_path.glob("manifest*.json")} == manifests


def test_what_a_lost_manifest_or_cursor_told_is_made_anew(tmp_path, text, new_model, alone):
    for rank, fail_at in ((0, 12), (1, 15)):
        with pytest.raises(ValueError, match="dead"):
            extract(tmp_path, text, new_model(fail_at), Ranks(rank, 2))
    lost = tmp_path / "lost"
    shutil.copytree(tmp_path, lost)
    (lost / "manifest-00001.json").unlink()
    extract(lost, text, new_model())
    assert_same(lost, alone)
    shutil.rmtree(lost)
    (tmp_path / "cursor.json").unlink()
    extract(tmp_path, text, new_model())
    assert_same(tmp_path, alone)
    shutil.copy(tmp_path / "manifest.json", tmp_path / "manifest-00002.json")
    with pytest.raises(InputError, match=r"each shard in one manifest; \d+ are in two\. Delete"):
        ActivationStore(tmp_path)


def test_a_process_that_is_killed(tmp_path, tiny_model, tiny_text, run_here, monkeypatch):
    flags = [*Flags(tmp_path, tiny_model, tiny_text).save_activations, "--n-tokens", 24_576]
    folder = tmp_path / "activations"
    killed = subprocess.Popen(
        command("save_activations", *flags), cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env=environment(RANK="1", WORLD_SIZE="2"),
    )  # fmt: skip
    while not list(folder.glob("activations-0000[3-9].npy")) and killed.poll() is None:
        time.sleep(0.005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with FileLock(folder / ".lock-0"):  # two processes of one rank
        message = run_here("save_activations", *flags, check=False).message
        assert "Another process is writing to" in message and "RANK of its own" in message
    (folder / ".lock-shard-00000").touch()  # as a kill leaves it that comes right after recording
    printed = run_here("save_activations", *flags).stdout
    assert f"{folder} holds 24,576 tokens in 24 shards" in printed
    assert not list(folder.glob(".lock-shard-*"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    run_here("save_activations", *flags, "--activations-dir", tmp_path / "alone")
    assert_same(folder, tmp_path / "alone")


def test_shares_of_documents_go_on_as_they_were_begun(tmp_path, text, new_model):
    (tmp_path / "settings.json").write_text('{"world_size": 2}')
    assert not Ranks(0, 3).going_on_with(tmp_path).shares_documents
    for rank in range(2):
        ranks = Ranks(rank, 2).going_on_with(tmp_path)
        with pytest.raises(ValueError, match="dead"):
            extract(tmp_path, text, new_model(fail_at=12), ranks)
        for path in tmp_path.glob("cursor*.json"):  # which earlier versions had not
            path.unlink()
        with pytest.raises(InputError, match=f"{rank} of 2 processes are done"):
            ActivationStore(tmp_path)
        extract(tmp_path, text, new_model(), ranks)
    store, tokenizer = ActivationStore(tmp_path), new_model().tokenizer
    assert [shard.number for shard in store.shards] == list(range(20))
    for rank in range(2):
        documents = Corpus(str(text)).documents(rank=rank, world_size=2)
        expected = list(pack_contexts(documents, tokenizer, CONTEXT))[: 10 * PER_SHARD]
        tokens = np.concatenate([shard["tokens"] for shard in store.shards[rank::2]])
        assert (tokens == np.stack([context.tokens for context in expected])).all()


def test_a_stream_goes_on_anywhere_ahead_without_reading_anew(text, monkeypatch):
    tokenizer, passes = tiny_language_model().tokenizer, []
    monkeypatch.setattr("utils.activations.contexts.N_TOGETHER", 5)
    corpus = Corpus(str(text))
    whole = list(pack_contexts(corpus.documents(), tokenizer, CONTEXT))
    starts = [BEGINNING, *(context.next_position for context in whole)]
    documents = Corpus.documents
    monkeypatch.setattr(
        Corpus, "documents", lambda self, *a: passes.append(1) or documents(self, *a)
    )
    draw = np.random.default_rng(0)
    for _ in range(20):
        stream, place, n_passes = Stream(corpus, tokenizer, CONTEXT), 0, len(passes)
        while place < len(whole):
            n = int(draw.integers(1, 9))
            taken = stream.take(starts[place], n)
            assert [context.next_position for context in taken] == starts[place + 1 :][:n]
            for again, before in zip(taken, whole[place:], strict=False):
                assert (again.tokens == before.tokens).all()
                assert (again.documents == before.documents).all()
                assert again.subsets == before.subsets
            place += n + int(draw.choice([0, 1, 5, 30]))
        assert len(passes) == n_passes + 1
    assert stream.at(starts[-1]) is stream is not stream.at(starts[3])
    assert len(stream.at(starts[3]).take(starts[3], 4)) == 4
