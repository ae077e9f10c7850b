"""What a feature is about, in a phrase made without a language model.

It is made of the words at the peaks of its highest examples, the list or the kind of text that
these belong to, and words commoner around them than elsewhere.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pandas as pd

from utils.features.studies.specificity import Concept, chosen_from, find_concept, word_at

NEAR, LIFT = 0.3, 5.0  # of the examples a word must be in, and how much commoner than elsewhere
N_WORDS = 3  # shown of each sort
SIGNS = {"'\\n'": "↵", "' '": "␣", "'\\n\\n'": "↵↵", "'\\t'": "⇥"}
BESIDE = 4  # tokens to each side of a peak that its word is looked for in


class Explanation(NamedTuple):
    """A phrase and what it is made of."""

    concept: Concept
    around: frozenset[str]
    text: str


def explain(
    examples: pd.DataFrame, pieces: list[str], subset_shares: dict[str, float]
) -> dict[int, Explanation]:
    """The explanation of each feature that has examples to take it from.

    Args:
        examples: Columns as of `tables.example_table`.
    """
    examples = examples[chosen_from(examples)]
    words = [
        _peak_word(pieces, tokens, peak)
        for tokens, peak in zip(examples["tokens"], examples["peak"], strict=True)
    ]
    examples = examples.assign(word=words, subset=examples["subset"].astype(str))
    around = words_around(examples, pieces)
    found = {}
    for feature, own in examples.groupby("feature"):
        concept = find_concept(own, subset_shares)
        near = [word for word in around.get(feature, ()) if word not in concept.words][:N_WORDS]
        counts = Counter(own["word"]).most_common()
        words = [word for word, _ in counts if word in concept.words][:N_WORDS]
        scattered = counts[0][1] == 1 and len(counts) > 1 and not concept.listed
        text = phrase(
            [word for word, _ in counts][:2] if scattered else words, concept, near, scattered
        )
        found[int(feature)] = Explanation(concept, frozenset(near), text)
    return found


def _peak_word(pieces: list[str], tokens: np.ndarray, peak: int) -> str:
    start = max(0, peak - BESIDE)
    some = [pieces[token] if token >= 0 else "" for token in tokens[start : peak + BESIDE + 1]]
    return word_at(some, peak - start)


def words_around(examples: pd.DataFrame, pieces: list[str]) -> dict[int, list[str]]:
    """Of each feature, words that its examples have and others lack, the most telling first.

    A word is in a share `NEAR` of them, and in `LIFT` times as large a share as of all examples.
    """
    own_word = np.array([p[:1] == " " and len(p) > 4 and p[1:].isalpha() for p in [*pieces, ""]])
    tokens = np.stack(examples["tokens"].to_numpy())
    row, column = np.nonzero(own_word[tokens])
    features, number, sizes = np.unique(
        examples["feature"], return_inverse=True, return_counts=True
    )
    n_tokens = len(pieces)  # pairs are packed into one number, which sorts far faster
    row, token = np.divmod(np.unique(row * n_tokens + tokens[row, column]), n_tokens)  # once each
    everywhere = np.bincount(token, minlength=n_tokens) / len(examples)
    pairs, count = np.unique(number[row] * n_tokens + token, return_counts=True)
    owner, token = np.divmod(pairs, n_tokens)
    share = count / sizes[owner]
    telling = (count > 1) & (share >= NEAR) & (share >= LIFT * everywhere[token])
    owner, token, share = owner[telling], token[telling], share[telling]
    found: dict[int, list[str]] = {}
    for i in np.argsort(-share * np.log(share / everywhere[token]), kind="stable"):
        word = pieces[token[i]].strip().lower()
        if word not in found.setdefault(int(features[owner[i]]), []):
            found[int(features[owner[i]])].append(word)
    return found


def phrase(words: list[str], concept: Concept, around: list[str], scattered: bool = False) -> str:
    """An explanation in words: forms of “feel” near “heart”, in Gutenberg.

    ``scattered`` words are each at one peak alone.
    """
    shortest = min(words, key=len)
    stem = shortest[: max(4, len(shortest) - 1)]
    if concept.listed:
        text = f"{concept.listed} such as {_quoted(words[:2])}"
    elif scattered:
        text = f"various words such as {_quoted(words)}"
    elif len(words) > 1 and len(stem) > 3 and all(word.startswith(stem) for word in words):
        text = f"forms of {_quoted([shortest])}"
    else:
        text = _quoted(words)
    text += f" near {_quoted(around)}" if around else ""
    return text + (f", in {concept.subset}" if concept.subset else "")


def _quoted(words: list[str]) -> str:
    return ", ".join(f"“{SIGNS.get(word, word)}”" for word in words)
