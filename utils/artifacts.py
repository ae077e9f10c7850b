"""A stage's folder: its output files, and the settings that they were made with.

Files are written atomically and with their checksums, a folder holds one run, and a run with other
settings is refused.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from utils.settings import InputError, Json, Settings, as_dict, disk_error, require
from utils.terminal import in_bytes

if TYPE_CHECKING:
    import pandas as pd

SETTINGS_FILE = "settings.json"
AUTOENCODER_FILE, METRICS_FILE = "autoencoder.keras", "metrics.json"  # of a finished training
BACKUP_FILE, LOG_FILE = "backup.keras", "training_log.csv"
LOCK_FILE = ".lock"
CHOSEN_FILE = "chosen.json"  # settings left to the machine, as the run chose them when it began
CHECKSUMS_FILE = ".checksums.jsonl"  # of the files in its folder, a line each time one is written
CHECKED = (".json", ".parquet", ".csv", ".keras", ".npz")  # files that later stages read

# Settings that earlier versions recorded and a script no longer has, with their defaults.
RETIRED: dict[str, dict[str, Json]] = {
    "train_autoencoder.py": {"weight_averaging": None},
    "analyze_features.py": {
        "sentence_model": None,
        "n_described": 5,
        "bytes_per_feature": 20_000,
        "page": "browser/index.html",
        "outputs": [
            "*.parquet", "*.csv", "pass.json", "study-*.json", "summary.json", "vocabulary.json",
            "*.png", "browser",
        ],
    },
}  # fmt: skip

# Settings that earlier versions did not have, with what they did, where that is not the default.
ADDED: dict[str, dict[str, Json]] = {
    "train_autoencoder.py": {"n_held_out_tokens": None, "pool_gib": 0.5}
}


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """Everything that a run's outputs depend on: script, settings, and fingerprints of its inputs.

    ``defaults`` holds the settings' default values. The outputs do not depend on the settings in
    ``left_out``, which an earlier version may have recorded.
    """

    content: dict[str, Json]
    defaults: dict[str, Json] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Settings, leave_out: tuple[str, ...], **facts: Json) -> "RunRecord":
        """The record of a script's run, without the settings in ``leave_out``."""
        recorded = {"script": settings.script, **as_dict(settings, leave_out), **facts}
        return cls(recorded, as_dict(type(settings)(), leave_out), leave_out)

    def differences(self, earlier: dict[str, Json]) -> list[str]:
        """A line for each difference from the content that an earlier run recorded.

        A setting that one of the two versions does not have counts as its default, and one of
        `ADDED` also as what earlier versions did.
        """
        script = self.content.get("script")
        retired, added = RETIRED.get(script, {}), ADDED.get(script, {})
        there, here = retired | self.defaults | added | earlier, retired | self.content
        lines = []
        for name in dict.fromkeys([*earlier, *self.content]):
            if name in self.left_out:
                continue
            is_added = name in added and name not in earlier
            if is_added and here[name] == self.defaults.get(name):
                continue
            if there.get(name) != here.get(name):
                is_retired = name in retired and name not in self.content
                now = "which this version lacks" if is_retired else f"{here.get(name)!r} now"
                lines.append(f"  {name.upper()}: {there.get(name)!r} there, {now}")
        return lines


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc32 = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            crc32 = zlib.crc32(block, crc32)
    return crc32


