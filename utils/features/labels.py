"""The meaning of a feature in words, without a language model.

Its label is the tokens at the peaks of its highest examples. Its explanation is a phrase: the words
at these peaks, the list or the kind of text that holds most of them, and words commoner around
them than elsewhere.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from utils.characters import WORD, is_one_word, is_word, whole_characters
from utils.features.concepts import CONCEPTS
from utils.features.examples import used_for_label

SHARE = 0.5  # of the highest examples, that a list or a kind of text must hold to be the concept
COMMON = 0.3  # of them, that must peak at a word for it to belong to the concept
LISTED = {name: {word.lower() for word in words} for name, words in CONCEPTS.items()}
NEAR, LIFT = 0.3, 5.0  # share of the examples with a word, and how many times that elsewhere
N_WORDS = 3  # shown of each kind
SIGNS = {"'\\n'": "↵", "' '": "␣", "'\\n\\n'": "↵↵", "'\\t'": "⇥"}
BESIDE = 4  # tokens to each side of a peak that its word is looked for in


def make_label(peak_tokens: list[str], n_words: int = 3) -> str:
    """The commonest peak tokens as a provisional name; words that differ in case count as one."""
    names: dict[str, str] = {}
    for token in peak_tokens:
        name = token.strip() or ("↵" if "\n" in token else "␣")
        names.setdefault(name.lower(), name)
    return ", ".join(list(names.values())[:n_words])


class Concept(NamedTuple):
    """What a feature seems to be about: words in lower case, a list's name, a corpus subset."""

    words: frozenset[str]
    listed: str | None
    subset: str | None


def word_at(token_texts: Sequence[str], place: int) -> str:
    """The word in lower case that the token at ``place`` is part of; signs stay as they are."""
    place = sum(map(bool, token_texts[:place]))  # the others are parts of characters
    token_texts = [text for text in token_texts if text] or [""]
    place = min(place, len(token_texts) - 1)
    text = token_texts[place].strip()
    if not text or WORD.sub("", text) or "_" in text:
        return token_texts[place].strip().lower() or repr(token_texts[place])
    first, last = place, place
    while first > 0 and is_one_word(token_texts[first - 1], token_texts[first]):
        first -= 1
    while last + 1 < len(token_texts) and is_one_word(token_texts[last], token_texts[last + 1]):
        last += 1
    return "".join(token_texts[first : last + 1]).strip().lower()


def find_concept(examples: pd.DataFrame, subset_shares: dict[str, float]) -> Concept:
    """The concept of examples, with columns ``word`` and ``subset``.

    A subset is part of it only if it is twice as common here as in all text, ``subset_shares``.
    """
    n = max(1, len(examples))
    counts = Counter(examples["word"])
    words = {word for word, count in counts.items() if count >= max(2, COMMON * n)}
    words |= {counts.most_common(1)[0][0]} if counts else set()
    shares = {name: sum(counts[word] for word in listed) / n for name, listed in LISTED.items()}
    listed = max(shares, key=shares.get)
    listed = listed if shares[listed] > SHARE else None
    if listed:
        words |= LISTED[listed]
    subset, count = Counter(examples["subset"]).most_common(1)[0]
    holds = count / n > max(SHARE, 2 * subset_shares[subset])
    return Concept(frozenset(words), listed, subset if holds else None)


class Explanation(NamedTuple):
    """A phrase, the concept and the words around the peaks that it is made of."""

    concept: Concept
    around: frozenset[str]
    text: str


def explain(
    examples: pd.DataFrame, token_texts: list[str], subset_shares: dict[str, float]
) -> dict[int, Explanation]:
    """The explanation of each feature that has highest examples, of `catalogue.example_table`."""
    examples = examples[used_for_label(examples)]
    words = [
        _peak_word(token_texts, tokens, peak)
        for tokens, peak in zip(examples["tokens"], examples["peak"], strict=True)
    ]
    examples = examples.assign(word=words, subset=examples["subset"].astype(str))
    around = words_around(examples, token_texts)
    explanations = {}
    for feature, group in examples.groupby("feature"):
        concept = find_concept(group, subset_shares)
        near = [word for word in around.get(feature, ()) if word not in concept.words][:N_WORDS]
        counts = Counter(group["word"]).most_common()
        words = [word for word, _ in counts if word in concept.words][:N_WORDS]
        scattered = counts[0][1] == 1 and len(counts) > 1 and not concept.listed
        text = phrase(
            [word for word, _ in counts][:2] if scattered else words, concept, near, scattered
        )
        explanations[int(feature)] = Explanation(concept, frozenset(near), text)
    return explanations


def _peak_word(token_texts: list[str], tokens: np.ndarray, peak: int) -> str:
    for beside in (BESIDE, len(tokens)):  # of parts of characters, a word may be any number
        start = max(0, peak - beside)
        nearby = tokens[start : peak + beside + 1]
        pieces = [token_texts[i] if i >= 0 else "" for i in nearby]
        whole = whole_characters(pieces, np.arange(len(pieces)) == peak - start)
        if whole == pieces:
            break
    return word_at(whole, peak - start)


def words_around(examples: pd.DataFrame, token_texts: list[str]) -> dict[int, list[str]]:
    """Of each feature, words that set its examples apart, the most telling first.

    They are in a share `NEAR` of these, and in `LIFT` times as large a share as of all examples.
    """
    begins_word = np.array(
        [text[:1] == " " and len(text) > 4 and is_word(text[1:]) for text in [*token_texts, ""]]
    )
    tokens = np.stack(examples["tokens"].to_numpy())
    row, column = np.nonzero(begins_word[tokens])
    features, number, sizes = np.unique(
        examples["feature"], return_inverse=True, return_counts=True
    )
    n_tokens = len(token_texts)  # pairs are packed into one number, which sorts far faster
    row, token = np.divmod(np.unique(row * n_tokens + tokens[row, column]), n_tokens)  # once each
    everywhere = np.bincount(token, minlength=n_tokens) / len(examples)
    pairs, count = np.unique(number[row] * n_tokens + token, return_counts=True)
    owner, token = np.divmod(pairs, n_tokens)
    share = count / sizes[owner]
    telling = (count > 1) & (share >= NEAR) & (share >= LIFT * everywhere[token])
    owner, token, share = owner[telling], token[telling], share[telling]
    words: dict[int, list[str]] = {}
    for i in np.argsort(-share * np.log(share / everywhere[token]), kind="stable"):
        word = token_texts[token[i]].strip().lower()
        if word not in words.setdefault(int(features[owner[i]]), []):
            words[int(features[owner[i]])].append(word)
    return words


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
