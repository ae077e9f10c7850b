"""Folders of runs compared: differences of every sort are planted, and must be told."""

import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from tests import compare_runs

FILES = {
    "activations/settings.json": {"script": "save_activations.py", "layer": 1},
    "activations/manifest.json": {"sum": [1.0, 2.0]},
    "activations/activations-00000.npy": np.arange(6, dtype=np.float16),
    "autoencoder/settings.json": {"k": 4, "learning_rate": 1e-3},
    "autoencoder/metrics.json": {"fvu": 0.25, "seconds": 3.0, "peak_memory_gb": 0.5},
    "autoencoder/training_log.csv": {"step": [20, 40], "loss": [2.0, 1.0], "seconds": [0.1, 0.2]},
    "autoencoder/autoencoder.keras": {"k": 4, "W_dec": np.array([128.0, 2**-10], np.float32)},
    "autoencoder/training_curves.png": b"a picture",
    "run/analysis/settings.json": {"seed": 0, "autoencoder": "ab", "other_autoencoders": ["cd"]},
    "run/analysis/summary.json": {"words": ["L0 4.0"], "cross_entropy": {"kl": 0.5}, "n": 7},
    "run/analysis/features.parquet": {
        "feature": [0, 1, 2],
        "frequency": [0.25, 0.5, 1e-9],
        "label": ["rose", "null", None],
        "neighbours": [[1, 2], [0], None],
    },
    "run/analysis/fidelity.csv": {"subset": ["all", "null"], "kl": [0.5, 0.25]},
    "run/analysis/browser/index.html": b"<html></html>",
    "run/analysis/browser/data/index.js": ["index", {"label": ["a;)"], "umap_x": [1.234, None]}],
    "run/influence/generations.jsonl": [
        {"request": {"strength": 2.0, "autoencoder_fingerprint": "ab"}, "steered": "one\u2028two"}
    ],
}


def keras_file(content: dict) -> bytes:
    weights, archive = io.BytesIO(), io.BytesIO()
    with h5py.File(weights, "w") as file:
        file["layers/vars/0"] = content["W_dec"]
    config = {"class_name": "TopK", "config": {"name": content.get("name"), "k": content["k"]}}
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(zipfile.ZipInfo("config.json"), json.dumps(config))
        file.writestr(zipfile.ZipInfo("model.weights.h5"), weights.getvalue())
    return archive.getvalue()


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in content))
    elif path.suffix == ".csv":
        pd.DataFrame(content).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(content).to_parquet(path, index=False)
    elif path.suffix == ".js":
        path.write_text(f"receive({json.dumps(content)[1:-1]});\n")
    else:
        path.write_bytes(keras_file(content) if path.suffix == ".keras" else content)


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """Two folders of the same runs."""
    for path, content in FILES.items():
        write(tmp_path / "one" / path, content)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    return tmp_path / "one", tmp_path / "other"


@pytest.fixture
def compared(runs, capsys) -> Callable:
    """Compare the folders; returns the exit code and what is said of each file."""

    def compare() -> tuple[int, dict[str, str]]:
        code = compare_runs.main(*runs)
        *lines, last = capsys.readouterr().out.splitlines()
        assert re.fullmatch(rf"{len(lines)} files; \d+ differ and are not in INTENDED.", last)
        return code, dict(line.split(": ", 1) for line in lines)

    return compare


