"""The shape of the code: layers, sizes, and what must not be in it."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

MODULES = {path.stem: path for path in (ROOT / "utils").glob("*.py") if path.stem != "__init__"}
FILES = [*MODULES.values(), *(ROOT / f"{name}.py" for name in SCRIPTS)]


def map_of_utils() -> list[str]:
    """The modules in the order of the README's map."""
    section = (ROOT / "README.md").read_text().split("## The map of utils/")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def imports(path: Path) -> set[str]:
    """The project's own modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = {name.split(".")[1] for name in found if re.match(r"utils\.\w", name)}
    return (own & set(MODULES)) | (found & set(SCRIPTS))


def test_the_readme_maps_every_module_once():
    assert sorted(map_of_utils()) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_those_above_it(name):
    order = map_of_utils()
    assert imports(MODULES[name]) <= set(order[: order.index(name)])


def test_imports_are_seen():
    assert {"autoencoder", "settings", "sparse"} <= imports(MODULES["kinds"])
    assert "training" in imports(ROOT / "train_autoencoder.py")  # inside main()


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_utils_but_not_each_other(name):
    found = imports(ROOT / f"{name}.py")
    assert found and not found & set(SCRIPTS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_are_short_and_run_nothing_they_read(path):
    source = path.read_text()
    assert source.count("\n") <= 420
    assert not re.search(r"trust_remote_code\s*=\s*True", source)
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    assert not {call.id for call in calls if isinstance(call, ast.Name)} & {"exec", "eval"}
    assert not re.search(r"^\s*(import|from) pickle|allow_pickle=True", source, re.MULTILINE)
