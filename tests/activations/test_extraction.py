"""save_activations.py: the right activations of the right text, ranks, repair."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAYER, SUBSETS, Flags, make_texts
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.activations.corpus import Corpus
from utils.activations.shards import ARRAYS, _open_array
from utils.activations.store import ActivationStore
from utils.artifacts import write_json


@pytest.fixture(scope="module")
def store(tiny_run) -> ActivationStore:
    return ActivationStore(tiny_run.folder / "activations")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def array(store: ActivationStore, name: str) -> np.ndarray:
    return store.read(name, range(store.n_contexts))


def test_activations_are_the_hidden_states_after_the_block(store, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokens = torch.from_numpy(array(store, "tokens")[:96]).long()
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    assert len(states) == 5
    saved = torch.from_numpy(array(store, "activations")[:96]).float()
    # float16 has 11 bits; the batch that a context was in decides the last of float32's 24.
    torch.testing.assert_close(saved, states[LAYER + 1], rtol=1e-3, atol=1e-3)
    for other in (LAYER, LAYER + 2):
        assert (saved - states[other]).abs().mean() > 0.1


def test_every_context_begins_with_bos_and_none_is_kept(store, tokenizer):
    tokens, kept = array(store, "tokens"), array(store, "kept")
    bos = tokens == tokenizer.bos_token_id
    assert bos[:, 0].all() and bos[:, 1:].any()
    assert not kept[bos].any() and kept[~bos].all()
    assert store.excluded == {"bos": int(bos.sum()), "outlier_norm": 0}
    assert store.n_tokens == kept.sum()


def test_every_token_can_be_traced_to_its_text(store, tokenizer):
    texts = make_texts()
    seen = set()
    for context in range(store.n_contexts):
        (tokens,), (documents,) = (store.read(name, [context]) for name in ("tokens", "documents"))
        subsets = np.array(store.subset_names)[store.read("subsets", [context])[0]]
        for document in np.unique(documents):
            of_document = documents == document
            text, subset = texts[document]
            assert set(subsets[of_document]) == {subset}
            assert tokenizer.decode(tokens[of_document], skip_special_tokens=True) in text
            seen.add(subset)
    assert seen == set(SUBSETS)


def test_the_stream_is_the_corpus_in_order(store, tokenizer, tiny_text):
    tokens, documents = array(store, "tokens"), array(store, "documents")
    bos = tokens == tokenizer.bos_token_id
    saved = tokens[~bos]
    expected = []
    for document in Corpus(str(tiny_text)).documents():
        expected += tokenizer(document.text, add_special_tokens=False)["input_ids"]
    assert saved.tolist() == expected[: len(saved)]
    assert (np.diff(documents.ravel()) >= 0).all()


def test_outliers_are_left_out_and_counted(run_here, tiny_run, tmp_path, tokenizer):
    flags = ["--n-tokens", 4_096, "--outlier-factor", 1.2, "--activations-dir", tmp_path]
    printed = run_here("save_activations", *tiny_run.flags.save_activations, *flags).stdout
    store = ActivationStore(tmp_path)
    norms = np.linalg.norm(array(store, "activations").astype(np.float32), axis=-1)
    bos = array(store, "tokens") == tokenizer.bos_token_id
    outliers = ~bos & (norms > store.outlier_norm * 1.001)
    clear = np.abs(norms / store.outlier_norm - 1) > 0.001
    assert 0.01 < outliers.mean() < 0.5
    assert (array(store, "kept") == ~(bos | outliers))[clear].all()
    assert store.excluded["outlier_norm"] == pytest.approx(outliers.sum(), abs=int((~clear).sum()))
    assert f"{store.excluded['outlier_norm']:,} outliers (norm above" in printed


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_head_of_the_text_does_not_set_the_outlier_norm(
    run_here, tiny_run, tmp_path, monkeypatch, world_size
):
    path = tmp_path / "text.jsonl"
    texts = ["anchor " * 400] * 2 + [text for text, _ in make_texts(100)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = [*tiny_run.flags.save_activations, "--dataset", path, "--outlier-factor", 1.05]
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        run_here("save_activations", *flags, "--activations-dir", tmp_path / "activations")
    store = ActivationStore(tmp_path / "activations")
    norms = np.linalg.norm(array(store, "activations").astype(np.float32), axis=-1)
    counted = array(store, "tokens") != array(store, "tokens")[0, 0]
    median = np.median(norms[counted])
    head = np.median(norms[:4][counted[:4]])
    assert abs(head / median - 1) > 0.01
    assert store.outlier_norm == pytest.approx(1.05 * median, rel=1e-5)
    clear = np.abs(norms / store.outlier_norm - 1) > 1e-5
    kept = counted & (norms <= store.outlier_norm)
    assert (array(store, "kept") == kept)[clear].all() and 0 < kept.sum() < counted.sum()
    rows = array(store, "activations")[array(store, "kept")].astype(np.float64)
    assert store.scale == pytest.approx((store.d_model / (rows**2).sum(axis=1).mean()) ** 0.5)


# -------------------------------------------------------------------------------- several ranks


def test_ranks_take_what_is_left(run_here, tiny_model, tiny_text, tmp_path, monkeypatch):
    flags = [*Flags(tmp_path, tiny_model, tiny_text).save_activations, "--n-tokens", 2_048]
    folder = tmp_path / "activations"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert f"{folder} holds 2,048" in run_here("save_activations", *flags).stdout
    made = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    (folder / "tokens-00001.npy").unlink()
    _open_array.cache_clear()  # in a process of its own it would not have been read
    for rank, words in (("0", "Process 0 is done; another has a shard"), ("1", f"{folder} holds")):
        monkeypatch.setenv("RANK", rank)
        assert words in run_here("save_activations", *flags).stdout
    assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == made
    monkeypatch.setenv("RANK", "2")
    refused = run_here("save_activations", *flags, check=False)
    assert "RANK in the environment must be from 0" in refused.message
    monkeypatch.setenv("RANK", "0")
    refused = run_here("save_activations", *flags, "--overwrite", check=False)
    assert "OVERWRITE must be off with several processes" in refused.message


# --------------------------------------------------------------------------------------- repair


@pytest.fixture
def damaged(tiny_run, tmp_path) -> Path:
    shutil.copytree(tiny_run.folder / "activations", tmp_path / "activations")
    return tmp_path / "activations"


def test_damaged_shards_are_made_anew(damaged, tiny_run, run_here):
    whole = {path.name: path.read_bytes() for path in damaged.glob("*.npy")}
    manifest = (damaged / "manifest.json").read_bytes()  # by which later stages know them again
    untouched = os.stat(damaged / "activations-00000.npy").st_mtime_ns
    flipped = damaged / "activations-00002.npy"
    with flipped.open("r+b") as file:
        file.seek(5_000)
        byte = file.read(1)[0]
        file.seek(5_000)
        file.write(bytes([byte ^ 1]))
    cut = damaged / "tokens-00005.npy"
    cut.write_bytes(cut.read_bytes()[:-10])
    for name in ARRAYS:
        (damaged / f"{name}-00047.npy").unlink()
    flags = [*tiny_run.flags.save_activations, "--activations-dir", damaged]
    printed = run_here("save_activations", *flags).stdout
    assert re.findall(r"Shard (\d+) is damaged or missing", printed) == ["2", "5", "47"]
    assert {path.name: path.read_bytes() for path in damaged.glob("*.npy")} == whole
    assert os.stat(damaged / "activations-00000.npy").st_mtime_ns == untouched
    assert (damaged / "manifest.json").read_bytes() == manifest


def test_a_repair_from_other_text_is_refused(damaged, tiny_run, tiny_text, run_here):
    (damaged / "tokens-00001.npy").unlink()
    left = {path.name: path.read_bytes() for path in damaged.glob("*.npy")}
    before = tiny_text.read_bytes()
    try:
        tiny_text.write_bytes(before.replace(b"rope", b"ship"))
        flags = [*tiny_run.flags.save_activations, "--activations-dir", damaged]
        message = run_here("save_activations", *flags, check=False).message
    finally:
        tiny_text.write_bytes(before)
    assert "Shard 1 made anew differs from the one recorded" in message
    assert {path.name: path.read_bytes() for path in damaged.glob("*.npy")} == left
    assert not list(damaged.glob(".partial*"))
    assert json.loads((damaged / "manifest.json").read_text())["finished"]


def test_going_on_from_other_files_is_refused(damaged, tiny_run, run_here):
    manifest = json.loads((damaged / "manifest.json").read_text())
    (name,) = manifest["files"]
    manifest["files"][name] += 1
    manifest["finished"] = False
    write_json(damaged / "manifest.json", manifest)
    flags = [*tiny_run.flags.save_activations, "--activations-dir", damaged]
    message = run_here("save_activations", *flags, check=False).message
    assert "were begun with files" in message and "Delete it to start anew" in message
    del manifest["files"]  # as early versions wrote it
    write_json(damaged / "manifest.json", manifest)
    assert "holds" in run_here("save_activations", *flags).stdout


def test_a_run_that_another_rank_still_writes_is_not_deleted(damaged, tiny_run, run_here):
    flags = [*tiny_run.flags.save_activations, "--activations-dir", damaged]
    with FileLock(damaged / ".lock-1"):
        words = [*flags, "--layer", LAYER + 1, "--overwrite"]
        message = run_here("save_activations", *words, check=False).message
    assert "Another process is writing to" in message
    assert len(ActivationStore(damaged).shards) > 1


def test_what_the_text_is_too_short_for_is_said(run_here, tiny_model, tmp_path):
    path = tmp_path / "text.jsonl"
    for words, told in ((200, "{} ended after 192 tokens of 10,240."),
                        (1, "{} must hold at least a context of text")):  # fmt: skip
        path.write_text(json.dumps({"text": "anchor " * words}) + "\n")
        flags = [*Flags(tmp_path, tiny_model, path).save_activations, "--n-tokens", 10_240]
        flags += ["--activations-dir", tmp_path / str(words)]
        ended = run_here("save_activations", *flags, check=False)
        assert told.format(path) in ended.stdout + ended.message
