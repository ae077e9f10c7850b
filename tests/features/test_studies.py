"""The registry of studies: one more is a file and a line."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, environment

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
