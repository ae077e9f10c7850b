"""The registry of studies, one more is a file and a line; studies added, left out, and crashed."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import ROOT, environment
from full_disk import small_disk

from utils.artifacts import read_json
from utils.features import studies

STUDY = '''
"""Lengths: how long are the texts of a feature's label? n = characters."""

from utils.features.analysis import Analysis, Findings
from utils.features.catalogue import Catalogue
from utils import plots


def study(analysis: Analysis) -> Findings:
    lengths = analysis.features["label"].map(len)
    tables, columns = {"lengths": lengths.to_frame()}, {"label_length": lengths.to_numpy(float)}
    return Findings({"mean": float(lengths.mean())}, "Labels are short.", tables, columns)


def draw(catalogue: Catalogue) -> dict:
    path = catalogue.folder / "lengths.png"
    with plots.picture(path, "Lengths", (6, 4)) as (_, axes):
        axes.hist(catalogue.table("lengths")["label"])
    return {"How long are labels?": path}
'''


@pytest.mark.parametrize("name", [*studies.ALWAYS, *studies.NAMES])
def test_a_study_tells_measures_and_draws(name):
    module = studies.load(name)
    assert module.__doc__ and callable(module.study) and callable(module.draw)
    assert re.search(rf"^{name} ", studies.__doc__, re.MULTILINE)


def test_the_readme_asks_what_the_registry_asks():
    """Its table of studies, in their order, has the words of the registry."""
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [re.fullmatch(r"\| `(\w+)` \| (.*\?) \|", line) for line in lines]
    asked = {row[1]: row[2] for row in rows if row}
    assert list(asked) == list(studies.NAMES)
    assert all(question in studies.__doc__ for question in asked.values())


def test_a_study_is_added_by_a_file_and_a_line(tiny_run, tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "utils", tmp_path / "utils")
    registry = tmp_path / "utils" / "features" / "studies"
    (registry / "lengths.py").write_text(STUDY)
    lines = (registry / "__init__.py").read_text()
    (registry / "__init__.py").write_text(
        lines.replace("CHOICES = {", 'CHOICES = {\n    "lengths": (),')
    )

    def run(*flags: object) -> str:
        words = [sys.executable, "analyze_features.py", *map(str, flags)]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "lengths" in run("--help")
    folder = tmp_path / "analysis"
    flags = [*tiny_run.flags.analyze_features, "--analysis-dir", folder, "--studies", "lengths"]
    assert "Labels are short." in run(*flags)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["lengths"]["mean"] > 0 and "specificity" not in summary
    page = (folder / "browser" / "data" / "index.js").read_text()
    assert "How long are labels?" in page and '"label_length":[' in page
    assert (folder / "browser" / "pictures" / "lengths.png").exists()


# ------------------------------------------------------------------- each with its own settings


@pytest.mark.parametrize("name", studies.SETTINGS)
def test_a_study_is_kept_with_the_settings_that_it_reads(name):
    """Besides those of the pass, which another value makes another analysis."""
    through = {"judge": "judge", "all_sizes": "other_autoencoders"}  # attributes of an `Analysis`
    read = set()
    for node in ast.walk(ast.parse(Path(studies.load(name).__file__).read_text())):
        if isinstance(node, ast.Attribute):
            of_settings = ast.unparse(node.value).endswith("settings")
            read.add(node.attr if of_settings else through.get(node.attr))
    assert read - {None, "seed", "batch_size", "n_tokens"} == set(studies.SETTINGS[name])


@pytest.fixture
def analysed(tiny_run, tmp_path) -> SimpleNamespace:
    """A copy of the tiny run's analysis, ``folder``, and the flags for it."""
    folder = tmp_path / "analysis"
    shutil.copytree(tiny_run.folder / "analysis", folder)
    flags = [*tiny_run.flags.analyze_features, "--analysis-dir", folder]
    return SimpleNamespace(folder=folder, flags=flags)


def kept_in(folder: Path) -> dict[str, bytes]:
    """What is kept of the pass and of the studies."""
    names = ("pass.*", "study-*", "examples.parquet", "vocabulary.json")
    return {path.name: path.read_bytes() for name in names for path in folder.glob(name)}


def test_studies_are_left_out_and_added_again(analysed, run_here):
    """And what is shown of them is made again where a full disk ended it."""
    folder, before = analysed.folder, kept_in(analysed.folder)
    fewer, summary = [*analysed.flags, "--studies", "outputs"], read_json(folder / "summary.json")
    with small_disk(folder / "browser", 102_400, 20_000) as make_room:
        message = run_here("analyze_features", *fewer, check=False).message
        assert re.search(r"Cannot write \S+ in .* free\)\. What was saved before stays", message)
        make_room()
        printed = run_here("analyze_features", *fewer).stdout
        assert "STUDIES leaves it out: specificity, completeness, neurons, explanations" in printed
        left = read_json(folder / "summary.json")
        assert {"specificity", "neurons"} <= set(summary) - set(left) and "outputs" in left
        assert "explanation" not in pd.read_parquet(folder / "features.parquet")
        pictures = {path.name for path in folder.glob("*.png")}
        assert pictures == {path.name for path in folder.glob("browser/pictures/*")}
        assert "outputs.png" in pictures and "specificity.png" not in pictures
        assert "specificity.png" not in (folder / "browser" / "data" / "index.js").read_text()
        assert "is finished" in run_here("analyze_features", *fewer).stdout
        run_here("analyze_features", *analysed.flags)
        assert read_json(folder / "summary.json") == summary
        assert "specificity.png" in (folder / "browser" / "data" / "index.js").read_text()
    assert kept_in(folder) == before


def test_a_study_that_crashes_leaves_the_others_whole(analysed, run_here, monkeypatch):
    folder, before = analysed.folder, kept_in(analysed.folder)
    flags = [*analysed.flags, "--n-studied", 20, "--studies", "specificity"]
    message = run_here("analyze_features", *flags, "neurons", check=False).message
    assert (
        "holds specificity, neurons with other settings:\n  N_STUDIED: 1000 there, 20 now\n"
        in message
    )
    assert kept_in(folder) == before

    def crash(_analysis):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(studies.load("neurons"), "study", crash)
        with pytest.raises(ZeroDivisionError) as error:
            run_here("analyze_features", *flags, "neurons", "--overwrite")
    assert "or leave neurons out of STUDIES" in error.value.__notes__[0]
    after = kept_in(folder)
    assert set(before) - set(after) == {"study-neurons.json"}
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"study-specificity.json", "study-specificity.parquet"}
    settings = json.loads(after["study-specificity.json"])["settings"]
    assert settings == {"n_studied": 20, "judge": None}
    assert not (folder / "browser" / "index.html").exists()  # of other findings

    run_here("analyze_features", *flags)  # without it
    assert kept_in(folder) == after
    assert "neurons" not in read_json(folder / "summary.json")
    run_here("analyze_features", *flags, "neurons")
    assert read_json(folder / "summary.json")["neurons"]["n_features"] <= 20
    assert {name: kept_in(folder)[name] for name in after if "neurons" not in name} == {
        name: content for name, content in after.items() if "neurons" not in name
    }
