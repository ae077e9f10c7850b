"""Extraction: contexts through the language model into shards, continuing an earlier run."""

import contextlib
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from utils.activations.capture import Capture, Captured, release_memory
from utils.activations.contexts import Context, pack_contexts
from utils.activations.corpus import BEGINNING, Corpus, Position
from utils.activations.manifest import Manifest, ShardEntry, SubsetNumbers
from utils.activations.queues import ShardQueue, read_ahead
from utils.activations.shards import (
    ARRAYS,
    EARLIER_ARRAYS,
    Shard,
    ShardWriter,
    bytes_per_token,
)
from utils.artifacts import SETTINGS_FILE, read_json
from utils.backend import ran_out_of_memory
from utils.language_model import LanguageModel
from utils.settings import InputError, Json, require
from utils.terminal import in_rate, in_time

READ_AHEAD = 256  # contexts that are tokenised before the model needs them

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The rank of this process, and the number of processes that share the run."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """As set by torchrun or accelerate launch; a single process otherwise.

        Raises:
            InputError: The environment's values are invalid.
        """
        rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        require(
            rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size),
            f"RANK in the environment must be from 0 to WORLD_SIZE - 1; it is {rank!r}, and "
            f"WORLD_SIZE {world_size!r}. Unset both for one process.",
        )
        return cls(int(rank), int(world_size))

    @property
    def manifest_name(self) -> str:
        return "manifest.json" if self.world_size == 1 else f"manifest-{self.rank:05d}.json"

    @property
    def lock_name(self) -> str:
        """Ranks share a folder, so each holds another lock."""
        return f".lock-{self.rank}"


class ExtractionSettings(Protocol):
    """The settings of save_activations.py that an extraction uses."""

    model_name: str
    layer: int
    dataset: str
    n_tokens: int
    context_length: int
    outlier_factor: float
    storage_dtype: str
    tokens_per_shard: int
    contexts_per_batch: int | None


class Read(NamedTuple):
    """A context, and the number of records by reason that were skipped up to there."""

    context: Context
    skipped: dict[str, int]


@dataclasses.dataclass
class ShardContexts:
    """The contexts of a shard, which can be gone through again, in batches of another size.

    ``coming`` has those of the shard, or fewer where the corpus ends, after the ones in ``reads``.
    """

    number: int
    n_contexts: int
    coming: Iterator[Read]
    reads: list[Read] = dataclasses.field(default_factory=list)

    def batch(self, start: int, n: int) -> list[Context]:
        """Up to ``n`` contexts, from the shard's context ``start`` on."""
        stop = min(start + n, self.n_contexts)
        self.reads.extend(itertools.islice(self.coming, max(0, stop - len(self.reads))))
        return [read.context for read in self.reads[start:stop]]


