"""The shape of the code: folders in their order, sizes, and what must not be in it."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

from tests.structure import files_of, folder_of, imported, module_of

# A folder imports from those before it, and from the modules directly in utils/.
ORDER = ("utils", *(f"utils.{name}" for name in
         ("activations", "autoencoder", "steering", "features", "influence")))  # fmt: skip
MODULES = {
    module_of(path, ROOT): path
    for path in (ROOT / "utils").rglob("*.py")
    if path.stem != "__init__"
}
FILES = files_of(ROOT)


def imports(path: Path) -> set[str]:
    """The project's own modules that a file imports, inside functions too."""
    source = path.read_text()
    assert not re.search(r"^\s*from \.", source, re.MULTILINE), f"{path} imports relatively"
    whole = re.findall(r"^\s*import (utils[\w.]*|\w+)", source, re.MULTILINE)
    modules = {module for module, _ in imported(path, ROOT)} | set(whole)
    return modules & {*MODULES, *SCRIPTS}


def test_few_modules_lie_directly_in_utils():
    assert sum(folder_of(module, ROOT) == "utils" for module in MODULES) <= 8
    assert {folder_of(module, ROOT) for module in MODULES} == set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_imports_only_from_those_before_it(module):
    place = ORDER.index(folder_of(module, ROOT))
    assert {folder_of(other, ROOT) for other in imports(MODULES[module])} <= set(ORDER[: place + 1])


def test_no_modules_import_one_another_in_a_circle():
    waiting = {module: imports(path) for module, path in MODULES.items()}
    while waiting:
        free = [module for module, needed in waiting.items() if not needed & set(waiting)]
        assert free, f"in a circle: {sorted(waiting)}"
        for module in free:
            del waiting[module]


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_says_what_is_in_it(folder):
    """Its docstring names each of its modules; `studies` is a folder of its own."""
    path = ROOT / folder.replace(".", "/") / "__init__.py"
    words = ast.get_docstring(ast.parse(path.read_text()))
    names = [module.split(".")[-1] for module in MODULES if module.rpartition(".")[0] == folder]
    assert not [name for name in names if name not in words]


def test_imports_are_seen():
    seen = imports(MODULES["utils.autoencoder.kinds"])
    assert {"utils.autoencoder.autoencoder", "utils.settings", "utils.autoencoder.sparse"} <= seen
    assert "utils.autoencoder.training" in imports(ROOT / "train_autoencoder.py")  # inside main()


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_utils_but_not_each_other(name):
    modules = imports(ROOT / f"{name}.py")
    assert modules and not modules & set(SCRIPTS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_run_nothing_they_read(path):
    source = path.read_text()
    assert source.count("\n") <= 600
    assert not re.search(r"trust_remote_code\s*=\s*True", source)
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    assert not {call.id for call in calls if isinstance(call, ast.Name)} & {"exec", "eval"}
    assert not re.search(r"^\s*(import|from) pickle|allow_pickle=True", source, re.MULTILINE)
