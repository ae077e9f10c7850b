"""The corpus: its documents, in a fixed order, from any place on.

A corpus is the embedded text, a local file or folder (see `files`), or a streamed dataset of the
Hugging Face Hub. Its records are those of the Pile,
``{"text": ..., "meta": {"pile_set_name": ...}}``; only ``text`` is required.
"""

import dataclasses
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from utils import embedded
from utils.activations import splits
from utils.activations.files import (
    Record,
    list_files,
    listing,
    read_records,
    relative_name,
    stem_of,
    type_of,
)
from utils.language_model import look_for_hub
from utils.settings import InputError, Json, hub_token, require

LONGEST = 2**18  # characters of a document that are read, and tokenised, in one
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<eos>")
N_TOLD = 100  # times that a .txt spells one of them, from where on it is said


class Place(NamedTuple):
    """Where to go on reading local files, so that nothing before is read again."""

    file: int = 0  # index in the corpus' files
    offset: int = 0  # of a record, see `files.read_records`
    byte: int = 0  # of the record's text, in UTF-8
    token: int = 0  # tokens of the document before that byte, its BOS included
    document: int = 0  # `Document.index` of the record
    skipped: dict[str, int] | None = None  # `Corpus.skipped` up to the record


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, its index among the usable documents of the corpus, and its subset.

    A long text is several of the same index, of which the last ``ends`` it.
    """

    index: int
    text: str
    subset: str
    place: Place | None = None  # where the text begins, in local files
    ends: bool = True


class Position(NamedTuple):
    """A place in a rank's stream of tokens."""

    document: int  # counted among the rank's documents
    token: int  # tokens of that document already used, its BOS included
    place: Place | None = None  # there or just before; None: a hub's, or an earlier version's


BEGINNING = Position(0, 0)


