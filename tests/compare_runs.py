"""Whether two folders of runs hold the same results: a line a file, which says how it differs.

    python -m tests.compare_runs ONE OTHER

A run's folder is one that a script of this project wrote, at any depth; files are matched by their
path. Strings and whole numbers must be equal, other numbers to the tolerance in `RULES`. Pictures
must be there. The exit code is 1 if anything differs that is not in `INTENDED`.
"""

import dataclasses
import fnmatch
import io
import json
import math
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.compute
import pyarrow.parquet

# "FILE" or "FILE:KEY" → the reason why they differ. A key is a column, or the path in a JSON file,
# as "cross_entropy.kl"; both are patterns of fnmatch, whose * matches slashes and dots too.
INTENDED: dict[str, str] = {
    # Between d597169 and the change of utils/ into folders:
    "*:*context_likeness": "the sentence model is gone",
    "*explanations*:*likeness": "the sentence model is gone",
    "*summary.json:explanations.*likeness": "the sentence model is gone",
    "*browser/data/index.js:*scores": "one score less",
    "*settings.json:sentence_model": "retired",
    "*settings.json:weight_averaging": "retired",
    "*settings.json:n_described": "never was a setting",
    "*settings.json:bytes_per_feature": "never was a setting",
    "*settings.json:page": "never was a setting",
    "*settings.json:outputs": "never was a setting",
    "*training_log.csv:loss_*": "each term of the loss is logged",
    # Between that change and the checks of all that is read:
    "*.jsonl:*.check": "each line has its checksum",
}

# As above: what differs whenever the same command is given twice.
NEVER_THE_SAME = {
    "*:seconds": "a time",
    "*metrics.json:tokens_per_second": "a rate",
    "*metrics.json:peak_*": "memory",
    # A .keras file holds the time when it was saved.
    "*:*autoencoder_fingerprint": "of a .keras file",
    "*settings.json:autoencoder": "of a .keras file",
    "*settings.json:other_autoencoders": "of .keras files",
}
NO_RESULTS = (".lock*", ".checked.jsonl", ".checksums.jsonl", ".partial-*", "*.tfevents.*")
MARKS = ("settings.json", "generations.jsonl", "evidence.jsonl", "attribution.json")
N_SHOWN = 3  # differences of a file that are printed

# What a file holds: dictionaries by string, lists, arrays and plain values.
Content = dict | list | np.ndarray | str | float | int | bool | None


@dataclasses.dataclass(frozen=True)
class Rule:
    """How files of a kind are compared.

    Attributes:
        read: The content of a file; None where the bytes must be the same.
        tolerance: Largest relative difference of numbers that are not whole.
        least_share: Differences are relative to the larger of two numbers, but at least to this
            share of the largest number of their array or column: a value near zero is often the
            difference of large ones, whose rounding it has.
    """

    read: Callable[[Path], Content] | None
    tolerance: float = 0.0
    least_share: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Unequal:
    """A place where two files are not the same.

    Attributes:
        key: A column, or a path in a JSON file; empty for the file as a whole.
        how: In words.
        relative: Difference of numbers; infinite where it is no matter of rounding.
    """

    key: str
    how: str
    relative: float = math.inf


# ---------------------------------------------------------------------------------- reading files


def read_json(path: Path) -> Content:
    return json.loads(path.read_text("utf-8"))


def read_lines(path: Path) -> Content:
    """The records of a .jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def read_script(path: Path) -> Content:
    """The JSON in a browser's file of data, ``receive("name", JSON);``."""
    return json.loads("[" + path.read_text().strip().removeprefix("receive(").rstrip(";)") + "]")


def read_csv(path: Path) -> Content:
    """The columns of a table. A label may be "null" or "None", which is not missing there."""
    table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    return {name: _column(table[name]) for name in table}


def _column(values: pd.Series) -> Content:
    if values.dtype.kind in "iuf":
        return values.to_numpy()
    return values.astype(object).where(values.notna(), None).tolist()


def read_parquet(path: Path) -> Content:
    """The columns of a table; of lists, their lengths and all values."""
    table = pyarrow.parquet.read_table(path)
    columns: dict[str, Content] = {}
    for name in table.column_names:
        values = table[name].combine_chunks()
        if isinstance(values, pyarrow.ChunkedArray):
            values = pyarrow.concat_arrays(values.chunks)
        if pyarrow.types.is_list(values.type) or pyarrow.types.is_fixed_size_list(values.type):
            columns[f"{name}.lengths"] = _column(
                pyarrow.compute.list_value_length(values).to_pandas()
            )
            values = values.flatten()
        columns[name] = _column(values.to_pandas())
    return columns


