"""Settings: the constants in capitals at the top of a script, each of them also a flag.

``N_LATENTS = 65_536  # size of the dictionary`` in a script becomes ``--n-latents INT`` with that
default and that help text. Settings stand under headings, ``# --- name``; the heading
``# --- not settings`` ends them. Names, values and annotations come from the imported script, the
comments from its source.
"""

import ast
import dataclasses
import errno
import io
import math
import os
import re
import shutil
import sys
import time
import tokenize
import types
import typing
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
from dotenv import load_dotenv

from utils.terminal import in_bytes

Json = Any  # a value of JSON
HEADING, END = "# --- ", "# --- not settings"
# The system's errors of a file that cannot be written, with their remedies.
FULL = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room within your quota",
    errno.EFBIG: "Allow larger files (see ulimit -f), or choose another disk",
}
FORBIDDEN = dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM), "Choose another folder, or make this one writable"
)
REFUSALS = FULL | FORBIDDEN


STARTED = time.monotonic()  # about when the process began
TO_GO_ON = 75  # status of a script that MAX_HOURS stopped: the same command goes on


class InputError(ValueError):
    """An error of the user's: printed as one message, without a traceback."""


class TimeIsUp(Exception):
    """A script stops for MAX_HOURS, with all that is done saved; the message says what that is."""


class TimeLimit:
    """Stops a script in time, between two parts of its work: ``max_hours`` after it began.

    The first part is always allowed, so that a script that is run again and again ends.
    """

    def __init__(self, max_hours: float | None):
        self.end = math.inf if max_hours is None else STARTED + 3_600 * max_hours
        self._longest, self._latest = 0.0, None

    def allows_another(self) -> bool:
        """Whether there is time for a part like the longest so far; to be asked before each."""
        now, latest = time.monotonic(), self._latest
        self._latest = now
        if latest is None:
            return True
        self._longest = max(self._longest, now - latest)
        return now + self._longest <= self.end

    def is_over(self) -> bool:
        """Whether the time has come; to be asked while waiting."""
        return time.monotonic() >= self.end

    def leave_out(self, seconds: float) -> None:
        """Count a wait of so many seconds as no part of the work."""
        if self._latest is not None:
            self._latest += seconds


@dataclasses.dataclass(frozen=True)
class Settings:
    """A script's settings, as attributes in lower case; ``script`` is its file name."""

    script: ClassVar[str]


def read_settings(script: types.ModuleType, arguments: list[str] | None = None) -> Settings:
    """The settings of a script, from its constants (see `settings_block`) and the command line.

    A wrong flag or value ends the process with status 2 and a message that names the nearest flag
    or the rule.

    Args:
        script: The script's module. A constant needs an annotation if its value does not show its
            type (``None``, a tuple).
        arguments: Those of the command line; by default the process's.

    Raises:
        InputError: A constant has no comment, or its annotation does not allow its value.
    """
    path = Path(script.__file__)
    annotations = typing.get_type_hints(script)
    fields = []
    for name, comment in settings_block(path.read_text("utf-8")).items():
        value = getattr(script, name)
        kind = annotations.get(name, type(value))
        require(_allows(kind, value), f"{name} must be {_in_words(kind)}; it is {value!r}.")
        described = Annotated[kind, tyro.conf.arg(help=comment)]
        fields.append((name.lower(), described, dataclasses.field(default=value)))
    settings = dataclasses.make_dataclass(
        "Settings", fields, bases=(Settings,), namespace={"script": path.name}, frozen=True
    )
    return tyro.cli(settings, args=arguments, prog=path.name, description=script.__doc__)


def settings_block(source: str) -> dict[str, str]:
    """Each constant in capitals between a script's first heading and `END`, with its comment.

    The comment is the last one at the end of a line of the constant; `InputError` if it has none.
    """
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    headings = [line for line, comment in comments.items() if comment.startswith(HEADING)]
    begin = min(headings, default=math.inf)
    end = min((line for line in headings if comments[line] == END), default=math.inf)
    described = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            is_constant = isinstance(target, ast.Name) and target.id.isupper()
            if is_constant and begin < node.lineno < end:
                lines = range(node.lineno, node.end_lineno + 1)
                texts = [comments[line] for line in lines if line in comments]
                require(
                    bool(texts),
                    f"{target.id} must have a comment at the end of its line, which --help shows. "
                    f"Add one, or move {target.id} below the line `{END}`.",
                )
                described[target.id] = texts[-1].lstrip("# ").strip()
    return described


