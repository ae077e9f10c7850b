"""Files of text: which of a folder are read, and the records in them.

Types are ``.jsonl`` and ``.ndjson`` (a record a line), ``.json`` (a record, a list of them, or
lines), ``.parquet``, ``.arrow``, ``.csv``, ``.tsv`` and ``.txt`` (a document), each also ``.gz`` or
``.zst``, in small or capital letters.
"""

import codecs
import contextlib
import csv
import io
import itertools
import json
import os
import re
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import zstandard

from utils.settings import InputError, Json, require

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TYPES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".txt", *DELIMITERS)
TABLES = (".parquet", ".arrow", *DELIMITERS)
BESIDES = (".arrow", *DELIMITERS)  # made of other files, or about them, if there are any
OF_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
CHUNK = 1 << 18  # bytes read at once
Record = Json | Exception  # a record, or the error that reading it raised
DECOMPRESSORS = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(),
}
ABOUT = re.compile(r"(readme|licen[cs]es?|copying|notice|changelog)(?![a-z0-9])", re.IGNORECASE)
BESIDE_OTHERS = "tables beside other files"  # the reason why these are not read
LONGEST_FIELD = 2**28  # characters of a field in a .csv; more are of a quote that is not closed
TOGETHER = 256  # rows of a table that are taken at once
N_NAMED = 3  # files whose names are shown
UTF_8 = codecs.getincrementaldecoder("utf-8")
ARROW_FILE = b"ARROW1"  # what a file begins with that is no stream
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # what a text file in it begins with

# ------------------------------------------------------------------------------------- choosing


def type_of(path: Path) -> str | None:
    """The type of a file, such as ``.jsonl``, without its compression; None if it is not known."""
    compressed = path.suffix.lower() in DECOMPRESSORS
    suffix = (path.with_suffix("") if compressed else path).suffix.lower()
    return suffix if suffix in TYPES else None


def stem_of(path: Path) -> str:
    """The name of a file without its type and compression."""
    compressed = path.suffix.lower() in DECOMPRESSORS
    return path.name.removesuffix(path.suffix if compressed else "").rsplit(".", 1)[0]


def list_files(
    path: Path, files: list[Path] | None = None
) -> tuple[list[Path], dict[str, list[Path]]]:
    """The files to read, in sorted order, and all others of a folder, by the reason why not.

    Args:
        files: What is in the folder, where it is not on this machine.

    Raises:
        InputError: There is none to read, or a folder cannot be listed.
    """
    chosen, passed_over = [], defaultdict(list)
    for file in _all_files(path) if files is None else files:
        reason = None if file == path and type_of(file) else _reason_against(file, path)
        (passed_over[reason] if reason else chosen).append(file)
    types = ", ".join(TYPES)
    others = "".join(f"\n{line}" for line in listing(path, passed_over, "There are"))
    require(
        bool(chosen),
        f"{path} must be or hold a file of a known type: {types}, each also .gz or .zst.{others}",
    )
    return chosen, dict(passed_over)


def _all_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be listed: {error.strerror}.") from error

    walk = os.walk(path, onerror=refuse)
    # A link to a folder is not entered, since it may lead back; as a "file" it is named.
    return sorted(
        Path(folder, name)
        for folder, folders, files in walk
        for name in [*files, *(one for one in folders if Path(folder, one).is_symlink())]
    )


def _reason_against(file: Path, root: Path) -> str | None:
    """Why a file below a folder is not read, or None."""
    if any(part.startswith(".") for part in file.relative_to(root).parts):
        return "hidden"
    if type_of(file) is None:
        return "of another type"
    if type_of(file) == ".arrow" and file.name.startswith("cache-"):
        return "caches of datasets"
    if not file.is_file():
        return "a link that leads to no file"
    if type_of(file) == ".txt" and ABOUT.match(file.name):
        return "READMEs or licences"
    return None


def without_tables(files: list[Path]) -> tuple[list[Path], dict[str, list[Path]]]:
    """The files to read of a split, and those `BESIDES` them by the reason why they are not."""
    tables = [file for file in files if type_of(file) in BESIDES]
    others = [file for file in files if type_of(file) not in BESIDES]
    if not tables:
        return others, {}
    if all(file.name in OF_DATASETS for file in others):
        return tables, {"about a dataset": others} if others else {}
    return others, {BESIDE_OTHERS: tables}


def listing(root: Path, files: dict[str, list[Path]], verb: str) -> list[str]:
    """A line for each kind of files: their number, and the names of the first."""
    lines = []
    for kind, paths in files.items():
        names = [relative_name(path, root) for path in paths[:N_NAMED]]
        rest = ", …" if len(paths) > N_NAMED else ""
        lines.append(f"{verb} {len(paths):,} {kind}: {', '.join(names)}{rest}")
    return lines


