"""Where in its document each token of a store is."""

from collections.abc import Iterable

import numpy as np

from utils.activations.shards import Shard


class DocumentPlaces:
    """Of each token, how many of its document's are before it; a BOS is none of them.

    A context is some runs of tokens of one document, each after a BOS. Only the runs are kept.
    """

    def __init__(self, shards: Iterable[Shard], context_length: int):
        self._length = context_length
        starts, documents, first = [], [], 0
        for shard in shards:
            numbers = shard["documents"][()]
            begins = np.ones(numbers.shape, bool)
            begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
            starts.append(first + np.flatnonzero(begins))
            documents.append(numbers[begins])
            first += numbers.size
        self._starts = np.concatenate(starts)
        document = np.concatenate(documents)
        n_tokens = np.diff(self._starts, append=first) - 1  # without BOS
        order = np.argsort(document, kind="stable")  # of one document they are in order
        before = np.cumsum(n_tokens[order]) - n_tokens[order]
        _, begins, counts = np.unique(document[order], return_index=True, return_counts=True)
        self._before = np.empty_like(before)
        self._before[order] = before - np.repeat(before[begins], counts)

    def of(self, contexts: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The place of tokens in their documents, int32; −1 is the BOS of a document's beginning.

        It is the index of the token among those of the document's text.
        """
        at = np.asarray(contexts, np.int64) * self._length + positions
        run = np.searchsorted(self._starts, at, side="right") - 1
        return (self._before[run] + at - self._starts[run] - 1).astype(np.int32)