def _allows(kind: type, value: object) -> bool:
    """Whether a setting's annotation allows a value; tyro checks only flags."""
    kinds = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return value in kinds
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_allows(kinds[0], each) for each in value)
    if kinds:  # a union
        return any(_allows(each, value) for each in kinds)
    return isinstance(value, (int, float) if kind is float else kind)


def _in_words(kind: type) -> str:
    """A setting's annotation in words, such as "one of linear, cosine" or "float or None"."""
    kinds = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, kinds))}"
    if typing.get_origin(kind) is tuple:
        return f"a tuple, each {_in_words(kinds[0])}"
    if kinds:
        return " or ".join(map(_in_words, kinds))
    return "None" if kind is types.NoneType else kind.__name__


def as_dict(settings: Settings, leave_out: tuple[str, ...] = ()) -> dict[str, Json]:
    """The settings as JSON types (tuples become lists), except ``leave_out``."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(settings).items()
        if name not in leave_out
    }


def as_recorded(settings: Settings, recorded: dict[str, Json]) -> Settings:
    """Settings as a run recorded them; those it did not record are at their defaults."""
    names = {field.name for field in dataclasses.fields(settings)}
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in recorded.items()
        if name in names
    }
    return type(settings)(**values)


def require(condition: bool, message: str) -> None:
    """Raise `InputError` with ``message`` (rule, value, remedy) unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def require_positive(settings: Settings, *names: str) -> None:
    """Refuse settings among ``names`` that are neither ``None`` nor finite and greater than 0."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise InputError(f"{name.upper()} must be greater than 0; it is {value}.")
        if value == math.inf:
            raise InputError(f"{name.upper()} must be a finite number; it is {value}.")


def require_unicode(settings: Settings, *names: str) -> None:
    """Refuse texts among the settings ``names`` that the command line gave in another encoding."""
    for name in names:
        value = getattr(settings, name)
        for text in value if isinstance(value, tuple) else (value,):
            try:
                str(text).encode()
            except UnicodeEncodeError:
                raise InputError(
                    f"{name.upper()} must be UTF-8; {text!r} is not. Convert it, for example: "
                    "iconv -f latin-1 -t utf-8."
                ) from None


def hub_token() -> str | None:
    """The Hugging Face token from the environment or ``.env``; never printed or saved."""
    load_dotenv(Path.cwd() / ".env")
    return os.environ.get("HF_TOKEN") or None


def disk_error(error: Exception) -> OSError | None:
    """The refusal to write a file that an error tells of, whatever library it is from, or None.

    ``errno`` is one of `REFUSALS`; ``filename`` is None where the error does not name the file.
    """
    number = getattr(error, "errno", None)
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if numbered := re.search(r"\(os error (\d+)\)", str(error)):  # as safetensors says it
        number = int(numbered[1])
    elif re.search(r"\d+ requested and \d+ written", str(error)):  # as NumPy says it
        number = errno.ENOSPC
    is_of_file = name or number not in FORBIDDEN  # else of a socket or a process
    return OSError(number, os.strerror(number), name) if number in REFUSALS and is_of_file else None


def refusal_in_words(error: OSError) -> str:
    """A `disk_error`: the file, what is wrong, how much is free, and the remedy."""
    path = Path(error.filename or "a file").absolute()
    reason = error.strerror
    if error.errno in FULL:
        reason += f" ({in_bytes(shutil.disk_usage(path.parent).free)} free)"
    return (
        f"Cannot write {path.name.removeprefix('.partial-')} in {path.parent}: {reason}. What was "
        f"saved before stays. {REFUSALS[error.errno]}, and run the same command again to go on."
    )


def run(main: typing.Callable[[], None]) -> None:
    """Run a script's ``main``; a user's error, a full disk or Ctrl-C ends it with one message.

    So does `TimeIsUp`, with the status `TO_GO_ON`.
    """
    script = Path(sys.argv[0]).name
    try:
        main()
    except InputError as error:
        sys.exit("\n".join([f"\n{script}: {error}", *getattr(error, "__notes__", ())]))
    except TimeIsUp as reached:
        print(f"\nStopped for MAX_HOURS: {reached} Run the same command again to go on from here.")
        sys.exit(TO_GO_ON)
    except KeyboardInterrupt:
        sys.exit("\nStopped. Run the same command again to go on from here.")
    except Exception as error:
        refusal = disk_error(error)
        if refusal is None:
            raise
        sys.exit(f"\n{script}: {refusal_in_words(refusal)}")
