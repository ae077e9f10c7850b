"""Examples: the texts that features are active in, kept while streaming, and drawn to be studied.

A feature's examples are its `N_TOP` highest, bucket 0, and a few random ones of each of `N_BUCKETS`
equal parts between its maximum and 0. An example is a window of `WINDOW` tokens around a peak.
"""

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.compute

from utils.characters import readable, whole_characters

N_TOP = 20  # highest examples of a feature ("Scaling Monosemanticity" shows 20)
N_BUCKETS = 5  # evenly spaced between the maximum and 0
N_PER_BUCKET = 3  # random examples of each
WINDOW = 48  # tokens of an example
WINDOW_BEFORE = 32  # of these, before the peak
HALF_OCTAVES = 32  # bins of activation, mostly 2^-8 to 2^8, that random examples are kept for
PER_HALF_OCTAVE = 4
AROUND = 12  # tokens to each side of a peak; examples that agree in all of them are the same text


def window_start(position: np.ndarray, context_length: int) -> np.ndarray:
    """Where the window around a peak begins in its context."""
    return np.clip(position - WINDOW_BEFORE, 0, max(0, context_length - WINDOW))


class BestPerGroup:
    """Of a stream of entries, the ``size`` of highest priority in each group.

    Entries are dictionaries of arrays of equal length, among them ``group`` and ``priority``. If
    they have a ``text``, only the best of a group's entries with the same one is kept.
    """

    def __init__(self, n_groups: int, size: int):
        self.size = size
        self.threshold = np.full(n_groups, -np.inf, np.float32)
        self._parts: list[dict[str, np.ndarray]] = []
        self._pending = 0

    def wants(self, group: np.ndarray, priority: np.ndarray) -> np.ndarray:
        """Which entries could still be among the best, bool, of the entries' length."""
        return priority > self.threshold[group]

    def add(self, entries: dict[str, np.ndarray]) -> None:
        self._parts.append(entries)
        self._pending += len(entries["group"])
        if self._pending > max(100_000, self.size * len(self.threshold) // 4):
            self.best()

    def best(self) -> dict[str, np.ndarray]:
        """The best entries so far, by group and falling priority, with their ``rank``."""
        parts, self._parts = self._parts, []
        names = [name for name in parts[0] if name != "rank"]

        def join(name):  # a column at a time, for the largest are most of the memory
            return np.concatenate([part.pop(name) for part in parts])

        columns = {name: join(name) for name in ("group", "priority")}
        order = np.lexsort((-columns["priority"], columns["group"]))
        if "text" in names:
            columns["text"] = join("text")
            order = order[_first_of_each(columns["group"][order], columns["text"][order])]
        group = columns["group"][order]
        starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else order
        lengths = np.diff(np.r_[starts, len(group)])
        rank = np.arange(len(group)) - np.repeat(starts, lengths)
        last = rank == self.size - 1
        self.threshold[group[last]] = columns["priority"][order][last]
        kept = order[rank < self.size]
        best = {name: (columns[name] if name in columns else join(name))[kept] for name in names}
        best["rank"] = rank[rank < self.size]
        self._parts, self._pending = [best], 0
        return dict(best)


def _first_of_each(*keys: np.ndarray) -> np.ndarray:
    """The indices, rising, at which combinations of keys occur for the first time."""
    order = np.lexsort(keys)  # stable: of equal keys the first stays first
    changes = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    return np.sort(order[np.r_[True, changes]]) if len(order) else order


def text_around(tokens: np.ndarray) -> np.ndarray:
    """A hash of the `AROUND` tokens to each side of every position, uint64, of the tokens' shape.

    ``tokens`` are of shape (contexts, context_length); positions outside count as a further token.
    """
    padded = np.pad(tokens.astype(np.int64) + 1, ((0, 0), (AROUND, AROUND))).astype(np.uint64)
    text = np.zeros(tokens.shape, np.uint64)
    for offset in range(2 * AROUND + 1):
        text = text * np.uint64(0x9E3779B97F4A7C15) + padded[:, offset : offset + tokens.shape[1]]
    return text


def draw_examples(
    examples: pyarrow.Table, token_texts: list[str], n_features: int, seed: int
) -> pd.DataFrame:
    """The examples, of `catalogue.example_table`, of ``n_features`` living features at random.

    All of them if there are fewer; with a column ``token_texts``.
    """
    alive = np.unique(examples["feature"].to_numpy())
    drawn = np.random.default_rng(seed).permutation(alive)[:n_features]
    chosen = pyarrow.compute.is_in(examples["feature"], pyarrow.array(drawn))
    table = examples.filter(chosen).to_pandas()
    text = np.array([*token_texts, ""], dtype=object)  # −1, no token, is the last
    windows = zip(table["tokens"], table["activations"], strict=True)
    return table.assign(token_texts=[whole_characters(text[t], values) for t, values in windows])


def text_at(token_texts: list[str], tokens: np.ndarray, place: int) -> str:
    """The text of the token at ``place`` among ``tokens``, −1 for none; a split character whole."""
    text = token_texts[tokens[place]]
    if readable(text) == text:
        return text
    pieces = [token_texts[token] if token >= 0 else "" for token in tokens]
    return whole_characters(pieces, np.arange(len(tokens)) == place)[place] or readable(text)


def used_for_label(examples: pd.DataFrame) -> pd.Series:
    """Every other one of the highest, so that the scored examples are as active."""
    return (examples["bucket"] == 0) & (examples["rank"] % 2 == 0)


def unused_examples(examples: pd.DataFrame) -> pd.DataFrame:
    """The examples that are not `used_for_label`, one a context.

    A random example may also be one of the highest: both are the peaks of contexts.
    """
    used = used_for_label(examples).to_numpy()
    contexts = pd.MultiIndex.from_frame(examples[["feature", "context"]])
    unused = examples[~used & ~contexts.isin(contexts[used])]
    return unused.drop_duplicates(["feature", "context"])
