"""How large the code is, and how much of it one has to know: counts, for a checkout.

    python -m tests.structure [CHECKOUT]

Counts of the four scripts and utils/. A border is that of a folder; where all modules lie in one
folder (as they did), each module is one.
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG_FUNCTION, MANY_PARAMETERS, LONG_FILE = 60, 6, 600


def files_of(checkout: Path) -> list[Path]:
    """The scripts and the modules below utils/."""
    return sorted([*checkout.glob("*.py"), *(checkout / "utils").rglob("*.py")])


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def parameters_of(function: ast.FunctionDef) -> list[ast.arg]:
    """All parameters of a function but self and cls."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [one for one in every if one is not None and one.arg not in ("self", "cls")]


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether it is a kernel of Triton's, which takes each tensor and number by itself."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def mentions_any(annotation: ast.AST | None) -> bool:
    """Whether an annotation has a bare ``Any``."""
    if annotation is None:
        return False
    return any(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(annotation))


def folder_of(module: str, checkout: Path) -> str:
    """utils, or the folder of it that a dotted module is in; the module itself in a flat utils/."""
    if not any((checkout / "utils").glob("*/__init__.py")):
        return module
    return ".".join(module.split(".")[:2]) if module.count(".") > 1 else "utils"


def imported(path: Path, checkout: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of all that a file imports from utils, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        for alias in node.names:
            dotted = f"{node.module}.{alias.name}"
            if (checkout / (dotted.replace(".", "/") + ".py")).exists():
                yield dotted, ""  # a module as a whole
            elif node.module.startswith("utils"):
                yield node.module, alias.name


def module_of(path: Path, checkout: Path) -> str:
    return ".".join(path.relative_to(checkout).with_suffix("").parts)


def across_borders(checkout: Path) -> list[tuple[str, str, str]]:
    """(importing module, module, name) of what a module of utils takes from another folder."""
    found = []
    for path in (checkout / "utils").rglob("*.py"):
        own = module_of(path, checkout)
        here = folder_of(own, checkout)
        found += [
            (own, module, name)
            for module, name in imported(path, checkout)
            if folder_of(module, checkout) != here
        ]
    return found


def counts(checkout: Path) -> dict[str, int]:
    """Sizes, and what crosses borders, by name."""
    trees = {path: ast.parse(path.read_text()) for path in files_of(checkout)}
    functions = [function for tree in trees.values() for function in functions_of(tree)]
    lines = {path: path.read_text().count("\n") for path in trees}
    crossing = across_borders(checkout)
    signatures = [
        mentions_any(annotation)
        for function in functions
        for annotation in [*(p.annotation for p in parameters_of(function)), function.returns]
    ]
    top = [path for path in (checkout / "utils").glob("*.py") if path.stem != "__init__"]
    return {
        "modules directly in utils/": len(top),
        "modules of utils/": sum(p.parent != checkout and p.stem != "__init__" for p in trees),
        "names imported across a border": len(crossing),
        "different ones": len({(module, name) for _, module, name in crossing}),
        f"functions of more than {MANY_PARAMETERS} parameters": sum(
            len(parameters_of(function)) > MANY_PARAMETERS and not is_kernel(function)
            for function in functions
        ),
        f"functions of more than {LONG_FUNCTION} lines": sum(
            function.end_lineno - function.lineno + 1 > LONG_FUNCTION for function in functions
        ),
        f"files of more than {LONG_FILE} lines": sum(n > LONG_FILE for n in lines.values()),
        "lines of scripts and utils": sum(lines.values()),
        "Any in signatures": sum(signatures),
    }


if __name__ == "__main__":
    print(json.dumps(counts(Path(sys.argv[1]) if sys.argv[1:] else ROOT), indent=1))
