"""CHECK: what it says of a sound folder, and that each kind of fault is found and named."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import LAYER, Flags, save_tiny_model

from utils.activations.shards import shard_path
from utils.artifacts import checksum, write_json


@pytest.fixture(scope="module")
def flags(run_here, tiny_model, tiny_text, tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("saved")
    flags = [*Flags(folder, tiny_model, tiny_text).save_activations, "--n-tokens", 4_096]
    run_here("save_activations", *flags)
    return flags


@pytest.fixture
def folder(flags, tmp_path) -> Path:
    """A copy of the saved folder, which a test may spoil."""
    return shutil.copytree(flags[flags.index("--activations-dir") + 1], tmp_path / "activations")


@pytest.fixture
def check(run_here, folder):
    """Check a folder by its own settings alone."""

    def run(*flags: object):
        return run_here(
            "save_activations", "--check", "--activations-dir", folder, *flags, check=False
        )

    return run


def rewrite(folder: Path, array: str, change) -> None:
    """Change an array of the first shard, and its checksum with it."""
    path = shard_path(folder, array, 0)
    values = np.load(path)
    change(values)
    np.save(path, values)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["crc32"][array] = checksum(path)
    write_json(folder / "manifest.json", manifest)


def test_a_sound_folder(check, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    ended = check()
    assert ended.returncode == 0, ended.message
    for words in (
        f"Checking {folder}",
        "Files: 4 shards, every file as its checksum says.",
        r"Counts: 3,\d{3} kept positions, as in the manifest, of norms from [\d.]+ to [\d.]+\.",
        r"Tokens: all are the model's; the first say '(\w+ )+",
        "Text: 12 contexts of 3 shards are those of the dataset.",
        r"Activations: 3\d\d rows of 3 shards computed again, 100.0% of them the same to the bit",
    ):
        assert re.search(words, ended.stdout), words
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_layers_and_int8(run_here, flags, tmp_path):
    places = ["--activations-dir", tmp_path / "layers"]
    few = [*flags, "--n-tokens", 1_024, "--storage-dtype", "int8", "--layer", 0, 2, *places]
    run_here("save_activations", *few)
    printed = run_here("save_activations", "--check", *places).stdout
    assert printed.count("100.0% of them the same to the bit") == 2
    assert printed.index("layer-0") < printed.index("layer-2")


def add_one(values: np.ndarray) -> None:
    values[0, 3] += 1


def set_zero(values: np.ndarray) -> None:
    values[1, 4] = 0


def other_token(values: np.ndarray) -> None:
    values[2, 5] += 1 if values[2, 5] < 300 else -1


def too_large(values: np.ndarray) -> None:
    values[3, 6] = 10_000


def shuffle(values: np.ndarray) -> None:
    values[:] = values[::-1].copy()


@pytest.mark.parametrize(
    ("array", "change", "rule"),
    [
        ("norms", set_zero, "Shard 0 in .* has norms that are not positive numbers"),
        ("tokens", too_large, "Shard 0 in .* has tokens that are not among the model's"),
        ("tokens", other_token, "Shard 0 in .* has another text in its context 2 than .*jsonl has"),
        ("documents", add_one, "Shard 0 in .* has another text in its context 0 than .*jsonl has"),
        (
            "activations",
            shuffle,
            "Shard 0 in .* holds other activations than .* after block 1: the",
        ),
    ],
)
def test_what_a_checksum_does_not_tell(check, folder, array, change, rule):
    rewrite(folder, array, change)
    ended = check()
    assert ended.returncode == 1 and re.search(rule, ended.message), ended.message
    assert "put back the model and the dataset it was made from, or delete" in ended.message


def test_a_damaged_file_and_a_wrong_count(check, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][2]["kept"] += 1
    write_json(folder / "manifest.json", manifest)
    assert re.search(r"Shard 2 in .* has \d+ counted positions, and \d+ in", check().message)
    path = folder / "documents-00003.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert f"{path} does not match its checksum. To repair it, run" in check().message


def test_other_models_and_lost_text(check, folder, tmp_path):
    settings = json.loads((folder / "settings.json").read_text())
    write_json(folder / "settings.json", settings | {"dataset": str(tmp_path / "gone.jsonl")})
    printed = check().stdout
    assert "The text is not there: There is no file or folder" in printed
    assert "Text: not compared." in printed and "the same to the bit" in printed
    manifest = json.loads((folder / "manifest.json").read_text())
    other = save_tiny_model(tmp_path / "other", seed=1)
    write_json(folder / "manifest.json", manifest | {"model_name": str(other)})
    assert "holds other activations than" in check().message
    write_json(folder / "manifest.json", manifest | {"layer": LAYER + 1})
    assert f"after block {LAYER + 1}: the median row is" in check().message
    (folder / "manifest.json").unlink()
    assert "No activations in" in check().message