class Extraction:
    """One rank's part of a run, which writes shards to ``folder``.

    A rank's shards have the numbers ``rank + i · world_size``. The manifest is written after each
    shard. A shard that is missing or fails its checksum is written again from its recorded position
    in the corpus and in batches of its recorded size, so running a finished extraction again
    repairs it.

    One thread reads and tokenises ahead of the model, others write behind it (see `queues`).
    """

    def __init__(self, folder: Path, settings: ExtractionSettings, ranks: Ranks):
        self.folder, self.settings, self.ranks = folder, settings, ranks
        self.manifest_path = folder / ranks.manifest_name
        self.manifest = Manifest.read(self.manifest_path) if self.manifest_path.exists() else None
        self.damaged: list[int] = []
        self.contexts_per_shard = max(1, settings.tokens_per_shard // settings.context_length)
        wanted = -(-settings.n_tokens // settings.context_length)
        self.n_contexts = -(-wanted // ranks.world_size)

    # ---- checking

    def is_finished(self) -> bool:
        """Whether all shards are whole; `run` repairs the damaged ones."""
        if self.manifest is None:
            return False
        entries = tqdm(self.manifest.shards, "checking shards", unit="shard", leave=False)
        self.damaged = [entry.shard for entry in entries if not self._is_whole(entry)]
        for shard in self.damaged:
            print(f"Shard {shard} is damaged or missing: making it anew.")
        return self.manifest.finished and not self.damaged

    def _is_whole(self, entry: ShardEntry) -> bool:
        try:
            Shard(self.folder, entry).verify()
        except InputError:
            return False
        return True

    def bytes_to_write(self, d_model: int) -> int:
        """Bytes this run still adds to the disk."""
        shards = self.manifest.shards if self.manifest else ()
        done = sum(entry.contexts for entry in shards if entry.shard not in self.damaged)
        tokens = (self.n_contexts - done) * self.settings.context_length
        return tokens * bytes_per_token(d_model, self.settings.storage_dtype)

    # ---- running

    def begin(self, language_model: LanguageModel, corpus: Corpus) -> None:
        """Continue an earlier run's manifest, or make one and print this machine's speed."""
        self.language_model, self.corpus = language_model, corpus
        self._adopt_manifest()
        self.subset_numbers = SubsetNumbers(self.manifest.subsets)
        layer, storage_dtype = self.settings.layer, self.settings.storage_dtype
        outlier_norm = self.manifest.outlier_norm
        self.capture = Capture(language_model, layer, storage_dtype, outlier_norm)
        self.per_batch = self._choose_batch()
        if not self.manifest.shards:
            self._print_speed()

    def run(self) -> None:
        """Write all missing and damaged shards."""
        done = sum(entry.contexts for entry in self.manifest.shards)
        damaged = [entry for entry in self.manifest.shards if entry.shard in self.damaged]
        whole = done - sum(entry.contexts for entry in damaged)
        with (
            tqdm(
                total=self.n_contexts * self.settings.context_length,
                initial=whole * self.settings.context_length,
                desc="extracting",
                unit="tok",
                unit_scale=True,
                smoothing=0.05,
                disable=self.ranks.rank > 0,
            ) as self.progress,
            ShardQueue() as self.queue,
        ):
            for entry in damaged:
                self._repair(entry)
            is_at_end = self._extend(done)
        if is_at_end:
            self.manifest.skipped = dict(self.corpus.skipped)
        self.manifest.finished = True
        self.manifest.write(self.manifest_path)

    def _adopt_manifest(self) -> None:
        if self.manifest is not None:
            self.corpus.name_files_as(self.manifest.files)
            self.corpus.subset_a_file = not self.manifest.subset_a_folder
        facts = {
            "model_name": self.settings.model_name,
            "revision": self.language_model.revision,
            "layer": self.settings.layer,
            "dtype": str(self.language_model.dtype).removeprefix("torch."),
            "d_model": self.language_model.d_model,
            "context_length": self.settings.context_length,
            "dataset": self.settings.dataset,
            "files": self.corpus.sizes(),
            "world_size": self.ranks.world_size,
        }
        if self.manifest is None:
            factor = self.settings.outlier_factor
            bos = self.language_model.bos
            self.manifest = Manifest(**facts, bos=bos, outlier_factor=factor, subset_a_folder=True)
        for name, value in facts.items():
            earlier = getattr(self.manifest, name)
            is_unknown = name == "files" and earlier is None  # early versions recorded none
            require(
                is_unknown or earlier == value,
                f"The activations in {self.folder} were begun with {name} {earlier!r}, which "
                f"is {value!r} now. Delete it to start anew.",
            )

    # ---- batches and memory

    def _choose_batch(self) -> int:
        """Contexts in a batch: as set, as in the last shard, or as many as are good here."""
        recorded = [entry.contexts_per_batch for entry in self.manifest.shards[-1:]]
        given = self.settings.contexts_per_batch or next(iter(recorded), None)
        if given is None:
            self.per_batch, length = 1, self.settings.context_length
            given = self._in_memory(lambda _: self.capture.contexts_that_fit(length))
        return min(given, self.contexts_per_shard)

    def _in_memory(self, work: Callable[[int], T]) -> T:
        """``work`` of the contexts in a batch, which are halved when memory runs out.

        Raises:
            InputError: It runs out with a single context.
        """
        while True:
            try:
                return work(self.per_batch)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                reason = str(error).split("\n")[0]
            # Not above, where the error still holds what it was raised among.
            release_memory(self.language_model.device)
            require(
                self.per_batch > 1,
                f"Memory must hold the model and a context of {self.settings.context_length:,} "
                f"tokens; it ran out with one ({reason}). Use a shorter CONTEXT_LENGTH, a smaller "
                "DTYPE or model, or end what else uses the memory. What was saved stays.",
            )
            self.per_batch //= 2
            tqdm.write(f"Memory ran out: CONTEXTS_PER_BATCH is {self.per_batch} from here on.")

    def _print_speed(self) -> None:
        """Print how fast this machine is on the first batch; `InputError` if there is no text."""
        contexts = list(itertools.islice(self._contexts(BEGINNING), self.per_batch))
        require(
            bool(contexts),
            f"{self._share()} must hold at least a context of text; it has fewer tokens than "
            f"CONTEXT_LENGTH, {self.settings.context_length:,}. Lower it, or add documents"
            f"{'.' if self.ranks.world_size == 1 else ', or run fewer processes.'}",
        )
        tokens = np.stack([context.tokens for context in contexts])
        rate = self._in_memory(lambda per_batch: self._rate(tokens[:per_batch]))
        wanted = in_time(self.n_contexts * self.settings.context_length / rate)
        print(f"This machine runs {in_rate(rate)}: about {wanted} in all.")

    def _rate(self, tokens: np.ndarray) -> float:
        """Tokens a second of a batch, after one that warms up."""
        self.capture.run(tokens).arrays()
        start = time.perf_counter()
        self.capture.run(tokens).arrays()
        return tokens.size / (time.perf_counter() - start)

    # ---- shards

    def _share(self) -> str:
        """The documents of this process, in words."""
        n, name = self.ranks.world_size, self.corpus.name
        process = f"process {self.ranks.rank + 1} of {n} (one document in {n})"
        return name if n == 1 else f"Of {name} the share of {process}"

    def _contexts(self, start: Position) -> Iterator[Context]:
        documents = self.corpus.documents(start, self.ranks.rank, self.ranks.world_size)
        return pack_contexts(
            documents, self.language_model.tokenizer, self.settings.context_length, start
        )

    def _reading(
        self, start: Position, n_contexts: int
    ) -> contextlib.AbstractContextManager[Iterator[Read]]:
        """``n_contexts`` from ``start`` on, each a `Read`, while a thread reads ahead."""
        contexts = itertools.islice(self._contexts(start), n_contexts)
        reads = (Read(context, dict(self.corpus.skipped)) for context in contexts)
        return contextlib.closing(read_ahead(reads, READ_AHEAD))

    def _repair(self, entry: ShardEntry) -> None:
        """Make a shard anew, in the batches it was made in, which decide the last bits."""
        per_batch = entry.contexts_per_batch or self._earlier_batch()
        with self._reading(Position(*entry.start), entry.contexts) as reads:
            contexts = ShardContexts(entry.shard, entry.contexts, reads)
            require(
                bool(contexts.batch(0, 1)),
                f"{self.corpus.name} ends before shard {entry.shard} now.",
            )
            try:
                writer = self._fill(contexts, per_batch)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                raise InputError(
                    f"Memory ran out: shard {entry.shard} must be made anew in batches of "
                    f"{per_batch} contexts, as it was made. Free some memory, and run the same "
                    "command again."
                ) from error
        self.queue.finish(writer, entry.crc32)

    def _earlier_batch(self) -> int:
        """Contexts in a batch of versions that recorded it among the settings."""
        return read_json(self.folder / SETTINGS_FILE).get("contexts_per_batch", self.per_batch)

    def _extend(self, done: int) -> bool:
        """Add shards after ``done`` contexts; whether the corpus ended before they were enough."""
        position = Position(*(self.manifest.position or BEGINNING))
        number = self.ranks.rank + len(self.manifest.shards) * self.ranks.world_size
        with self._reading(position, self.n_contexts - done) as reads:
            while done < self.n_contexts:
                wanted = min(self.contexts_per_shard, self.n_contexts - done)
                contexts = ShardContexts(number, wanted, reads)
                if not contexts.batch(0, 1):
                    tokens = self.settings.context_length * np.array([done, self.n_contexts])
                    print("{} ended after {:,} tokens of {:,}.".format(self._share(), *tokens))
                    return True
                writer = self._in_memory(functools.partial(self._fill, contexts))
                made = {"start": list(position), "contexts_per_batch": self.per_batch}
                last = contexts.reads[-1]
                position = last.context.next_position
                reached = {
                    "position": list(position),
                    "skipped": position.place.skipped or {} if position.place else last.skipped,
                    "subsets": list(self.subset_numbers),
                }
                self.queue.finish(writer, then=functools.partial(self._add, writer, made, reached))
                done, number = done + len(contexts.reads), number + self.ranks.world_size
        return False

    def _add(
        self,
        writer: ShardWriter,
        made: dict[str, Json],
        reached: dict[str, Json],
        entry: ShardEntry,
    ) -> None:
        """Record a finished shard: how it was ``made``, and what was ``reached`` with it."""
        entry = dataclasses.replace(entry, **made)
        self.manifest.add(entry, writer.sum, writer.sum_squared_norm, writer.excluded)
        self.manifest = dataclasses.replace(self.manifest, **reached)
        self.manifest.write(self.manifest_path)

    def _fill(self, contexts: ShardContexts, per_batch: int) -> ShardWriter:
        """Run contexts through the model into a shard, all in batches of one size."""
        shape = (contexts.n_contexts, self.settings.context_length, self.manifest.d_model)
        names = ARRAYS if self.manifest.outlier_norm is None else EARLIER_ARRAYS
        writer = self.queue.begin(
            ShardWriter(self.folder, contexts.number, shape, self.settings.storage_dtype, names)
        )
        done = 0
        try:
            while batch := contexts.batch(done, per_batch):
                self.queue.append(writer, self._run(batch))
                self.progress.update(len(batch) * self.settings.context_length)
                done += len(batch)
        except (RuntimeError, MemoryError):  # memory may have run out, and the shard begin again
            self.queue.discard(writer)
            self.progress.update(-done * self.settings.context_length)
            raise
        return writer

    def _run(self, batch: list[Context]) -> Captured:
        return self.capture.run(
            np.stack([context.tokens for context in batch]),
            documents=np.stack([context.documents for context in batch]),
            subsets=np.stack([self._subsets_of(context) for context in batch]),
        )

    def _subsets_of(self, context: Context) -> np.ndarray:
        """The subset of each token, as an index into the manifest's list, which grows."""
        documents, inverse = np.unique(context.documents, return_inverse=True)
        numbers = [self.subset_numbers[context.subsets[document]] for document in documents]
        return np.array(numbers, np.int16)[inverse]