class Corpus:
    """The documents of ``"embedded"``, a local file or folder, or a hub dataset, in a fixed order.

    The subset of a document is the record's ``meta.pile_set_name``; without one, the folder within
    the dataset's that holds the file, or the name of the dataset.

    Attributes:
        skipped: Number, by reason, of the records of the latest pass that cannot be used; for local
            files, those of all ranks.
        subset_a_file: Each file is a subset where records name none, as in earlier versions.

    Args:
        dataset: The name of a hub dataset may go on with a configuration, ``allenai/c4/en``.
        config: Of the dataset's configurations; None for the default or only one.
        split: Of its splits.
        column: The field of its records that holds the text.
        separator: The text between the documents of a ``.txt``; None if each is one.

    Raises:
        InputError: The dataset cannot be read.
    """

    def __init__(
        self,
        dataset: str,
        config: str | None = None,
        split: str = "train",
        column: str = "text",
        separator: str | None = None,
    ):
        self.name, self.config, self.split, self.column = dataset, config, split, column
        self.separator = separator
        self.skipped: Counter[str] = Counter()
        self.subset_a_file = self._told_subset = False
        self.root = embedded.pile_folder() if dataset == "embedded" else Path(dataset).expanduser()
        self.files: list[Path] = []  # none for a hub dataset
        self.names_without_folder = False
        if dataset and os.path.exists(self.root):  # False for a name too long for a path
            self._choose_files()
            return
        is_name = re.fullmatch(r"(\w[\w.-]*(?:/[\w.-]+)?)(?:/([\w.-]+))?", dataset)
        if not is_name or type_of(Path(dataset)):
            raise InputError(f"There is no file or folder {dataset!r} to read as the dataset.")
        self.hub_name, within = is_name.groups()
        require(
            None in (within, config) or within == config,
            f"CONFIG must be left out, or {within!r} as in {dataset}; it is {config!r}.",
        )
        self.config = config or within

    def _choose_files(self) -> None:
        self.files, self.passed_over = list_files(self.root)
        if self.name == "embedded":
            self.files = [file for file in self.files if type_of(file) == ".jsonl"]  # not sources
        if self.root.is_dir():
            self.files, others = splits.choose_split(self.root, self.files, self.config, self.split)
            self.passed_over |= others
            return
        require(
            self.config is None and self.split == "train",
            f"CONFIG and SPLIT are for folders and hub datasets; {self.name} is a file. Leave "
            "them out.",
        )

    def check(self) -> list[str]:
        """Raise errors before long work: read each ``.txt``, open each ``.parquet``.

        Returns:
            Sentences on what may not be meant.
        """
        texts = [path for path in self.files if type_of(path) == ".txt"]
        require(
            self.separator is None or bool(self.separator and texts),
            f"SEPARATOR must be a text that stands between the documents of .txt files; it is "
            f"{self.separator!r}, and {self.name} has {len(texts)} of them. Leave it out.",
        )
        for path in self.files:
            if type_of(path) == ".parquet":
                next(read_records(path, self.column), None)
        spelt = Counter()
        for path in texts:
            for _, record in read_records(path, self.column, separator=self.separator):
                for part in record[self.column]:
                    spelt.update({mark: part.count(mark) for mark in SEPARATORS})
        next(self.documents())
        return [
            f"The .txt files of {self.name} spell {mark} {n:,} times. If it stands between "
            f"documents, pass --separator '{mark}'; each {'part' if self.separator else 'file'} "
            "is one document now."
            for mark, n in spelt.items()
            if n >= N_TOLD
        ]

    def describe(self) -> str:
        """Which files of a folder are read and which are not, in words."""
        kinds = defaultdict(list)
        for path in self.files:
            kinds[path.name.removeprefix(stem_of(path))].append(path)
        lines = listing(self.root, kinds, "Reading")
        return "\n".join([*lines, *listing(self.root, self.passed_over, "Not reading")])

    def sizes(self) -> dict[str, int]:
        """Bytes of each local file, by its path in the folder; they identify the corpus."""
        names = (self._name_of(path) for path in self.files)
        return dict(zip(names, (path.stat().st_size for path in self.files), strict=True))

    def name_files_as(self, earlier: dict[str, int] | None) -> None:
        """Name files as an earlier run did; earlier versions left out the folder they are in."""
        self.names_without_folder = True
        self.names_without_folder = earlier is None or earlier == self.sizes()

    def _name_of(self, path: Path) -> str:
        return path.name if self.names_without_folder else relative_name(path, self.root)

    def documents(
        self, start: Position = BEGINNING, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yield the documents of one rank, from a position on.

        With a place, the first begins there; else the position's document is read from its
        beginning.
        """
        place = Place(*(start.place or ()))
        usable = self._usable(place, rank, world_size)
        for number, (parts, subset, at) in enumerate(usable, place.document):
            index = number if self.files else number * world_size + rank
            if index % world_size == rank and index // world_size >= start.document:
                at = at._replace(document=index, skipped=dict(self.skipped))
                at = at if self.files else None
                part = next(parts)
                for following in parts:
                    yield Document(index, part, subset, at, ends=False)
                    part = following
                yield Document(index, part, subset, at)

    def _usable(
        self, start: Place, rank: int, world_size: int
    ) -> Iterator[tuple[Iterator[str], str, Place]]:
        """The parts, the subset and the place of each usable text; `InputError` if there is none.

        For local files those of all ranks, which so agree on their indices.
        """
        self.skipped = Counter(start.skipped)
        empty, fields = True, {}
        for record, default_subset, at in self._records(start, rank, world_size):
            text = record.get(self.column) if isinstance(record, dict) else None
            rest = text if isinstance(text, Iterator) else iter(())  # of a .txt, unread as yet
            if rest is text:
                text = _head(rest)
                record = {self.column: text}
            reason = None if at.byte else unusable(record, self.column)
            if reason:
                self.skipped[reason] += 1
                if isinstance(record, dict) and self.column not in record:
                    fields = fields or record
                continue
            empty = False
            subset = self._subset_of(record, default_subset)
            yield filter(None, itertools.chain(_parts(text), rest)), subset, at
        if empty:
            content = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            remedy = f" Choose TEXT_COLUMN among {', '.join(fields)}." if fields else ""
            raise InputError(
                f"{self.name} must hold documents with a {self.column}; it holds "
                f"{content or 'no record'}.{remedy}"
            )

    def _records(
        self, start: Place, rank: int, world_size: int
    ) -> Iterator[tuple[Record, str, Place]]:
        """(record, default subset, place) of local records, or of the rank's of a hub dataset."""
        if not self.files:
            source = (self.hub_name, self.config, self.split)
            for record in read_hub(source, self.column, rank, world_size):
                yield record, self.name, Place()
        for number, path in enumerate(self.files[start.file :], start.file):
            at = start if number == start.file else Place(number)
            # The bytes of a .txt are those of its text, so that one can begin within it.
            first = at.offset + at.byte if type_of(path) == ".txt" else at.offset
            subset = self._default_subset(path)
            for offset, record in read_records(path, self.column, first, self.separator):
                at = at if offset == first else Place(number, offset)
                if at.byte and offset == at.offset:  # not of a .txt
                    rest = record[self.column].encode()[at.byte :].decode()
                    record = {**record, self.column: rest}
                yield record, subset, at

    def _default_subset(self, path: Path) -> str:
        if self.subset_a_file or path == self.root:
            name = Path(self._name_of(path))
            return name.with_name(stem_of(name)).as_posix()
        folder, *below = path.relative_to(self.root).parts
        return folder if below else self.root.resolve().name or self.name

    def _subset_of(self, record: dict[str, Json], default: str) -> str:
        """The subset that a record names, if it does; a number is a name too."""
        meta = record.get("meta")
        name = meta.get("pile_set_name") if isinstance(meta, dict) else None
        if isinstance(name, (str, int, float)):
            return str(name).encode("utf-8", "replace").decode() or default
        if name is not None and not self._told_subset:
            self._told_subset = True
            tqdm.write(
                f"meta.pile_set_name must be a name or a number; of a record of {self.name} it is "
                f"{name!r:.100}. Such records are in the subset of those that name none."
            )
        return default


def _parts(text: str) -> Iterator[str]:
    """A text in parts of at most `LONGEST` characters."""
    return (text[start : start + LONGEST] for start in range(0, len(text), LONGEST))


def _head(parts: Iterator[str]) -> str:
    """The first parts of a text, as many as it takes to find that it is not blank."""
    head = ""
    for part in parts:
        head += part
        if part.strip():
            break
    return head


def unusable(record: Record, column: str) -> str | None:
    """The reason why a record, whose text is in ``column``, cannot be used, or None."""
    if isinstance(record, Exception):
        return "not UTF-8" if isinstance(record, UnicodeDecodeError) else "not JSON"
    text = record.get(column) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return "without a text"
    if not text.strip():
        return "with an empty text"
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may escape half of a surrogate pair; tokenizers refuse it
        return "not Unicode"
    return None


def read_hub(
    source: tuple[str, str | None, str], column: str, rank: int, world_size: int
) -> Iterator[dict]:
    """Stream one rank's records of a hub dataset: its name, configuration and split."""
    # Imported here, because it takes seconds that local text does not need.
    import datasets
    import datasets.distributed

    look_for_hub()
    token = hub_token()
    name, config, split = source
    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True, token=token)
        rows = datasets.distributed.split_dataset_by_node(stream, rank, world_size)
        for number, row in enumerate(rows):
            if number == 0:
                require(
                    column in row,
                    f"{name} must have a column {column}; it has {', '.join(row)}. Choose one with "
                    "TEXT_COLUMN.",
                )
            yield row
    except InputError:
        raise
    except Exception as error:  # many kinds: not found, gated, offline, connection, no such split
        _refuse_unknown_part(source, token)
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        if token:
            reason = reason.replace(token, "<token>")
        # "from None", because the errors behind this one may show request headers.
        raise InputError(
            f"{name} is no local file or folder, and could not be read from the hub ({reason}).\n"
            f"Check the name and the network. For a gated dataset accept its licence on its hub "
            f"page and set HF_TOKEN in .env. Without a hub: --dataset embedded."
        ) from None


def _refuse_unknown_part(source: tuple[str, str | None, str], token: str | None) -> None:
    """Refuse a configuration or split that a hub dataset does not have, listing what it has."""
    import datasets

    name, config, split = source
    try:
        configs = datasets.get_dataset_config_names(name, token=token)
        default = datasets.get_dataset_default_config_name(name, token=token)
        config = splits.choose_config(name, configs, default, config)
        parts = datasets.get_dataset_split_names(name, config, token=token)
    except InputError as error:
        raise error from None
    except Exception:  # the dataset as a whole cannot be read
        return
    splits.require_among(f"SPLIT of {name}", split, parts)