def read_keras(path: Path) -> Content:
    """The arrays of a .keras file and the options of what it holds, without Keras."""
    with zipfile.ZipFile(path) as archive:
        described = json.loads(archive.read("config.json"))
        weights = io.BytesIO(archive.read("model.weights.h5"))
    arrays: dict[str, Content] = {}

    def keep(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = np.asarray(item)

    with h5py.File(weights) as file:
        file.visititems(keep)
    options = {name: value for name, value in described["config"].items() if name != "name"}
    return {"class_name": described["class_name"], "options": options, "arrays": arrays}


def read_nothing(path: Path) -> Content:
    """Of a picture: it is there."""
    return None


# The first pattern that fits a file's path.
RULES: dict[str, Rule] = {
    "*.npy": Rule(None),
    "*manifest*.json": Rule(None),
    "*settings.json": Rule(read_json),
    "*.keras": Rule(read_keras, 1e-6, least_share=1.0),
    "*training_log.csv": Rule(read_csv, 1e-5),
    "*metrics.json": Rule(read_json, 1e-5),
    "*.parquet": Rule(read_parquet, 1e-5),
    "*.csv": Rule(read_csv, 1e-4),
    "*.jsonl": Rule(read_lines, 1e-4),
    "*.json": Rule(read_json, 1e-4),
    # Rounded to three and four digits; the tables that they are from have all.
    "*browser/data/*.js": Rule(read_script, 1e-2),
    "*.png": Rule(read_nothing),
    "*": Rule(None),
}


# ------------------------------------------------------------------------------ comparing contents


def unequal(one: Content, other: Content, rule: Rule, key: str = "") -> Iterator[Unequal]:
    """Where two contents are not the same, to the last digit."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in dict.fromkeys([*one, *other]):
            below = f"{key}.{name}".lstrip(".")
            if name in one and name in other:
                yield from unequal(one[name], other[name], rule, below)
            else:
                yield Unequal(below, f"only in {'ONE' if name in one else 'OTHER'}")
    elif _is_array(one) and _is_array(other):
        yield from _unequal_arrays(_numbers(one), _numbers(other), rule, key)
    elif isinstance(one, list) and isinstance(other, list):
        yield from _unequal_lists(one, other, rule, key)
    elif isinstance(one, np.ndarray) or isinstance(other, np.ndarray) or one != other:
        yield Unequal(key, f"{_shown(one)} / {_shown(other)}")


def _unequal_lists(one: list, other: list, rule: Rule, key: str) -> Iterator[Unequal]:
    if len(one) != len(other):
        yield Unequal(key, f"{len(one)} / {len(other)} entries")
    elif any(isinstance(value, dict | list) for value in (*one, *other)):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from unequal(*pair, rule, f"{key}.{number}".lstrip("."))
    elif differing := [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]:
        first = differing[0]
        how = f"{_shown(one[first])} / {_shown(other[first])} at {first}"
        yield Unequal(key, f"{len(differing)} of {len(one)} entries: {how}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_array(value: Content) -> bool:
    """Whether it is numbers alone, of which some may be missing, but not all."""
    if isinstance(value, list):
        there = [one for one in value if one is not None]
        return bool(there) and all(map(_is_number, there))
    return isinstance(value, np.ndarray) or _is_number(value)


def _numbers(value: Content) -> np.ndarray:
    """An array, of whole numbers where all are and none is missing."""
    if isinstance(value, list) and None in value:
        value = [math.nan if one is None else one for one in value]
    return np.asarray(value)


def _unequal_arrays(one: np.ndarray, other: np.ndarray, rule: Rule, key: str) -> Iterator[Unequal]:
    if one.shape != other.shape:
        yield Unequal(key, f"shape {one.shape} / {other.shape}")
        return
    differs = (one != other) & ~((one != one) & (other != other))  # NaN is as NaN
    if not differs.any():
        return
    a, b = one[differs].astype(float), other[differs].astype(float)
    relative = np.full(a.shape, math.inf)
    if {one.dtype.kind, other.dtype.kind} & set("f"):
        both = np.abs(np.concatenate([one.ravel(), other.ravel()]).astype(float))
        largest = both[np.isfinite(both)].max(initial=0)
        size = np.maximum(np.maximum(np.abs(a), np.abs(b)), rule.least_share * largest)
        finite = np.isfinite(a) & np.isfinite(b)
        relative[finite] = np.abs(a - b)[finite] / size[finite]
    worst = int(relative.argmax())
    how = f"{a[worst]:.8g} / {b[worst]:.8g}"
    if one.size > 1:
        how = f"{differs.sum()} of {one.size} numbers, {how}"
    yield Unequal(key, how, float(relative[worst]))


def _shown(value: Content) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --------------------------------------------------------------------------------- comparing files


def reason(table: dict[str, str], path: str, key: str) -> str | None:
    """What a table as `INTENDED` says of a file's key, if anything."""
    for pattern, words in table.items():
        if any(fnmatch.fnmatchcase(name, pattern) for name in (path, f"{path}:{key}")):
            return words
    return None


def files_of(folder: Path) -> dict[str, Path]:
    """The files of all runs below a folder, by their path in it."""
    runs = {path.parent for mark in MARKS for path in folder.rglob(mark)}
    files = (path for path in folder.rglob("*") if path.is_file() and runs & set(path.parents))
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(files)
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in NO_RESULTS)
    }


