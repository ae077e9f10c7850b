"""Settings: the constants in capitals at the top of a script, each of them also a flag.

``N_LATENTS = 65_536  # size of the dictionary`` in a script becomes ``--n-latents INT`` with that
default and that help text. Nothing is executed and nothing is declared twice: the names, values and
annotations come from the imported script, the comments from its source.
"""

import ast
import dataclasses
import io
import math
import os
import sys
import tokenize
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import tyro
from dotenv import load_dotenv


class InputError(ValueError):
    """A mistake of the user's: printed as one message, without a traceback."""


def read_settings(script: types.ModuleType, arguments: list[str] | None = None) -> Any:
    """Build the settings of a script from its constants and the command line.

    Args:
        script: The script's module; every module-level constant in capitals with a comment at the
            end of its line is a setting. One whose value does not show its type (``None``, a
            tuple) carries an annotation.
        arguments: Command-line words, without the program's name; the process's own by default.

    Returns:
        A frozen dataclass, one field a constant, in lower case. A wrong flag or a value of another
        type ends the process with status 2 and a message that names the nearest flag or the rule.
    """
    source = Path(script.__file__).read_text(encoding="utf-8")
    comments = trailing_comments(source)
    annotations = typing.get_type_hints(script)
    fields = []
    for name in comments:
        value = getattr(script, name)
        kind = annotations.get(name, type(value))
        described = Annotated[kind, tyro.conf.arg(help=comments[name])]
        fields.append((name.lower(), described, dataclasses.field(default=value)))
    settings = dataclasses.make_dataclass("Settings", fields, frozen=True)
    return tyro.cli(
        settings,
        args=arguments,
        prog=Path(script.__file__).name,
        description=script.__doc__,
    )


def trailing_comments(source: str) -> dict[str, str]:
    """Map each module-level constant in capitals to the comment at the end of its line.

    Constants without such a comment are the script's own affair, not settings.
    """
    lines = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] = token.string.lstrip("# ").strip()
    comments = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            is_constant = isinstance(target, ast.Name) and target.id.isupper()
            if is_constant and node.end_lineno in lines:
                comments[target.id] = lines[node.end_lineno]
    return comments


def as_dict(settings: Any, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings as plain JSON types (tuples become lists), without those in ``leave_out``."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(settings).items()
        if name not in leave_out
    }


def require(condition: bool, message: str) -> None:
    """Raise `InputError` with ``message`` (rule, value, remedy) unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def require_positive(settings: Any, *names: str) -> None:
    """Refuse settings among ``names`` that are not greater than zero (``None`` means off)."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise InputError(f"{name.upper()} must be greater than 0; it is {value}.")
        if value == math.inf:
            raise InputError(f"{name.upper()} must be a finite number; it is {value}.")


def hub_token() -> str | None:
    """The Hugging Face token from the environment or ``.env``; never printed or saved."""
    load_dotenv(Path.cwd() / ".env")
    return os.environ.get("HF_TOKEN") or None


def run(main: typing.Callable[[], None]) -> None:
    """Run a script's ``main``; a user's mistake or Ctrl-C ends it in one clear message."""
    try:
        main()
    except InputError as error:
        sys.exit(f"\n{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. Run the same command again to go on from here.")
