"""Extraction: contexts through the language model into shards, continuing an earlier run."""

import dataclasses
import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from utils.activations.contexts import Context, pack_contexts
from utils.activations.corpus import BEGINNING, Corpus, Position
from utils.activations.manifest import Manifest, ShardEntry, SubsetNumbers
from utils.activations.shards import (
    ARRAYS,
    EARLIER_ARRAYS,
    Shard,
    ShardWriter,
    bytes_per_token,
)
from utils.language_model import LanguageModel, residual_at
from utils.settings import InputError, require


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
    contexts_per_batch: int


class Extraction:
    """One rank's part of a run, which writes shards to ``folder``.

    A rank's shards have the numbers ``rank + i · world_size``. The manifest is written after each
    shard. A shard that is missing or fails its checksum is written again from its recorded position
    in the corpus, so running a finished extraction again repairs it.
    """

    def __init__(self, folder: Path, settings: ExtractionSettings, ranks: Ranks):
        self.folder, self.settings, self.ranks = folder, settings, ranks
        self.manifest_path = folder / ranks.manifest_name
        self.manifest = Manifest.read(self.manifest_path) if self.manifest_path.exists() else None
        self.damaged: list[int] = []
        per_batch = settings.contexts_per_batch * settings.context_length
        batches = max(1, settings.tokens_per_shard // per_batch)
        self.contexts_per_shard = batches * settings.contexts_per_batch
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
        if not self.manifest.shards:
            self._print_speed()

    def run(self) -> None:
        """Write all missing and damaged shards."""
        done = sum(entry.contexts for entry in self.manifest.shards)
        with tqdm(
            total=self.n_contexts * self.settings.context_length,
            initial=done * self.settings.context_length,
            desc="extracting",
            unit="tok",
            unit_scale=True,
            smoothing=0.05,
            disable=self.ranks.rank > 0,
        ) as self.progress:
            for shard in self.damaged:
                self._repair(shard)
            self._extend(done)
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

    def _print_speed(self) -> None:
        """Print how fast this machine is on the first batch; `InputError` if there is no text."""
        batch = list(itertools.islice(self._contexts(BEGINNING), self.settings.contexts_per_batch))
        require(
            bool(batch),
            f"{self._share()} must hold at least a context of text; it has fewer tokens than "
            f"CONTEXT_LENGTH, {self.settings.context_length:,}. Lower it, or add documents"
            f"{'.' if self.ranks.world_size == 1 else ', or run fewer processes.'}",
        )
        tokens = torch.from_numpy(np.stack([context.tokens for context in batch]))
        residual_at(self.language_model, tokens, self.settings.layer)  # warm-up
        start = time.perf_counter()
        residual_at(self.language_model, tokens, self.settings.layer).cpu()
        rate = tokens.numel() / (time.perf_counter() - start)
        hours = self.n_contexts * self.settings.context_length / rate / 3600
        print(f"This machine runs {rate:,.0f} tokens/s: about {hours:,.2f} hours.")

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

    def _repair(self, number: int) -> None:
        (entry,) = (entry for entry in self.manifest.shards if entry.shard == number)
        contexts = self._contexts(Position(*entry.start))
        writer, _ = self._fill(number, entry.contexts, contexts)
        require(writer is not None, f"{self.corpus.name} ends before shard {number} now.")
        writer.finish(entry.crc32)

    def _extend(self, done: int) -> None:
        position = Position(*(self.manifest.position or BEGINNING))
        contexts = self._contexts(position)
        while done < self.n_contexts:
            number = self.ranks.rank + len(self.manifest.shards) * self.ranks.world_size
            wanted = min(self.contexts_per_shard, self.n_contexts - done)
            writer, after = self._fill(number, wanted, contexts)
            if writer is None:
                self.manifest.skipped = dict(self.corpus.skipped)
                tokens = self.settings.context_length * np.array([done, self.n_contexts])
                print("{} ended after {:,} tokens of {:,}.".format(self._share(), *tokens))
                return
            entry = writer.finish()
            entry.start = list(position)
            self.manifest.add(entry, writer.sum, writer.sum_squared_norm, writer.excluded)
            position = after
            self.manifest.position = list(after)
            self.manifest.skipped = dict(self.corpus.skipped)  # among all records up to here
            self.manifest.subsets = list(self.subset_numbers)
            self.manifest.write(self.manifest_path)
            done += entry.contexts

    def _fill(
        self, number: int, n_contexts: int, contexts: Iterator[Context]
    ) -> tuple[ShardWriter | None, Position | None]:
        """Run contexts through the model into a shard; also return the next position in the corpus.

        One thread reads and tokenises the next batch while the model runs, another writes the last.
        """
        contexts = itertools.islice(contexts, n_contexts)
        writer = written = position = None
        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
            upcoming = reading.submit(self._next_batch, contexts)
            while batch := upcoming.result():
                upcoming = reading.submit(self._next_batch, contexts)
                if writer is None:
                    shape = (n_contexts, self.settings.context_length, self.manifest.d_model)
                    names = ARRAYS if self.manifest.outlier_norm is None else EARLIER_ARRAYS
                    storage_dtype = self.settings.storage_dtype
                    writer = ShardWriter(self.folder, number, shape, storage_dtype, names)
                arrays, excluded, summed = self._run_batch(batch)
                if written is not None:
                    written.result()
                written = writing.submit(writer.append, excluded, summed, **arrays)
                self.progress.update(arrays["tokens"].size)
                position = batch[-1].next_position
            if written is not None:
                written.result()
        return writer, position

    def _next_batch(self, contexts: Iterator[Context]) -> list[Context]:
        return list(itertools.islice(contexts, self.settings.contexts_per_batch))

    def _run_batch(
        self, batch: list[Context]
    ) -> tuple[dict[str, np.ndarray], dict[str, int], np.ndarray]:
        """The batch for `ShardWriter.append`: arrays, counts of excluded positions, the others."""
        tokens = np.stack([context.tokens for context in batch])
        residual = residual_at(self.language_model, torch.from_numpy(tokens), self.settings.layer)
        bos = tokens == self.language_model.bos
        stored = residual.to(getattr(torch, self.settings.storage_dtype))
        arrays = {
            "activations": stored.cpu().numpy(),
            "tokens": tokens,
            "documents": np.stack([context.documents for context in batch]),
            "subsets": np.stack([self._subset_numbers(context) for context in batch]),
        }
        excluded = {"bos": int(bos.sum())}
        if self.manifest.outlier_norm is None:
            # Of what is stored, so that a shard that is made anew has the same if its activations
            # are the same.
            return arrays | {"norms": stored.float().norm(dim=-1).cpu().numpy()}, excluded, ~bos
        outliers = (residual.float().norm(dim=-1) > self.manifest.outlier_norm).cpu().numpy() & ~bos
        kept = ~(bos | outliers)
        return arrays | {"kept": kept}, excluded | {"outlier_norm": int(outliers.sum())}, kept

    def _subset_numbers(self, context: Context) -> np.ndarray:
        """The subset of each token, as an index into the manifest's list, which grows."""
        documents, inverse = np.unique(context.documents, return_inverse=True)
        numbers = [self.subset_numbers[context.subsets[document]] for document in documents]
        return np.array(numbers, np.int16)[inverse]