@contextlib.contextmanager
def replacing(path: Path, is_whole: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to; leaving the block renames that file to ``path``.

    The rename is atomic and follows an fsync, so that a reader sees the old file or the new one,
    whole, whenever the process is killed. Its checksum is recorded before, for `reading`, if it
    ``is_whole``: nothing will be appended to it.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        with writing(path):
            yield partial
            _sync(partial)
            if is_whole and path.suffix in CHECKED:
                log = path.with_name(CHECKSUMS_FILE)
                append_record(log, {"file": path.name, "crc32": checksum(partial)})
                _sync(log)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """While open, an error of the disk that names no file is raised as one that names ``path``."""
    try:
        yield
    except Exception as error:
        cause = disk_error(error)
        if cause is None or cause.filename:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@functools.lru_cache
def _checksum_of(path: Path, _size: int, _modified_ns: int) -> int:
    return checksum(path)


def _recorded_checksums(path: Path) -> set[int]:
    recorded = read_log(path.with_name(CHECKSUMS_FILE), ("file", "crc32"))
    return {record["crc32"] for record in recorded if record["file"] == path.name}


@contextlib.contextmanager
def reading(path: Path, remedy: str | None = None) -> Iterator[Path]:
    """Compare a file with its checksum, if there is one; while open, ``path`` is read.

    Whatever was once recorded for the file counts: a kill may have kept it from being replaced.

    Raises:
        InputError: It is missing, does not match, or reading it fails; names the remedy.
    """
    remedy = remedy or f"Delete {path.parent} and make it anew."
    try:
        state = path.stat()
        if path.with_name(CHECKSUMS_FILE).exists():
            crc32 = _checksum_of(path, state.st_size, state.st_mtime_ns)
            checksums = _recorded_checksums(path)  # last, for another process may replace the file
            if checksums and crc32 not in checksums:
                raise ValueError(f"it does not match its checksum in {CHECKSUMS_FILE}")
        yield path
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing. {remedy}") from error
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}). {remedy}") from error


