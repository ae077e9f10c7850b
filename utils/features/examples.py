"""Examples: the texts that features are active in, kept while streaming, and drawn to be studied.

A feature's examples are its `N_TOP` highest, bucket 0, and a few random ones of each of `N_BUCKETS`
equal parts between its maximum and 0. An example is a window of `WINDOW` tokens around a peak.
"""

from typing import TypeVar

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


Array = TypeVar("Array")  # of NumPy or PyTorch


def window_start(position: Array, context_length: int) -> Array:
    """Where the window around a peak begins in its context."""
    return (position - WINDOW_BEFORE).clip(0, max(0, context_length - WINDOW))


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
