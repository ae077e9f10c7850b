"""A stage's folder: its data beside the settings that made it.

A file appears whole or not at all, a folder holds one run, and a run with other settings is refused
rather than mixed in.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from utils.settings import InputError, require

Json = Any  # plain JSON types
SETTINGS_FILE = "settings.json"
LOCK_FILE = ".lock"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; leaving the block puts that file in its place.

    The rename is atomic and follows an fsync, so that a reader sees the old file or the new one,
    never half of either, whenever the process is killed.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as readable JSON, atomically."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file of ours.

    Raises:
        InputError: The file is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error}). Delete {path.parent} and make it anew."
        ) from error


def append_record(log: Path, record: dict[str, Any]) -> None:
    """Add a line of JSON to a log, after ending the line that a killed process left torn."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    with log.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def records_of(log: Path, needed: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The records of a log that have all the ``needed`` fields; torn lines are passed over."""
    # Not splitlines(): JSON strings may hold characters that it takes for line ends.
    for line in log.read_text("utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, AttributeError):
            record = json.loads(line)
            if set(needed) <= record.keys():
                yield record


def fingerprint(*paths: Path) -> str:
    """A short digest of the bytes of some files, by which a later stage knows its input again."""
    digests = []
    for path in paths:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def make_folder(folder: str | Path, flag: str) -> Path:
    """A folder that can be written to, made if it is not there; ``flag`` is what names it.

    Raises:
        InputError: It cannot be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"Cannot write to {folder}: {error.strerror}. Choose another {flag}."
        ) from error
    return folder


def missing_stage(folder: Path, what: str, script: str) -> InputError:
    """The error for an input that is not there yet: names the script to run first."""
    return InputError(
        f"No {what} in {folder}. Run {script} first, or name the folder that has them."
    )


@contextlib.contextmanager
def open_stage(
    folder: str | Path,
    settings: dict[str, Any],
    outputs: tuple[str, ...],
    overwrite: bool = False,
    lock_name: str = LOCK_FILE,
) -> Iterator[Path]:
    """Hold a stage's output folder for one run.

    Args:
        folder: Where the stage writes; made if it is not there.
        settings: All that decides the content of the outputs, as plain JSON types.
        outputs: Patterns of the files and folders that the stage writes.
        overwrite: Delete the outputs of an earlier run with other settings. One with the same
            settings is gone on with, so that a command that was killed can be given again as it is.
        lock_name: Processes that share a run (ranks) hold locks of different names.

    Yields:
        The folder, which holds nothing, or an unfinished or finished run of the same settings.

    Raises:
        InputError: The folder cannot be written, is in use, or holds another run.
    """
    folder = Path(folder)
    with _hold(folder, lock_name):
        with FileLock(folder / f"{LOCK_FILE}-settings"):  # ranks take turns
            if overwrite:
                _refuse_other_holders(folder, lock_name)
            _claim(folder, settings, outputs, overwrite)
        yield folder


def _refuse_other_holders(folder: Path, lock_name: str) -> None:
    """Refuse to delete what another rank, whose lock has another name, is still writing."""
    for path in folder.glob(f"{LOCK_FILE}*"):
        if path.name not in (lock_name, f"{LOCK_FILE}-settings"):
            with _hold(folder, path.name):
                pass


def _claim(folder: Path, settings: dict, outputs: tuple[str, ...], overwrite: bool) -> None:
    """Record ``settings`` in a folder without outputs; compare them in one that has some."""
    recorded = folder / SETTINGS_FILE
    if overwrite and not _holds_run_of(recorded, settings):
        _remove_outputs(folder, (*outputs, SETTINGS_FILE))
    begun = _matching(folder, outputs)
    if recorded.exists():
        other = read_json(recorded).get("script")
        require(
            other == settings.get("script"),
            f"{folder} is the folder of {other}. Name another folder for {settings.get('script')}.",
        )
    require(
        not begun or recorded.exists(),
        f"{folder} holds {', '.join(path.name for path in begun[:3])} but no {SETTINGS_FILE}, "
        "so the run they belong to is unknown. Pass --overwrite to delete them, or name "
        "another folder.",
    )
    if begun:
        _refuse_other_settings(folder, read_json(recorded), settings)
    else:
        write_json(recorded, settings)


def _holds_run_of(recorded: Path, settings: dict) -> bool:
    try:
        return read_json(recorded) == settings
    except (InputError, FileNotFoundError):
        return False


@contextlib.contextmanager
def _hold(folder: Path, lock_name: str) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / lock_name, blocking=False)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"Another process is writing to {folder}. Wait until it ends.") from error
    except OSError as error:
        raise InputError(
            f"Cannot write to {folder}: {error.strerror}. Choose another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _refuse_other_settings(folder: Path, found: dict, wanted: dict) -> None:
    differing = [
        f"  {name.upper()}: {found.get(name)!r} there, {wanted.get(name)!r} now"
        for name in dict.fromkeys([*found, *wanted])
        if found.get(name) != wanted.get(name)
    ]
    require(
        not differing,
        f"{folder} holds a run with other settings:\n"
        + "\n".join(differing)
        + "\nPass --overwrite to delete that run, or name another folder for this one.",
    )


def _remove_outputs(folder: Path, outputs: tuple[str, ...]) -> None:
    for path in _matching(folder, outputs):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if any(fnmatch.fnmatch(path.name.removeprefix(".partial-"), p) for p in patterns)
    )


def require_disk_space(folder: Path, needed: int) -> None:
    """Refuse work whose outputs, ``needed`` bytes, do not fit on the disk that holds ``folder``."""
    free = shutil.disk_usage(folder).free
    require(
        needed < free,
        f"{folder} needs {needed / 1e9:,.1f} GB and its disk has {free / 1e9:,.1f} GB free. "
        "Choose a folder on a larger disk, or settings that need less.",
    )