def test_the_same_runs(compared):
    assert compared() == (0, dict.fromkeys(sorted(FILES), "same bytes"))


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        ("activations/manifest.json", {"sum": [1.0, 2.0000001]}, "other bytes"),
        ("activations/activations-00000.npy", np.zeros(6, np.float16), "other bytes"),
        ("autoencoder/settings.json", {"learning_rate": 1.0000001e-3},
         "learning_rate 0.001 / 0.0010000001, relative 1.0e-07"),
        ("autoencoder/settings.json", {"held_out": 0.05}, "held_out only in OTHER"),
        ("autoencoder/metrics.json", {"fvu": 0.25001}, "fvu 0.25 / 0.25001, relative 4.0e-05"),
        ("autoencoder/metrics.json", {"fvu": float("nan")}, "fvu 0.25 / nan"),
        ("autoencoder/training_log.csv", {"loss": [2.0, 1.001]},
         "loss 1 of 2 numbers, 1 / 1.001, relative 1.0e-03"),
        ("autoencoder/autoencoder.keras", {"W_dec": np.array([128, 2**-9], np.float32)},
         "arrays.layers/vars/0 1 of 2 numbers, 0.0009765625 / 0.001953125, relative 7.6e-06"),
        ("autoencoder/autoencoder.keras", {"W_dec": np.zeros((2, 1), np.float32)},
         "arrays.layers/vars/0 shape (2,) / (2, 1)"),
        ("autoencoder/autoencoder.keras", {"k": 5}, "options.k 4 / 5"),
        ("run/analysis/summary.json", {"words": ["L0 4.1"]},
         "words 1 of 1 entries: 'L0 4.0' / 'L0 4.1' at 0"),
        ("run/analysis/summary.json", {"cross_entropy": {"kl": 0.501}}, "cross_entropy.kl 0.5"),
        ("run/analysis/summary.json", {"cross_entropy": None}, "cross_entropy {'kl': 0.5} / None"),
        ("run/analysis/summary.json", {"n": 8}, "n 7 / 8"),
        ("run/analysis/features.parquet", {"feature": [0, 1, 3]}, "feature 1 of 3 numbers, 2 / 3"),
        ("run/analysis/features.parquet", {"frequency": [0.25, 0.50001, 1e-9]}, "frequency 1 of"),
        ("run/analysis/features.parquet", {"label": ["rose", None, None]},
         "label 1 of 3 entries: 'null' / None at 1"),
        ("run/analysis/features.parquet", {"label": [1.5, 2.5, 3.5]}, "label ['rose', 'null', Non"),
        ("run/analysis/features.parquet", {"neighbours": [[1, 2], [1], None]},
         "neighbours 1 of 3 numbers, 0 / 1"),
        ("run/analysis/features.parquet", {"neighbours": [[1], [2, 0], None]},
         "neighbours.lengths 2 of 3 numbers, 2 / 1"),
        ("run/analysis/features.parquet", {"dead": [True, False, False]}, "dead only in OTHER"),
        ("run/analysis/fidelity.csv", {"subset": ["all", "none"]},
         "subset 1 of 2 entries: 'null' / 'none' at 1"),
        ("run/analysis/fidelity.csv", {"kl": [0.5, 0.2501]}, "kl 1 of 2 numbers, 0.25 / 0.2501"),
        ("run/analysis/browser/index.html", b"<html/>", "other bytes"),
        ("run/analysis/browser/data/index.js", ["index", {"label": ["b"], "umap_x": [1.234, None]}],
         "1.label 1 of 1 entries: 'a;)' / 'b' at 0"),
        ("run/analysis/browser/data/index.js", ["index", {"label": ["a;)"], "umap_x": [1.3, None]}],
         "1.umap_x 1 of 2 numbers, 1.234 / 1.3"),
        ("run/influence/generations.jsonl", [{"request": {"strength": 2.0}, "steered": "three"}],
         "0.steered 'one\\u2028two' / 'three'"),
        ("run/influence/generations.jsonl", [], "1 / 0 entries"),
    ],
)  # fmt: skip
def test_what_differs(runs, compared, path, change, words):
    write(runs[1] / path, FILES[path] | change if isinstance(change, dict) else change)
    code, said = compared()
    assert code == 1 and said.pop(path).startswith(f"differs: {words}")
    assert set(said.values()) == {"same bytes"}


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        ("autoencoder/metrics.json", {"fvu": 0.250001}, "equal, largest relative difference 4.0e-"),
        ("autoencoder/metrics.json", {"seconds": 9.0, "peak_memory_gb": 9.0}, "equal"),
        ("autoencoder/training_log.csv", {"seconds": [1.0, 2.0]}, "equal"),
        ("autoencoder/autoencoder.keras", {"W_dec": np.array([128, 2**-10 + 2**-14], np.float32)},
         "equal, largest relative difference 4.8e-07"),
        ("autoencoder/autoencoder.keras", {"name": "topk_1"}, "equal"),
        ("autoencoder/training_curves.png", b"another", "in both"),
        ("run/analysis/settings.json", {"autoencoder": "x", "other_autoencoders": ["y"]}, "equal"),
        ("run/analysis/features.parquet", {"frequency": [0.25, 0.5, 2e-9]}, "equal, largest rel"),
        ("run/analysis/summary.json", {"cross_entropy": {"kl": 0.50001}}, "equal, largest relat"),
        ("run/analysis/browser/data/index.js",
         ["index", {"label": ["a;)"], "umap_x": [1.235, None]}], "equal, largest relative diff"),
    ],
)  # fmt: skip
def test_what_does_not(runs, compared, path, change, words):
    write(runs[1] / path, FILES[path] | change if isinstance(change, dict) else change)
    code, said = compared()
    assert code == 0 and said.pop(path).startswith(words)
    assert set(said.values()) == {"same bytes"}


def test_files_in_one_folder_alone(runs, compared):
    (runs[0] / "run" / "analysis" / "fidelity.csv").unlink()
    (runs[1] / "autoencoder" / "training_curves.png").unlink()
    code, said = compared()
    assert code == 1
    assert said["run/analysis/fidelity.csv"] == "differs: only in OTHER"
    assert said["autoencoder/training_curves.png"] == "differs: only in ONE"


def test_what_is_no_result_is_passed_over(runs, compared):
    (runs[0] / "log.txt").write_text("of the user's")
    (runs[0] / "autoencoder" / ".lock").touch()
    (runs[0] / "autoencoder" / ".checked.jsonl").write_text("{}")
    assert compared() == (0, dict.fromkeys(sorted(FILES), "same bytes"))


def test_what_is_intended(runs, compared, monkeypatch):
    path = "run/analysis/features.parquet"
    table = FILES[path] | {"label": ["a", "b", "c"], "dead": [True] * 3}
    write(runs[1] / path, table)
    write(runs[1] / "run/analysis/browser/index.html", b"<html/>")
    (runs[1] / "run/analysis/fidelity.csv").unlink()
    intended = {
        "*features.parquet:label": "labels are letters",
        "*/index.html": "a new page",
        "*fidelity.csv": "no longer written",
    }
    monkeypatch.setattr(compare_runs, "INTENDED", intended)
    code, said = compared()
    assert code == 1 and said[path].startswith("differs: dead only in OTHER. intended: label 3 of")
    assert said[path].endswith("(labels are letters)")
    assert said["run/analysis/browser/index.html"] == "intended: other bytes (a new page)"
    assert said["run/analysis/fidelity.csv"] == "intended: only in ONE (no longer written)"
    intended["*:dead"] = "a new column"
    code, said = compared()
    assert code == 0 and said[path].endswith("(labels are letters; a new column)")


def test_no_run_at_all(tmp_path, capsys):
    assert compare_runs.main(tmp_path, tmp_path) == 1
    assert "There is no run in" in capsys.readouterr().out
