"""Several layers saved in one pass: each as by a run of it alone, whatever happened on the way."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAYER, Flags, settings_of
from tiny_llama import tiny_language_model

from utils.activations.corpus import Corpus
from utils.activations.extraction import Extraction, Ranks
from utils.activations.shards import ShardWriter
from utils.activations.store import ActivationStore
from utils.artifacts import write_json
from utils.language_model import residual_at, residuals_at
from utils.settings import InputError

LAYERS = (3, 0, 1)
CONTEXT, PER_SHARD, N_SHARDS, PER_BATCH = 16, 6, 4, 4
SETTINGS = settings_of(
    "save_activations",
    model_name="tiny",
    dataset="text",
    n_tokens=CONTEXT * PER_SHARD * N_SHARDS,
    context_length=CONTEXT,
    tokens_per_shard=CONTEXT * PER_SHARD,
)


@pytest.fixture(scope="module")
def model():
    """A model whose activations show the batch that a context was in, as the last bits may."""
    model = tiny_language_model()
    model.blocks[0].register_forward_hook(lambda _module, _inputs, out: out + 1e-2 * len(out))
    return model


def write_text(path: Path, seed: int) -> Path:
    draw = np.random.default_rng(seed)
    texts = (" ".join(f"w{n}" for n in draw.integers(2, 300, 50)) for _ in range(40))
    records = ({"text": text, "subset": f"s{i % 7}"} for i, text in enumerate(texts))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", 0)


def extract(model, text: Path, folder: Path, layers=LAYERS, per_batch=PER_BATCH) -> None:
    """Save some layers into folders below ``folder``."""
    settings = dataclasses.replace(SETTINGS, contexts_per_batch=per_batch)
    folders = {layer: folder / f"layer-{layer}" for layer in layers}
    for each in folders.values():
        each.mkdir(exist_ok=True, parents=True)
    extraction = Extraction(folders, settings, Ranks())
    if not extraction.is_finished():
        extraction.begin(model, Corpus(str(text)))
        extraction.run()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder that is not hidden, as locks are."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def alone(model, text, tmp_path_factory) -> dict[str, bytes]:
    """What runs of each layer alone write."""
    folder = tmp_path_factory.mktemp("alone")
    for layer in LAYERS:
        extract(model, text, folder, (layer,))
    assert len(contents(folder)) == len(LAYERS) * (5 * N_SHARDS + 1)
    return contents(folder)


# -------------------------------------------------------------------------------- the same bytes


@pytest.fixture
def flags(tiny_model, tiny_text, tmp_path) -> list:
    return Flags(tmp_path, tiny_model, tiny_text).save_activations


def test_the_command_writes_what_a_run_of_each_layer_writes(run_here, flags, tmp_path):
    flags = [*flags, "--n-tokens", 4_096, "--layer"]
    together, alone = tmp_path / "together", tmp_path / "alone"
    printed = run_here("save_activations", *flags, *LAYERS, "--activations-dir", together).stdout
    assert "after blocks 3, 0, 1 of" in printed
    for layer in LAYERS:
        folder = alone / f"layer-{layer}"
        run_here("save_activations", *flags, layer, "--activations-dir", folder)
        assert f"{together / folder.name} holds 4,096 tokens" in printed
    assert contents(together) == contents(alone)
    assert json.loads((together / "layer-3" / "settings.json").read_text())["layer"] == 3
    again = run_here("save_activations", *flags, *LAYERS, "--activations-dir", together).stdout
    assert "Nothing to do: every shard is whole." in again
    # A folder of one layer is that of a run of it, by which it can be gone on with too.
    alone_again = [*flags, LAYER, "--activations-dir", together / f"layer-{LAYER}"]
    assert "Nothing to do" in run_here("save_activations", *alone_again).stdout
    assert ActivationStore(together / "layer-3").layer == 3
    with pytest.raises(InputError, match=r"holds several layers.*layer-0, .*layer-1, .*layer-3"):
        ActivationStore(together)


@pytest.mark.parametrize(
    ("layers", "rule"),
    [
        ((1, 4, 2), "LAYER must be between 0 and 3 for .*; it is 4"),
        ((1, 2, 1), r"LAYER must be one block or several different ones; it is \(1, 2, 1\)"),
        ((), r"LAYER must be one block or several different ones; it is \(\)"),
    ],
)
def test_wrong_layers_are_named(run_here, flags, tmp_path, layers, rule):
    flags = [*flags, "--activations-dir", tmp_path / "out"]
    ended = run_here("save_activations", *flags, "--layer", *layers, check=False)
    assert re.search(rule, ended.message) and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- going on


@pytest.fixture
def extract_some(model, text, tmp_path, monkeypatch):
    """Extract layers until some batches of them are written; then it fails."""

    def run(n_batches: int, layers=LAYERS) -> None:
        written, append = [], ShardWriter.append

        def stopped(writer, *arguments, **batch):
            if len(written) >= n_batches:
                raise InterruptedError("stopped")
            written.append(writer)
            append(writer, *arguments, **batch)

        with monkeypatch.context() as patched, pytest.raises(InterruptedError):
            patched.setattr(ShardWriter, "append", stopped)
            extract(model, text, tmp_path, layers)

    return run


def n_shards_of(folder: Path) -> list[int]:
    manifests = [folder / f"layer-{layer}" / "manifest.json" for layer in LAYERS]
    return [len(json.loads(p.read_text())["shards"]) if p.exists() else 0 for p in manifests]


@pytest.mark.parametrize("n_batches", [0, 4, 5, 6, 7, 11, 17, 23])
def test_a_run_stopped_anywhere_goes_on(model, text, tmp_path, alone, extract_some, n_batches):
    extract_some(n_batches)
    assert contents(tmp_path) != alone
    extract(model, text, tmp_path)
    assert contents(tmp_path) == alone


def test_layers_that_came_to_different_places_go_on(model, text, tmp_path, alone, extract_some):
    extract_some(2 * 3, (0,))  # batches of a shard, three shards
    extract_some(2 * 1 + 1, (1,))
    (tmp_path / "layer-0" / ".partial-tokens-00003.npy").write_bytes(b"of a killed one")
    assert n_shards_of(tmp_path) == [0, 3, 1]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    calls = []
    handle = model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    extract(model, text, tmp_path, per_batch=None)  # which alone would be other batches
    handle.remove()
    assert contents(tmp_path) == alone
    assert len(calls) == 2 + 2 * N_SHARDS  # once for the speed, and for all of the deepest
    for path, before in times.items():
        if not path.name.startswith(".partial"):
            assert path.stat().st_mtime_ns == before


def test_a_layer_can_be_added_to_finished_ones(model, text, tmp_path, alone):
    extract(model, text, tmp_path, (0, 1))
    extract(model, text, tmp_path)
    assert contents(tmp_path) == alone


def test_a_layer_is_not_added_from_other_text(model, text, tmp_path):
    extract(model, text, tmp_path, (0,))
    other = write_text(tmp_path / "text.jsonl", 1)
    path = tmp_path / "layer-0" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {other.name: other.stat().st_size}  # as if it had the same length
    write_json(path, manifest)
    with pytest.raises(InputError, match="Shard 0 made anew differs from the one recorded"):
        extract(model, other, tmp_path)


def test_a_damaged_shard_of_one_layer_is_made_anew_alone(model, text, tmp_path, alone, capsys):
    extract(model, text, tmp_path)
    damaged = tmp_path / "layer-1" / "activations-00002.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    calls = {1: [], 2: []}
    handles = [
        model.blocks[block].register_forward_hook(lambda *_, block=block: calls[block].append(1))
        for block in calls
    ]
    extract(model, text, tmp_path, per_batch=None)
    for handle in handles:
        handle.remove()
    assert f"Shard 2 is damaged or missing in {damaged.parent}" in capsys.readouterr().out
    assert {block: len(of_block) for block, of_block in calls.items()} == {1: 2, 2: 0}
    assert contents(tmp_path) == alone
    rewritten = {path for path, before in times.items() if path.stat().st_mtime_ns != before}
    assert {path.parent.name for path in rewritten} == {"layer-1"}
    assert {path.name[-9:] for path in rewritten} == {"00002.npy"}


def test_a_shard_that_is_damaged_in_several_layers_is_made_anew_in_each(
    model, text, tmp_path, alone
):
    extract(model, text, tmp_path)
    for layer, array in ((0, "activations"), (1, "norms"), (3, "tokens")):
        (tmp_path / f"layer-{layer}" / f"{array}-00002.npy").unlink()
    extract(model, text, tmp_path, per_batch=None)
    assert contents(tmp_path) == alone


def test_a_shard_that_no_memory_holds_in_its_batches_is_told(model, text, tmp_path, extract_some):
    extract_some(2 * 1 + 1, (0,))

    def run_out_of_memory(_module, inputs):
        if len(inputs[0]) > 3:
            torch.empty(2**60, dtype=torch.uint8)

    hook = model.blocks[0].register_forward_pre_hook(run_out_of_memory)
    with pytest.raises(InputError, match="shard 0 must be made anew in batches of 4 contexts"):
        extract(model, text, tmp_path, per_batch=2)
    hook.remove()


def test_the_stream_of_an_earlier_layer_is_not_changed_by_later_blocks(text):
    model = tiny_language_model()
    tokens = torch.randint(2, 300, (2, 8))
    expected = residual_at(model, tokens, 0).clone()

    def change(_module, inputs):
        inputs[0].add_(1.0)

    model.blocks[1].register_forward_pre_hook(change)
    early, late = residuals_at(model, tokens, (0, 3))
    assert torch.equal(early, expected) and not torch.equal(early, late)