def compare(path: str, one: Path | None, other: Path | None) -> tuple[bool, str]:
    """Whether a file is as it should be, and a line that says how it is.

    Args:
        path: In the folders.
        one, other: The file in each of them, None where it is not.
    """
    if one is None or other is None:
        return _judge(path, [Unequal("", f"only in {'OTHER' if one is None else 'ONE'}")], 0.0)
    if one.read_bytes() == other.read_bytes():
        return True, "same bytes"
    rule = next(rule for pattern, rule in RULES.items() if fnmatch.fnmatchcase(path, pattern))
    if rule.read is None:
        return _judge(path, [Unequal("", "other bytes")], rule.tolerance)
    if rule.read is read_nothing:
        return True, "in both"
    contents = rule.read(one), rule.read(other)
    return _judge(path, list(unequal(*contents, rule)), rule.tolerance)


def _judge(path: str, places: list[Unequal], tolerance: float) -> tuple[bool, str]:
    """The end of `compare`, from the places where a file is not the same."""
    places = [place for place in places if reason(NEVER_THE_SAME, path, place.key) is None]
    larger = [place for place in places if place.relative > tolerance]
    largest = max((p.relative for p in places if p.relative <= tolerance), default=0.0)
    reasons = {place: reason(INTENDED, path, place.key) for place in larger}
    wrong = [place for place, words in reasons.items() if words is None]
    lines = [f"differs: {_in_words(wrong)}"] if wrong else []
    if intended := {place: words for place, words in reasons.items() if words is not None}:
        lines.append(
            f"intended: {_in_words(list(intended))} ({'; '.join(dict.fromkeys(intended.values()))})"
        )
    equal = f"equal, largest relative difference {largest:.1e}" if largest else "equal"
    return not wrong, ". ".join(lines) or equal


def _in_words(places: list[Unequal]) -> str:
    """The places that differ most, in words."""
    places = sorted(places, key=lambda place: -place.relative)
    words = [
        " ".join(filter(None, [place.key, place.how]))
        + (f", relative {place.relative:.1e}" if math.isfinite(place.relative) else "")
        for place in places[:N_SHOWN]
    ]
    more = len(places) - N_SHOWN
    return "; ".join(words) + (f"; and {more} more" if more > 0 else "")


def main(one: Path, other: Path) -> int:
    """Print a line a file; returns the exit code."""
    files = files_of(one), files_of(other)
    paths = sorted({*files[0], *files[1]})
    if not paths:
        print(f"There is no run in {one} or {other}.")
        return 1
    n_wrong = 0
    for path in paths:
        is_right, words = compare(path, *(of.get(path) for of in files))
        n_wrong += not is_right
        print(f"{path}: {words}")
    print(f"{len(paths):,} files; {n_wrong:,} differ and are not in INTENDED.")
    return int(n_wrong > 0)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*map(Path, sys.argv[1:])))