def relative_name(path: Path, root: Path) -> str:
    """The path of a file within a folder, or its name."""
    return path.name if path == root else path.relative_to(root).as_posix()


# -------------------------------------------------------------------------------------- reading


def parse(text: bytes) -> Record:
    """The value of JSON text, or the error that reading it raises."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return error


def read_chunks(path: Path, start: int = 0) -> Iterator[bytes]:
    """The content of a file from byte ``start`` on, decompressed if it is a ``.gz`` or ``.zst``.

    These may be several, one after the other. Unlike their modules' stream readers, it raises an
    error for a truncated file.
    """
    decompressor, frame = DECOMPRESSORS.get(path.suffix.lower()), None
    try:
        with path.open("rb") as file:
            file.seek(0 if decompressor else start)
            while chunk := file.read(CHUNK):
                if decompressor is None:
                    yield chunk
                    continue
                while chunk:
                    if frame is None or frame.eof:
                        chunk = chunk.lstrip(b"\0")  # gzip files may be padded, no frame begins so
                        if not chunk:
                            break
                        frame = decompressor()
                    content = frame.decompress(chunk)
                    if len(content) > start:
                        yield content[start:]
                    start = max(0, start - len(content))
                    chunk = frame.unused_data
    except (zstandard.ZstdError, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}). Fetch it again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if frame is not None and not frame.eof:
        raise InputError(f"{path} ends in the middle of its data. Fetch it again.")


def read_lines(path: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, from byte ``start`` on, and where each begins."""
    parts = []  # of a line that is longer than a chunk
    for chunk in read_chunks(path, start):
        parts.append(chunk)
        if b"\n" in chunk:
            *lines, rest = b"".join(parts).split(b"\n")
            parts = [rest]
            for line in lines:
                if line.strip():
                    yield start, line
                start += len(line) + 1
    rest = b"".join(parts)
    if rest.strip():
        yield start, rest


def read_jsonl(path: Path, start: int = 0) -> Iterator[tuple[int, Record]]:
    """A value or an error for each line of a file from byte ``start`` on, and where it begins."""
    return ((offset, parse(line)) for offset, line in read_lines(path, start))


def read_json(path: Path, start: int = 0) -> Iterator[tuple[int, Record]]:
    """The records of a file that is one record, a list of them, or has one a line.

    Those of a list are counted, from ``start`` on; lines are as in `read_jsonl`.
    """
    _, line = next(read_lines(path), (0, b"[]"))
    first = parse(line)
    # What begins with a whole record goes on with others, and may be too long for the memory.
    whole = first if isinstance(first, dict) else parse(b"".join(read_chunks(path)))
    if isinstance(whole, list):
        yield from itertools.islice(enumerate(whole), start, None)
    elif whole is first or isinstance(whole, Exception):
        yield from read_jsonl(path, start)
    else:
        yield 0, whole


def read_table(path: Path, start: int = 0, column: str = "text") -> Iterator[tuple[int, dict]]:
    """The rows of a ``.parquet`` or ``.arrow`` file from ``start`` on, and their numbers.

    Rows hold ``column`` and, if present, ``meta``.
    """
    batches = _parquet_batches if type_of(path) == ".parquet" else _arrow_batches
    try:
        with _open_whole(path) as file:
            for number, batch in batches(path, file, start, column):
                if number + len(batch) > start:
                    rows = batch.slice(max(0, start - number)).to_pylist()
                    yield from enumerate(rows, max(number, start))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}). Fetch it again.") from error


def _columns(path: Path, names: list[str], column: str) -> list[str]:
    """Which columns of a table are read."""
    require(
        column in names,
        f"{path} must have a column {column}; it has {', '.join(names)}. Choose one with "
        "TEXT_COLUMN.",
    )
    require(names.count(column) == 1, f"{path} must have one column {column}; it has several.")
    return [name for name in dict.fromkeys((column, "meta")) if name in names]


Batches = Iterator[tuple[int, pyarrow.RecordBatch]]  # each with the number of its first row


def _parquet_batches(path: Path, file: BinaryIO, start: int, column: str) -> Batches:
    with pyarrow.parquet.ParquetFile(file) as table:
        columns = _columns(path, table.schema_arrow.names, column)
        number = 0
        for group in range(table.num_row_groups):
            n_rows = table.metadata.row_group(group).num_rows
            if number + n_rows <= start:
                number += n_rows
                continue
            for batch in table.iter_batches(TOGETHER, [group], columns):
                yield number, batch
                number += len(batch)


def _arrow_batches(path: Path, file: BinaryIO, start: int, column: str) -> Batches:
    is_file = file.read(len(ARROW_FILE)) == ARROW_FILE  # else a stream, which `datasets` writes
    file.seek(0)
    if is_file:
        table = pyarrow.ipc.open_file(file)
        batches = map(table.get_batch, range(table.num_record_batches))
    else:
        batches = table = pyarrow.ipc.open_stream(file)
    columns, number = _columns(path, table.schema.names, column), 0
    for batch in batches:
        for first in range(0, len(batch), TOGETHER):
            yield number + first, batch.select(columns).slice(first, TOGETHER)
        number += len(batch)


