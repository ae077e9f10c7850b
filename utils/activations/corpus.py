"""The corpus: its documents, in a fixed order, from any place on.

A corpus is the embedded text, a local file or folder (see `files`), or a dataset of the Hugging
Face Hub, read where it lies. Its records are those of the Pile,
``{"text": ..., "meta": {"pile_set_name": ...}}``; only ``text`` is required. It may also be a chat,
a list of ``{"role": ..., "content": ...}``.
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
from utils.activations.chats import Chats
from utils.activations.files import (
    BESIDE_OTHERS,
    TABLES,
    Record,
    list_files,
    listing,
    read_records,
    relative_name,
    stem_of,
    type_of,
    without_tables,
)
from utils.activations.hub import commit_of, list_dataset
from utils.activations.subsets import N_LOOKED, Subsets
from utils.settings import InputError, Json, require

LONGEST = 2**18  # characters of a document that are read, and tokenised, in one
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<eos>")
REFUSED = "that the chat template refuses"
N_TOLD = 100  # times that a .txt spells one of them, from where on it is said


class Place(NamedTuple):
    """Where to go on reading files, so that none before is read again."""

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
    place: Place | None = None  # where the text begins
    ends: bool = True
    is_chat: bool = False  # with the template's special tokens, spelt as text


class Usable(NamedTuple):
    """The parts of a text that can be used, its subset and place, and whether it is a chat."""

    parts: Iterator[str]
    subset: str
    place: Place
    is_chat: bool


class Position(NamedTuple):
    """A place in a rank's stream of tokens."""

    document: int  # counted among the rank's documents that are chosen
    token: int  # tokens of that document already used, its BOS included
    place: Place | None = None  # there, or where the document before begins; None in early versions


BEGINNING = Position(0, 0)