def write_json(path: Path, content: Json) -> None:
    """Write ``content`` as readable JSON, atomically."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def write_csv(path: Path, table: "pd.DataFrame") -> None:
    """Write a table, without its index, atomically."""
    with replacing(path) as partial:
        table.to_csv(partial, index=False)


def read_json(path: Path, remedy: str | None = None) -> Json:
    """Read a JSON file; raises `InputError` as `reading` does."""
    with reading(path, remedy):
        return json.loads(path.read_text("utf-8"))


def append_record(log: Path, record: dict[str, Json]) -> None:
    """Add a line of JSON to a log, after ending a line that a killed process left incomplete.

    The last field of a line, ``check``, is the CRC-32 of the others.
    """
    line = json.dumps({**record, "check": _check(record)}, ensure_ascii=False) + "\n"
    with writing(log), log.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def _check(record: dict[str, Json]) -> int:
    return zlib.crc32(json.dumps(record).encode())


def read_log(log: Path, needed: Iterable[str]) -> Iterator[dict[str, Json]]:
    """The records of a log that have all the ``needed`` fields; damaged lines are skipped."""
    # Not splitlines(), which also splits at characters that JSON strings may hold.
    for line in log.read_text("utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            record = json.loads(line)
            check = record.pop("check", None)  # earlier versions wrote none
            if set(needed) <= record.keys() and check in (None, _check(record)):
                yield record


def fingerprint(*paths: Path) -> str:
    """A short digest of the bytes of files, by which a later stage recognises its input."""
    digests = []
    for path in paths:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def chosen_once(folder: Path, name: str, choose: Callable[[], Json]) -> Json:
    """What a run chooses where a setting leaves it to the machine, and keeps when it goes on."""
    chosen = choices(folder)
    if name not in chosen:
        chosen[name] = choose()
        write_json(folder / CHOSEN_FILE, chosen)
    return chosen[name]


def choices(folder: Path) -> dict[str, Json]:
    """What a run has chosen so far, by `chosen_once`."""
    path = folder / CHOSEN_FILE
    return read_json(path, "Delete it to choose anew.") if path.exists() else {}


def make_folder(folder: str | Path, flag: str) -> Path:
    """Create a folder unless it exists; raises `InputError` if it cannot be written to."""
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


def missing_stage(folder: Path, content: str, script: str) -> InputError:
    """The error for an input that does not exist yet; it names the script to run first."""
    return InputError(
        f"No {content} in {folder}. Run {script} first, or name the folder that has them."
    )


@contextlib.contextmanager
def open_stage(
    folder: str | Path,
    record: RunRecord,
    outputs: tuple[str, ...],
    overwrite: bool = False,
    lock_name: str = LOCK_FILE,
) -> Iterator[Path]:
    """Lock a stage's output folder for one run, and yield it: empty or with that run's outputs.

    Args:
        record: A folder that holds a run with another record is refused.
        outputs: Patterns of the files and folders that the stage writes.
        overwrite: Delete the outputs of an earlier run with other settings. A run with the same
            settings continues, so that a killed command can be repeated unchanged.
        lock_name: Processes that share a run (ranks) hold locks of different names.

    Raises:
        InputError: The folder cannot be written, is in use, or holds another run.
    """
    folder = Path(folder)
    with _hold(folder, lock_name):
        with FileLock(folder / f"{LOCK_FILE}-settings"):  # ranks take turns
            if overwrite and not _holds_run_of(folder / SETTINGS_FILE, record):
                _refuse_other_holders(folder, lock_name)
                _remove_outputs(folder, (*outputs, SETTINGS_FILE, CHECKSUMS_FILE))
            _claim(folder, record, outputs)
        yield folder


def _refuse_other_holders(folder: Path, lock_name: str) -> None:
    """Refuse to delete outputs while another process, whose lock has another name, uses them."""
    for path in folder.glob(f"{LOCK_FILE}*"):
        if path.name not in (lock_name, f"{LOCK_FILE}-settings"):
            with _hold(folder, path.name):
                pass


def _claim(folder: Path, record: RunRecord, outputs: tuple[str, ...]) -> None:
    """Write ``record`` to a folder without outputs, or compare it with that of an earlier run."""
    recorded = folder / SETTINGS_FILE
    begun = _matching(folder, outputs)
    if recorded.exists():
        other, script = read_json(recorded).get("script"), record.content.get("script")
        require(
            other == script, f"{folder} is the folder of {other}. Name another folder for {script}."
        )
    require(
        not begun or recorded.exists(),
        f"{folder} holds {', '.join(path.name for path in begun[:3])} but no {SETTINGS_FILE}, "
        "so the run they belong to is unknown. Pass --overwrite to delete them, or name "
        "another folder.",
    )
    if begun:
        differing = "\n".join(record.differences(read_json(recorded)))
        require(
            not differing,
            f"{folder} holds a run with other settings:\n{differing}\n"
            "Pass --overwrite to delete that run, or name another folder for this one.",
        )
    else:
        (folder / CHOSEN_FILE).unlink(missing_ok=True)  # nothing was made by it
        write_json(recorded, record.content)


def _holds_run_of(recorded: Path, record: RunRecord) -> bool:
    try:
        return not record.differences(read_json(recorded))
    except InputError:
        return False


@contextlib.contextmanager
def _hold(folder: Path, lock_name: str) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / lock_name, blocking=False)
        lock.acquire()
    except Timeout as error:
        is_shared = lock_name != LOCK_FILE
        remedy = " To share its work, give this one a RANK of its own." if is_shared else ""
        raise InputError(
            f"Another process is writing to {folder}. Wait until it ends.{remedy}"
        ) from error
    except OSError as error:
        raise InputError(
            f"Cannot write to {folder}: {error.strerror}. Choose another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


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


def require_disk_space(folder: Path, needed: int, outputs: tuple[str, ...] = ()) -> None:
    """Refuse to write ``needed`` bytes to a folder whose disk has less free space.

    What there is of ``outputs``, patterns as for `open_stage`, needs no more.
    """
    own = [file for path in _matching(folder, outputs) for file in (path, *path.rglob("*"))]
    there = sum(file.stat().st_size for file in own if file.is_file())
    free = shutil.disk_usage(folder).free
    require(
        needed - there < free,
        f"{folder} needs {in_bytes(needed - there)} and its disk has {in_bytes(free)} free. "
        "Choose a folder on a larger disk, or settings that need less.",
    )