@contextlib.contextmanager
def _open_whole(path: Path) -> Iterator[BinaryIO]:
    """The file, decompressed to a temporary one if need be: its reader seeks in it."""
    if path.suffix.lower() not in DECOMPRESSORS:
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        for chunk in read_chunks(path):
            file.write(chunk)
        file.seek(0)
        yield file


def read_csv(path: Path, start: int = 0, column: str = "text") -> Iterator[tuple[int, dict]]:
    """The rows of a ``.csv`` or ``.tsv`` file, whose first names the columns, and their numbers.

    Those from ``start`` on; all before are read too, for a row may hold line breaks. Bytes that are
    not UTF-8 become halves of surrogate pairs, which no text has: only their rows are not used.
    """
    csv.field_size_limit(LONGEST_FIELD)
    chunks = io.BufferedReader(_Chunks(path), CHUNK)
    with io.TextIOWrapper(chunks, "utf-8-sig", "surrogateescape", newline="") as text:
        rows = csv.DictReader(text, delimiter=DELIMITERS[type_of(path)])
        try:
            columns = _columns(path, list(rows.fieldnames or ()), column)
            for number, row in enumerate(rows):
                if number >= start:
                    yield number, {name: row[name] for name in columns}
        except csv.Error as error:
            raise InputError(
                f"{path} has a row that cannot be read ({error}), which ends at line "
                f"{rows.line_num:,}. Look for a quotation mark that is not closed."
            ) from error


class _Chunks(io.RawIOBase):
    """The content of a file, decompressed, as a stream of bytes."""

    def __init__(self, path: Path):
        self._chunks, self._rest = read_chunks(path), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        self._rest = self._rest or next(self._chunks, b"")
        n_bytes = min(len(buffer), len(self._rest))
        buffer[:n_bytes], self._rest = self._rest[:n_bytes], self._rest[n_bytes:]
        return n_bytes


def read_txt(
    path: Path, start: int = 0, separator: str | None = None
) -> Iterator[tuple[int, Iterator[str]]]:
    """The documents of a text file from byte ``start`` on: where each begins, and its parts.

    The file is one document, or several with ``separator`` between them. Parts are read when they
    are asked for, and cannot be any more once the next document is.
    """
    parts = _read_parts(path, start, separator)
    for offset, group in itertools.groupby(parts, lambda part: part[0]):
        yield offset, (text for _, text in group)


def _read_parts(path: Path, start: int, separator: str | None) -> Iterator[tuple[int, str]]:
    """The parts of a text file's documents, and where the document of each begins."""
    mark = separator.encode() if separator else None
    document = at = start  # where a document begins, and `rest`
    decoder, rest = UTF_8(), b""
    try:
        for chunk in read_chunks(path, start):
            if at == 0 and chunk.startswith(codecs.BOM_UTF8):
                document = at = len(codecs.BOM_UTF8)
                chunk = chunk[at:]
            *ended, rest = (rest + chunk).split(mark) if mark else (rest + chunk,)
            for content in ended:
                yield document, decoder.decode(content, final=True)
                document = at = at + len(content) + len(mark)
                decoder.reset()
            content = (
                rest[: max(0, len(rest) - len(mark) + 1)] if mark else rest
            )  # a mark may have begun
            yield document, decoder.decode(content)
            at, rest = at + len(content), rest[len(content) :]
        yield document, decoder.decode(rest, final=True)
    except UnicodeDecodeError as error:
        encoding = "utf-16" if at == 0 and error.object.startswith(UTF_16) else "latin-1"
        remedy = f"Convert it, for example: iconv -f {encoding} -t utf-8 {path} > utf-8.txt"
        byte = at - len(decoder.getstate()[0]) + error.start
        raise InputError(f"{path} must be UTF-8; byte {byte} is not. {remedy}") from error


def read_records(
    path: Path, column: str, start: int = 0, separator: str | None = None
) -> Iterator[tuple[int, Record]]:
    """The records of a file, whose text is in ``column``, and the offset of each.

    An offset is what ``start`` must be to read from there on: of a table and of a list in a
    ``.json`` the number of records before, of all others that of bytes. The text of a ``.txt`` is
    an iterator (see `read_txt`).
    """
    kind = type_of(path)
    if kind == ".txt":
        return ((at, {column: parts}) for at, parts in read_txt(path, start, separator))
    if kind in (".parquet", ".arrow"):
        return read_table(path, start, column)
    if kind in DELIMITERS:
        return read_csv(path, start, column)
    return (read_json if kind == ".json" else read_jsonl)(path, start)
