"""The corpus: its documents, and how they become contexts of tokens.

A corpus is the embedded text, a local file or folder (see `files`), or a streamed dataset of the
Hugging Face Hub. Its records are those of the Pile,
``{"text": ..., "meta": {"pile_set_name": ...}}``; only ``text`` is required.
"""

import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

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
from utils.language_model import look_for_hub, separator_token
from utils.settings import InputError, hub_token, require

TOKENIZER_BATCH = 64  # documents a call: enough to keep the tokenizer's threads busy


@dataclass(frozen=True)
class Document:
    """A text, its index among the usable documents of the corpus, and its subset."""

    index: int
    text: str
    subset: str


class Position(NamedTuple):
    """A place in a rank's stream of tokens."""

    document: int  # counted among the rank's documents
    token: int  # tokens of that document already used, its BOS included


BEGINNING = Position(0, 0)


@dataclass(frozen=True)
class Context:
    """A row of tokens for the language model. A BOS belongs to the document that follows it."""

    tokens: np.ndarray  # int32, shape (context_length,); the first is BOS
    documents: np.ndarray  # int32, shape (context_length,): `Document.index` of each token
    subsets: dict[int, str]  # the subset of each of these documents
    next_position: Position  # where the stream goes on after this context


class Corpus:
    """The documents of ``"embedded"``, a local file or folder, or a hub dataset, in a fixed order.

    ``skipped`` counts by reason the records of the latest pass that cannot be used; for local
    files, those of all ranks.

    Args:
        dataset: The name of a hub dataset may go on with a configuration, ``allenai/c4/en``.
        config: Of the dataset's configurations; None for the default or only one.
        split: Of its splits.
        column: The field of its records that holds the text.

    Raises:
        InputError: The dataset cannot be read.
    """

    def __init__(
        self,
        dataset: str,
        config: str | None = None,
        split: str = "train",
        column: str = "text",
    ):
        self.name, self.config, self.split, self.column = dataset, config, split, column
        self.skipped: Counter[str] = Counter()
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

    def check(self) -> None:
        """Raise errors before long work: open each ``.parquet`` and ``.txt``, read a document."""
        for path in self.files:
            if type_of(path) in (".parquet", ".txt"):
                next(read_records(path, self.column), None)
        next(self.documents())

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

    def documents(self, skip: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents of one rank, without its first ``skip``."""
        texts = self._usable(self._records(rank, world_size))
        if self.files:  # ranks count usable documents only, so that their indices agree
            texts = itertools.islice(texts, rank, None, world_size)
        for number, (text, subset) in enumerate(texts):
            if number >= skip:
                yield Document(number * world_size + rank, text, subset)

    def _records(self, rank: int, world_size: int) -> Iterator[tuple[Record, str]]:
        """(record, default subset) of all local records, or of the rank's of a hub dataset."""
        if not self.files:
            records = read_hub(
                (self.hub_name, self.config, self.split), self.column, rank, world_size
            )
            yield from ((record, self.name) for record in records)
        for path in self.files:
            name = Path(self._name_of(path))
            subset = name.with_name(stem_of(name)).as_posix()
            yield from ((record, subset) for record in read_records(path, self.column))

    def _usable(self, records: Iterator[tuple[Record, str]]) -> Iterator[tuple[str, str]]:
        """(text, subset) of each usable record; `InputError` if there is none."""
        self.skipped.clear()
        empty, fields = True, {}
        for record, default_subset in records:
            reason = unusable(record, self.column)
            if reason:
                self.skipped[reason] += 1
                if isinstance(record, dict) and self.column not in record:
                    fields = fields or record
                continue
            empty = False
            meta = record.get("meta")
            subset = meta.get("pile_set_name") if isinstance(meta, dict) else None
            yield record[self.column], subset or default_subset
        if empty:
            content = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            remedy = f" Choose TEXT_COLUMN among {', '.join(fields)}." if fields else ""
            raise InputError(
                f"{self.name} must hold documents with a {self.column}; it holds "
                f"{content or 'no record'}.{remedy}"
            )


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


def tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Document, list[int]]]:
    """Each document with the tokens of its text."""
    documents = iter(documents)
    while batch := list(itertools.islice(documents, TOKENIZER_BATCH)):
        encoded = tokenizer(
            [document.text for document in batch],
            add_special_tokens=False,
            split_special_tokens=True,  # a text that spells BOS has no BOS
            return_attention_mask=False,
            verbose=False,  # no warning about texts longer than the model's context
        )
        yield from zip(batch, encoded["input_ids"], strict=True)


def pack_contexts(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    start: Position = BEGINNING,
) -> Iterator[Context]:
    """Cut the stream of all documents' tokens into contexts that begin with BOS.

    The stream is, for each document, BOS and its tokens. A context that begins inside a document
    gets an additional BOS, so it holds ``context_length - 1`` tokens of the stream. An incomplete
    last context is dropped.

    Args:
        documents: A rank's documents from number ``start.document`` on.
        start: The ``next_position`` of an earlier run's last context continues that run exactly.
    """
    require(context_length >= 2, f"CONTEXT_LENGTH must be at least 2; it is {context_length}.")
    separator = separator_token(tokenizer)
    number, offset = start
    context = np.empty((2, context_length), dtype=np.int32)  # tokens, documents
    filled, subsets = 0, {}
    for document, text_tokens in tokenize(documents, tokenizer):
        tokens = np.array([separator, *text_tokens], dtype=np.int32)
        while offset < len(tokens):
            if filled == 0 and offset > 0:
                context[:, 0] = separator, document.index
                filled = 1
            taken = tokens[offset : offset + context_length - filled]
            end = filled + len(taken)
            context[0, filled:end] = taken
            context[1, filled:end] = document.index
            subsets[document.index] = document.subset
            filled, offset = end, offset + len(taken)
            if filled == context_length:
                ended = offset == len(tokens)
                position = Position(number + 1, 0) if ended else Position(number, offset)
                yield Context(*context.copy(), subsets, position)
                filled, subsets = 0, {}
        number, offset = number + 1, 0
