"""Extraction: contexts through the language model into shards, continuing an earlier run."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from utils.activations.capture import Capture, Captured, arrays_of, release_memory
from utils.activations.claims import Claim, Claims, Stream, as_position
from utils.activations.contexts import Context
from utils.activations.corpus import BEGINNING, Corpus
from utils.activations.layers import OF_TEXT, LayerFolder, Ranks
from utils.activations.manifest import Manifest, ShardEntry, SubsetNumbers
from utils.activations.queues import ShardQueue, read_ahead
from utils.activations.rolling import Rolling
from utils.activations.shards import ShardWriter, bytes_per_token, close_arrays
from utils.artifacts import SETTINGS_FILE, read_json
from utils.backend import ran_out_of_memory
from utils.language_model import LanguageModel
from utils.settings import InputError, Json, TimeIsUp, TimeLimit, require
from utils.terminal import in_rate, in_time

T = TypeVar("T")


class ExtractionSettings(Protocol):
    """The settings of save_activations.py that an extraction uses."""

    model_name: str
    dataset: str
    n_tokens: int
    context_length: int
    outlier_factor: float
    storage_dtype: str
    tokens_per_shard: int
    contexts_per_batch: int | None
    max_disk_gb: float | None
    keep_gb: float
    max_hours: float | None


class Extraction:
    """A run, or this process's part of one, which writes shards of one or more layers in one pass.

    Shards that are missing are claimed one after another (see `claims`), and made of every layer
    that lacks them, so that each layer has in the end what a run of it alone would write. A shard
    that is recorded, but missing or damaged, is written again from its recorded position in the
    corpus and in batches of its recorded size, so running a finished extraction again repairs it.

    One thread reads and tokenises ahead of the model, others write behind it (see `queues`).

    Args:
        folders: The folder of each layer.
    """

    def __init__(self, folders: Mapping[int, Path], settings: ExtractionSettings, ranks: Ranks):
        self.settings, self.ranks = settings, ranks
        self.layers = [LayerFolder(folder, layer, ranks) for layer, folder in folders.items()]
        self.contexts_per_shard = max(1, settings.tokens_per_shard // settings.context_length)
        self.limit, self._told_room = TimeLimit(settings.max_hours), False
        wanted = -(-settings.n_tokens // settings.context_length)
        self.n_contexts = -(-wanted // ranks.n_streams)

    def is_finished(self) -> bool:
        """Whether all shards are there and whole; `run` makes the damaged ones anew."""
        is_finished = all([layer.is_finished() for layer in self.layers])
        close_arrays()  # a freed shard takes room as long as it is open
        return is_finished

    def plan_windows(self, d_model: int) -> Rolling | None:
        """How each layer's folder is cut where MAX_DISK_GB bounds all of them together.

        Raises:
            InputError: MAX_DISK_GB is too small; names the least that would do.
        """
        if self.settings.max_disk_gb is None:
            return None
        a_token = bytes_per_token(d_model, self.settings.storage_dtype)
        shard_bytes = self.contexts_per_shard * self.settings.context_length * a_token
        n_shards = -(-self.n_contexts // self.contexts_per_shard) * self.ranks.n_streams
        bounds = self.settings.max_disk_gb, self.settings.keep_gb
        return Rolling.plan(n_shards, shard_bytes * len(self.layers), *bounds)

    def bytes_to_write(self, d_model: int) -> int:
        """Bytes this run still adds to the disk."""
        done = sum(layer.n_contexts - layer.n_damaged for layer in self.layers)
        tokens = (self.n_contexts * len(self.layers) - done) * self.settings.context_length
        size = tokens * bytes_per_token(d_model, self.settings.storage_dtype)
        if self.settings.max_disk_gb is None:
            return size
        there = sum(layer.n_bytes for layer in self.layers)
        room = max(0, int(self.settings.max_disk_gb * 1e9) - there)
        return min(size, room // self.ranks.n_streams)

    # ---- running

    def begin(self, language_model: LanguageModel, corpus: Corpus) -> None:
        """Continue an earlier run's manifests, or make them and print this machine's speed."""
        self.language_model, self.corpus = language_model, corpus
        self._adopt_manifests()
        length, tokenizer = self.settings.context_length, language_model.tokenizer
        self.stream = Stream(corpus, tokenizer, length, self.ranks.stream, self.ranks.n_streams)
        sizes = self.n_contexts, self.contexts_per_shard
        self.claims = Claims(self.layers, self.stream, *sizes, self._while_waiting)
        self.subset_numbers = SubsetNumbers([])
        self.capture = Capture(language_model, self.settings.storage_dtype)
        self.per_batch = self._choose_batch()
        if not self._done():
            self._print_speed()

    def run(self) -> None:
        """Write all missing and damaged shards, or as many as MAX_HOURS allows.

        Raises:
            TimeIsUp: It does not allow all.
        """
        length, n_damaged = self.settings.context_length, sum(x.n_damaged for x in self.layers)
        with contextlib.ExitStack() as stack:
            self.progress = stack.enter_context(
                tqdm(
                    total=(self.n_contexts + n_damaged) * length,
                    initial=self._done() * length,
                    desc="extracting",
                    unit="tok",
                    unit_scale=True,
                    smoothing=0.05,
                    disable=self.ranks.rank > 0,
                )
            )
            stack.callback(self.claims.close)  # after the queues
            # A queue for each, for one thread writes slower than several layers are computed.
            self.queues = [stack.enter_context(ShardQueue()) for _ in self.layers]
            for number in sorted({e.shard for layer in self.layers for e in layer.damaged}):
                self._stop_in_time(self._done())
                self._repair(number)
            if not all(layer.is_complete() for layer in self.layers):
                self._extend()
        for layer in self.layers:
            layer.finish(skipped=self.claims.skipped or {})
        self.claims.forget()

    def _adopt_manifests(self) -> None:
        if earlier := self._manifests():
            self.corpus.name_files_as(earlier[0].files)
            self.corpus.subset_a_file = not earlier[0].subset_a_folder
        facts = {
            "model_name": self.settings.model_name,
            "revision": self.language_model.revision,
            "dtype": str(self.language_model.dtype).removeprefix("torch."),
            "d_model": self.language_model.d_model,
            "context_length": self.settings.context_length,
            "dataset": self.settings.dataset,
            "files": self.corpus.sizes(),
            "dataset_revision": self.corpus.revision,
            "world_size": self.ranks.n_streams,
        }
        rule = {
            "bos": self.language_model.bos,
            "outlier_factor": self.settings.outlier_factor,
            "subset_a_folder": True,
        }
        if rolling := self.plan_windows(self.language_model.d_model):
            rule["rolling"] = list(rolling)
        for layer in self.layers:
            layer.adopt(facts, **rule, block=self.language_model.block_name(layer.layer))

    def _done(self) -> int:
        """Contexts in shards that are recorded, of the layer that has fewest."""
        return min(layer.n_contexts for layer in self.layers)

    def _manifests(self) -> list[Manifest]:
        return [manifest for layer in self.layers for manifest in layer.manifests()]

    def _stop_in_time(self, done: int) -> None:
        """Raise `TimeIsUp` unless there is time for another shard after ``done`` contexts."""
        if not self.limit.allows_another():
            done, wanted = np.array([done, self.n_contexts]) * self.settings.context_length
            raise TimeIsUp(f"{done:,} of {wanted:,} tokens are saved.")

    # ---- batches and memory

    def _choose_batch(self) -> int:
        """Contexts in a batch: as set, as in the last shard, or as many as are good here."""
        recorded = [one.shards[-1].contexts_per_batch for one in self._manifests() if one.shards]
        given = self.settings.contexts_per_batch or next(iter(recorded), None)
        if given is None:
            self.per_batch, length, norms = 1, self.settings.context_length, norms_of(self.layers)
            given = self._in_memory(lambda _: self.capture.contexts_that_fit(length, norms))
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
        contexts = self.stream.take(BEGINNING, self.per_batch)
        require(
            bool(contexts),
            f"{self.corpus.name} must hold at least a context of text; it has fewer tokens than "
            f"CONTEXT_LENGTH, {self.settings.context_length:,}. Lower it, or add documents.",
        )
        tokens = np.stack([context.tokens for context in contexts])
        rate = self._in_memory(lambda per_batch: self._rate(tokens[:per_batch]))
        wanted = in_time(self.n_contexts * self.settings.context_length / rate)
        print(f"This machine runs {in_rate(rate)}: about {wanted} in all.")

    def _rate(self, tokens: np.ndarray) -> float:
        """Tokens a second of a batch, after one that warms up."""
        arrays_of(self.capture.run(tokens, norms_of(self.layers)))
        start = time.perf_counter()
        arrays_of(self.capture.run(tokens, norms_of(self.layers)))
        return tokens.size / (time.perf_counter() - start)

    # ---- shards

    def _repair(self, number: int) -> None:
        """Make a shard anew in each layer where it is damaged."""
        if not self.claims.lock(number):  # another process makes it anew
            return
        damaged = [(one, e) for one in self.layers for e in one.damaged if e.shard == number]
        unfinished = [layer for layer, _ in damaged]

        def finished(layer: LayerFolder, _: ShardEntry) -> None:
            unfinished.remove(layer)
            if not unfinished:
                self.claims.release(number)

        for layer, entry in damaged:
            per_batch = entry.contexts_per_batch or self._earlier_batch(layer)
            start = as_position(entry.start)
            contexts = self.stream.at(start).take(start, entry.contexts)
            require(bool(contexts), f"{self.corpus.name} ends before shard {number} now.")
            self.subset_numbers = SubsetNumbers(layer.subsets())
            (writer,) = self._fill_as_before(number, contexts, [layer], per_batch)
            then = functools.partial(finished, layer)
            self._queue_of(layer).finish(writer, entry.crc32, then)

    def _earlier_batch(self, layer: LayerFolder) -> int:
        """Contexts in a batch of versions that recorded it among the settings."""
        return read_json(layer.folder / SETTINGS_FILE).get("contexts_per_batch", self.per_batch)

    def _extend(self) -> None:
        """Make the shards that are missing, and wait for those that other processes make."""
        done = self._done()
        claims = read_ahead(self.claims.shards(), stop=self.claims.stop)
        with contextlib.closing(claims) as claimed:
            while claim := self._next_of(claimed):
                self._stop_in_time(done)
                self._add_shard(claim)
                done += len(claim.contexts)
        if self.claims.has_ended:
            tokens = self.settings.context_length * np.array([done, self.n_contexts])
            print("{} ended after {:,} tokens of {:,}.".format(self.corpus.name, *tokens))

    def _next_of(self, claimed: Iterator[Claim]) -> Claim | None:
        """The next claim, None at the end; waiting for it is no part of the work."""
        begun = time.monotonic()
        claim = next(claimed, None)
        self.limit.leave_out(time.monotonic() - begun)
        return claim

    def _while_waiting(self, for_room: bool) -> None:
        """Raise what a thread has failed at, or `TimeIsUp`; say once that the disk is full."""
        for queue in self.queues:
            queue.raise_failure()
        if self.limit.is_over():
            raise TimeIsUp("What was begun is saved.")
        if for_room and not self._told_room:
            tqdm.write(
                "MAX_DISK_GB is reached. Waiting until train_autoencoder.py --follow has used a "
                "window."
            )
            self._told_room = True

    def _add_shard(self, claim: Claim) -> None:
        """Write a shard of the layers that lack it.

        If a layer has it, its batches are used, and the text must be the same.
        """
        recorded = {layer.layer: layer.recorded().get(claim.number) for layer in self.layers}
        layers = [layer for layer in self.layers if recorded[layer.layer] is None]
        earlier = next(filter(None, recorded.values()), None)
        self.subset_numbers = SubsetNumbers(claim.subsets)
        if earlier is None:
            fill = functools.partial(self._fill, claim.number, claim.contexts, layers)
            writers = self._in_memory(fill)
            per_batch, text = self.per_batch, None
        else:
            per_batch = earlier.contexts_per_batch or self.per_batch
            writers = self._fill_as_before(claim.number, claim.contexts, layers, per_batch)
            text = {name: earlier.crc32[name] for name in OF_TEXT}
        position = claim.contexts[-1].next_position
        made = {"start": list(claim.start), "contexts_per_batch": per_batch}
        reached = {
            "position": list(position),
            "skipped": position.place.skipped or {},
            "subsets": claim.subsets,
        }
        for layer, writer in zip(layers, writers, strict=True):
            then = functools.partial(self._record, layer, writer, made, reached)
            self._queue_of(layer).finish(writer, text, then)

    def _record(
        self,
        layer: LayerFolder,
        writer: ShardWriter,
        made: dict[str, Json],
        reached: dict[str, Json],
        entry: ShardEntry,
    ) -> None:
        """Record a finished shard, and let go of it when all layers have it."""
        layer.add(writer, entry, made, **reached)
        if all(entry.shard in one.recorded() for one in self.layers):
            self.claims.settle(entry.shard)

    def _queue_of(self, layer: LayerFolder) -> ShardQueue:
        return self.queues[self.layers.index(layer)]

    def _fill_as_before(
        self, number: int, contexts: list[Context], layers: list[LayerFolder], per_batch: int
    ) -> list[ShardWriter]:
        """As `_fill`, of a shard that was made before, in its batches, which decide the last bits.

        Raises:
            InputError: Memory runs out.
        """
        try:
            return self._fill(number, contexts, layers, per_batch)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            raise InputError(
                f"Memory ran out: shard {number} must be made anew in batches of "
                f"{per_batch} contexts, as it was made. Free some memory, and run the same "
                "command again."
            ) from error

    def _fill(
        self, number: int, contexts: list[Context], layers: list[LayerFolder], per_batch: int
    ) -> list[ShardWriter]:
        """Run contexts through the model into a shard of each layer, in batches of one size."""
        queues, dtype = [self._queue_of(layer) for layer in layers], self.settings.storage_dtype
        writers = [
            queue.begin(layer.new_writer(number, len(contexts), dtype))
            for layer, queue in zip(layers, queues, strict=True)
        ]
        done = 0
        try:
            while batch := contexts[done : done + per_batch]:
                for queue, writer, captured in zip(
                    queues, writers, self._run(batch, layers), strict=True
                ):
                    queue.append(writer, captured)
                self.progress.update(len(batch) * self.settings.context_length)
                done += len(batch)
        except (RuntimeError, MemoryError):  # memory may have run out, and the shard begin again
            for queue, writer in zip(queues, writers, strict=True):
                queue.discard(writer)
            self.progress.update(-done * self.settings.context_length)
            raise
        return writers

    def _run(self, batch: list[Context], layers: list[LayerFolder]) -> list[Captured]:
        return self.capture.run(
            np.stack([context.tokens for context in batch]),
            norms_of(layers),
            documents=np.stack([context.documents for context in batch]),
            subsets=np.stack([self._subsets_of(context) for context in batch]),
        )

    def _subsets_of(self, context: Context) -> np.ndarray:
        """The subset of each token, as an index into the manifests' lists, which grow."""
        documents, inverse = np.unique(context.documents, return_inverse=True)
        numbers = [self.subset_numbers[context.subsets[document]] for document in documents]
        return np.array(numbers, np.int16)[inverse]


def norms_of(layers: list[LayerFolder]) -> dict[int, float | None]:
    """Layers for `Capture.run`."""
    return {layer.layer: layer.manifest.outlier_norm for layer in layers}
