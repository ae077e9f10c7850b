"""Checks of a finished folder of activations: its files, its numbers, its text, and its model."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.activations.capture import Capture, arrays_of
from utils.activations.coding import as_floats
from utils.activations.contexts import pack_contexts
from utils.activations.corpus import Corpus, Position
from utils.activations.manifest import Manifest, ShardEntry
from utils.activations.shards import Shard
from utils.activations.store import ActivationStore, spread
from utils.language_model import LanguageModel, load_language_model
from utils.settings import require
from utils.terminal import significant

N_SAMPLED = 3  # shards whose first batch is read from the text and computed again
FARTHEST = 0.05  # of a row from the stored one, in its norms: machines round otherwise, in bfloat16
SHARE_BEYOND = 0.01  # of the rows that may be farther
OF_CONTEXT = ("tokens", "documents")  # arrays
N_SHOWN = 60  # characters


class FolderChecks:
    """What is checked of a folder, in words; the first fault is raised as an `InputError`.

    Args:
        corpus: The text that the folder was made from; None if it is not there.
    """

    def __init__(self, folder: Path, corpus: Corpus | None):
        self.store, self.corpus = ActivationStore(folder), corpus
        manifests = map(Manifest.read, sorted(folder.glob("manifest*.json")))
        self._sources = {entry.shard: (m, entry) for m in manifests for entry in m.shards}

    def run(self) -> Iterator[str]:
        """Each check in turn, the quick ones first: a sentence for each that is passed."""
        store = self.store
        yield f"Checking {store.folder}"
        for shard in tqdm(store.shards, "checking shards", unit="shard", leave=False):
            shard.verify()
        yield f"Files: {len(store.shards)} shards, every file as its checksum says."
        yield self._numbers()
        language_model = load_language_model(store.model_name, store.layer, store.dtype)
        yield self._tokens(language_model)
        sampled = [store.shards[i] for i in spread(range(len(store.shards)), N_SAMPLED)]
        recorded = all(self._sources[shard.number][1].start for shard in sampled)
        if self.corpus is None or not recorded:  # by an early version
            yield "Text: not compared."
        else:
            yield self._text(language_model, sampled)
        yield self._rows(language_model, sampled)

    def _numbers(self) -> str:
        """Counts are those of the manifest, norms are positive, contexts begin with BOS."""
        store, n_kept, ranges = self.store, 0, []
        for shard in store.shards:
            manifest, entry = self._sources[shard.number]
            kept, tokens = shard.kept(), shard["tokens"][()]
            counted = tokens != manifest.bos if shard.has_norms else kept
            self._require(
                int(counted.sum()) == entry.kept and tokens.shape[0] == entry.contexts,
                shard,
                f"has {counted.sum():,} counted positions, and {entry.kept:,} in the manifest",
            )
            if shard.has_norms:
                norms = shard["norms"][()]
                is_right = np.isfinite(norms).all() and (norms > 0).all()
                self._require(is_right, shard, "has norms that are not positive numbers")
                self._require((~counted[:, 0]).all(), shard, "has a context without BOS")
                ranges += [norms[kept].min(initial=np.inf), norms[kept].max(initial=0)]
            n_kept += int(kept.sum())
        require(
            n_kept == store.n_tokens,
            f"{store.folder} must hold the {store.n_tokens:,} kept positions of its manifest; it "
            f"holds {n_kept:,}. Delete it and save it anew.",
        )
        words = f", of norms from {significant(min(ranges))} to {significant(max(ranges))}"
        return f"Counts: {n_kept:,} kept positions, as in the manifest{words if ranges else ''}."

    def _tokens(self, language_model: LanguageModel) -> str:
        """Every token is one of the model's; what the first context's say is shown."""
        n_tokens = language_model.model.get_input_embeddings().num_embeddings
        for shard in self.store.shards:
            tokens = shard["tokens"]
            is_right = tokens.min() >= 0 and tokens.max() < n_tokens
            self._require(
                is_right, shard, f"has tokens that are not among the model's {n_tokens:,}"
            )
        (first,) = self.store.read("tokens", [0])
        text = language_model.tokenizer.decode(first, skip_special_tokens=True)
        return f"Tokens: all are the model's; the first say {text[:N_SHOWN]!r}."

    def _text(self, language_model: LanguageModel, sampled: list[Shard]) -> str:
        """The first contexts of some shards are those of the text there."""
        self.corpus.name_files_as(self._sources[sampled[0].number][0].files)
        n_contexts = 0
        for shard in sampled:
            manifest, entry = self._sources[shard.number]
            self.corpus.subset_a_file = not manifest.subset_a_folder
            start, length = Position(*entry.start), self.store.context_length
            rank = shard.number % manifest.world_size
            documents = self.corpus.documents(start, rank, manifest.world_size)
            contexts = pack_contexts(documents, language_model.tokenizer, length, start)
            n = _batch_of(entry)
            for i, context in enumerate(itertools.islice(contexts, n)):
                same = [np.array_equal(getattr(context, a), shard[a][i]) for a in OF_CONTEXT]
                self._require(
                    all(same),
                    shard,
                    f"has another text in its context {i} than {self.corpus.name} has now",
                )
                n_contexts += 1
        return f"Text: {n_contexts} contexts of {len(sampled)} shards are those of the dataset."

    def _rows(self, language_model: LanguageModel, sampled: list[Shard]) -> str:
        """The model makes of the tokens what is stored."""
        store, distances = self.store, []
        is_coded = sampled[0]["activations"].dtype == np.int8
        capture = Capture(language_model, "int8" if is_coded else str(store.storage_dtype))
        for shard in sampled:
            manifest, entry = self._sources[shard.number]
            first = (slice(0, _batch_of(entry)),)
            tokens = np.array(shard["tokens"][first])
            (computed,) = arrays_of(capture.run(tokens, {store.layer: manifest.outlier_norm}))
            stored = shard.activations(first).astype(np.float32)
            away = np.linalg.norm(as_floats(computed["activations"]) - stored, axis=-1)
            share = (away / np.linalg.norm(stored, axis=-1))[tokens != language_model.bos]
            distances.append(share)
            self._require(
                (share > FARTHEST).mean() <= SHARE_BEYOND,
                shard,
                f"holds other activations than {store.model_name} has after block {store.layer}: "
                f"the median row is {np.median(share):.2g} of its norm away",
            )
        every = np.concatenate(distances)
        return (
            f"Activations: {len(every):,} rows of {len(sampled)} shards computed again, "
            f"{(every == 0).mean():.1%} of them the same to the bit; the farthest is "
            f"{every.max():.2g} of its norm away."
        )

    def _require(self, condition: bool, shard: Shard, problem: str) -> None:
        require(
            bool(condition),
            f"Shard {shard.number} in {self.store.folder} {problem}. Its files are as they were "
            "written, so that running the same command does not repair it: put back the model and "
            "the dataset it was made from, or delete the folder and save it anew.",
        )


def _batch_of(entry: ShardEntry) -> int:
    """Contexts at the beginning of a shard that were computed together; a few if not recorded."""
    return min(entry.contexts_per_batch or 4, entry.contexts)