class Corpus:
    """The documents of ``"embedded"``, a local file or folder, or a hub dataset, in a fixed order.

    The subset of a document is the record's ``meta.pile_set_name``; without one, the folder within
    the dataset's that holds the file, or the name of the dataset.

    Attributes:
        skipped: Number, by reason, of the records of the latest pass that cannot be used, those of
            all ranks.
        revision: The commit of a hub dataset, once it was checked.
        chats: What makes texts of records of messages; None: such records are not used.
        subset_a_file: Each file is a subset where records name none, as in earlier versions.

    Args:
        dataset: The name of a hub dataset may go on with a configuration, ``allenai/c4/en``.
        config: Of the dataset's configurations; None for the default or only one.
        split: Of its splits.
        column: The field of its records that holds the text.
        separator: The text between the documents of a ``.txt``; None if each is one.
        subsets: Those that are read, see `Subsets`; all if there are none.

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
        subsets: tuple[str, ...] = (),
    ):
        self.name, self.config, self.split, self.column = dataset, config, split, column
        self.separator, self.subsets = separator, Subsets(subsets)
        self.revision: str | None = None
        self.chats: Chats | None = None
        self.hub_name: str | None = None
        self.skipped: Counter[str] = Counter()
        self.subset_a_file = self._told_subset = False
        self.root = embedded.pile_folder() if dataset == "embedded" else Path(dataset).expanduser()
        self.files: list[Path] = []  # a hub dataset's once it was checked
        self.names_without_folder = False
        if dataset and os.path.exists(self.root):  # False for a name too long for a path
            self._choose_files(*list_files(self.root))
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

    def _choose_files(self, files: list[Path], others: dict[str, list[Path]]) -> None:
        """Choose among the files of known types; ``others`` are not read."""
        self.files, self.passed_over = files, others
        if self.name == "embedded":
            self.files = [file for file in files if type_of(file) == ".jsonl"]  # not sources
        if self.hub_name or self.root.is_dir():
            card = self.root / "README.md"
            card = card if card in itertools.chain(*others.values()) else None
            self.files, others = splits.choose_split(
                self.root, self.files, card, self.config, self.split
            )
            self.files, tables = without_tables(self.files)
            self.passed_over |= others | tables
            return
        require(
            self.config is None and self.split == "train",
            f"CONFIG and SPLIT are for folders and hub datasets; {self.name} is a file. Leave "
            "them out.",
        )

    def check(self, begun: str | None = None) -> list[str]:
        """Raise errors before long work: read each local ``.txt``, open each local table.

        Args:
            begun: The revision of a hub dataset that a run goes on with. It was checked when that
                began, and is only listed again.

        Returns:
            Sentences on what may not be meant.
        """
        if self.hub_name:
            self.root, files = list_dataset(self.hub_name, begun)
            self.revision = commit_of(self.root)
            self._choose_files(*list_files(self.root, files))
        texts = [path for path in self.files if type_of(path) == ".txt"]
        require(
            self.separator is None or bool(self.separator and texts),
            f"SEPARATOR must be a text that stands between the documents of .txt files; it is "
            f"{self.separator!r}, and {self.name} has {len(texts)} of them. Leave it out.",
        )
        if begun:
            return []
        for path in () if self.hub_name else self.files:
            if type_of(path) in TABLES:
                next(read_records(path, self.column), None)
        spelt = Counter()
        for path in () if self.hub_name else texts:
            for _, record in read_records(path, self.column, separator=self.separator):
                for part in record[self.column]:
                    spelt.update({mark: part.count(mark) for mark in SEPARATORS})
        return self._check_subsets() + [
            f"The .txt files of {self.name} spell {mark} {n:,} times. If it stands between "
            f"documents, pass --separator '{mark}'; each {'part' if self.separator else 'file'} "
            "is one document now."
            for mark, n in spelt.items()
            if n >= N_TOLD
        ]

    def _check_subsets(self) -> list[str]:
        """Read the first document, or as many as it takes to see each subset that is chosen."""
        chosen, seen, n = self.subsets.shares.keys(), set(), 0
        for usable in itertools.islice(self._usable(Place()), N_LOOKED if chosen else 1):
            seen.add(usable.subset)
            n += 1
            if chosen <= seen:
                break
        return self.subsets.notes(seen, are_all=n < N_LOOKED)

    def describe(self) -> str:
        """Which files of a folder or a hub dataset are read and which are not, in words."""
        kinds = defaultdict(list)
        for path in self.files:
            kinds[path.name.removeprefix(stem_of(path))].append(path)
        lines = listing(self.root, kinds, "Reading")
        if self.revision:
            lines.insert(0, f"{self.hub_name} is read at revision {self.revision}.")
        return "\n".join([*lines, *listing(self.root, self.passed_over, "Not reading")])

    def sizes(self) -> dict[str, int]:
        """Bytes of each local file, by its path in the folder; they identify the corpus."""
        if self.hub_name:  # which its revision identifies
            return {}
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

        With a place, the first begins there, or the one before it does. Without, those before the
        position's are read too.
        """
        require(
            not self.hub_name or world_size == 1 or start.place is not None or start == BEGINNING,
            f"An earlier version began to share {self.name} among {world_size} processes, in a way "
            "that this one does not go on with. Delete ACTIVATIONS_DIR, or name another.",
        )
        place = Place(*(start.place or ()))
        n_done = start.document if start.place is None else int(start.token == 0)
        for index, usable in enumerate(self._usable(place), place.document):
            if index % world_size != rank or not self.subsets.has(index, usable.subset):
                continue
            if n_done:
                n_done -= 1
                continue
            at = usable.place._replace(document=index, skipped=dict(self.skipped))
            whole = Document(index, "", usable.subset, at, is_chat=usable.is_chat)
            part = next(usable.parts)
            for following in usable.parts:
                yield dataclasses.replace(whole, text=part, ends=False)
                part = following
            yield dataclasses.replace(whole, text=part)

    def _usable(self, start: Place) -> Iterator[Usable]:
        """Each text that can be used, from a place on; `InputError` if there is none."""
        self.skipped = Counter(start.skipped)
        empty, fields = True, {}
        for record, default_subset, at in self._records(start):
            record, rest, is_chat = self._with_text(record, at.byte)
            reason = None if at.byte else unusable(record, self.column)
            if reason:
                self.skipped[REFUSED if is_chat else reason] += 1
                if isinstance(record, dict) and self.column not in record:
                    fields = fields or record
                continue
            empty = False
            parts = filter(None, itertools.chain(_parts(record[self.column]), rest))
            yield Usable(parts, self._subset_of(record, default_subset), at, is_chat)
        if empty:
            content = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            remedy = f" Choose TEXT_COLUMN among {', '.join(fields)}." if fields else ""
            if tables := self.passed_over.get(BESIDE_OTHERS):
                remedy += f" If the texts are in {tables[0]}, move the other files away."
            raise InputError(
                f"{self.name} must hold documents with a {self.column}; it holds "
                f"{content or 'no record'}.{remedy}"
            )

    def _with_text(self, record: Record, byte: int) -> tuple[Record, Iterator[str], bool]:
        """A record with its text, from ``byte`` on; what follows it; and whether it is a chat."""
        text = record.get(self.column) if isinstance(record, dict) else None
        if isinstance(text, Iterator):  # of a .txt, unread as yet, and from that byte on
            return {self.column: _head(text)}, text, False
        is_chat = isinstance(text, list) and self.chats is not None
        if is_chat:
            text = self.chats.text(text)
            record = {**record, self.column: text}
        if byte:
            record = {**record, self.column: text.encode()[byte:].decode()}
        return record, iter(()), is_chat

    def _records(self, start: Place) -> Iterator[tuple[Record, str, Place]]:
        """(record, default subset, place) of each record from a place on."""
        for number, path in enumerate(self.files[start.file :], start.file):
            at = start if number == start.file else Place(number)
            # The bytes of a .txt are those of its text, so that one can begin within it.
            first = at.offset + at.byte if type_of(path) == ".txt" else at.offset
            subset = self._default_subset(path)
            for offset, record in read_records(path, self.column, first, self.separator):
                at = at if offset == first else Place(number, offset)
                yield record, subset, at

    def _default_subset(self, path: Path) -> str:
        if self.hub_name:
            return self.name
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
