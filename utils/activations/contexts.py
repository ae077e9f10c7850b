"""Contexts: rows of tokens for the language model, packed from documents.

A tokenizer takes memory and time for a text as a whole, so a long document is tokenised in pieces.
It is cut where the text around has the same tokens in one and apart. Where two tokens of the whole
meet, those of neither side depend on the other, so the pieces have the tokens of the whole.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from utils.activations.corpus import BEGINNING, LONGEST, Document, Place, Position
from utils.language_model import separator_token
from utils.settings import require

N_TOGETHER = 64  # documents a call: enough to keep the tokenizer's threads busy
TOGETHER = 2**20  # characters a call, of which each takes the tokenizer 130 bytes of memory
AROUND = 256  # characters to each side of a cut that must have the same tokens in one and apart
N_TRIED = 64  # spaces that a cut is tried at, and other borders of words


@dataclasses.dataclass(frozen=True)
class Context:
    """A row of tokens for the language model. A BOS belongs to the document that follows it."""

    tokens: np.ndarray  # int32, shape (context_length,); the first is BOS
    documents: np.ndarray  # int32, shape (context_length,): `Document.index` of each token
    subsets: dict[int, str]  # the subset of each of these documents
    next_position: Position  # where the stream goes on after this context


# ------------------------------------------------------------------------------------ tokenising


def tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Document, list[int]]]:
    """Each document, a long one in pieces, with the tokens of its text."""
    batch, size = [], 0
    for document in cut(documents, tokenizer):
        if batch and document.is_chat != batch[0].is_chat:
            yield from _tokenize_together(batch, tokenizer)
            batch, size = [], 0
        batch.append(document)
        size += len(document.text)
        if len(batch) == N_TOGETHER or size >= TOGETHER:
            yield from _tokenize_together(batch, tokenizer)
            batch, size = [], 0
    if batch:
        yield from _tokenize_together(batch, tokenizer)


def _tokenize_together(
    batch: list[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Document, list[int]]]:
    """All chats, or none."""
    texts = [document.text for document in batch]
    return zip(batch, _encode(tokenizer, texts, batch[0].is_chat), strict=True)


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], are_chats: bool
) -> list[list[int]]:
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=not are_chats,  # a text that spells BOS has no BOS
        return_attention_mask=False,
        verbose=False,  # no warning about texts longer than the model's context
    )["input_ids"]


def cut(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Documents, those longer than `LONGEST` in pieces that have the tokens of the whole.

    It prints once if it finds no place for a cut in a document.
    """
    rest, is_told = None, False
    for document in documents:
        if rest is not None:
            text = rest.text + document.text
            document = dataclasses.replace(rest, text=text, ends=document.ends)
        while len(document.text) > LONGEST:
            places = find_cut(document, tokenizer)
            if places is None and not is_told:
                is_told = True
                tqdm.write(
                    f"Document {document.index} is too long to be tokenised in one, and its text "
                    "has no place where the tokens do not depend on both sides: where it is cut "
                    f"they may differ, once in {LONGEST:,} characters."
                )
            end, start = places or (LONGEST - AROUND, LONGEST - AROUND)
            yield dataclasses.replace(document, text=document.text[:end], ends=False)
            document = _without(document, start)
        rest = None if document.ends else document
        if document.ends:
            yield document


def _without(document: Document, n: int) -> Document:
    """A document without its first ``n`` characters."""
    place, text = document.place, document.text
    if place is not None:
        place = place._replace(byte=place.byte + len(text[:n].encode()))
    return dataclasses.replace(document, text=text[n:], place=place)


def find_cut(document: Document, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """Where a long document can be cut: the end of the first piece, and the start of the next.

    These are one place, between a word and a space, say, unless the tokenizer sets a space before
    every text: then the space there is left out. None if there is no such place.
    """
    text, is_chat = document.text, document.is_chat
    ends = range(LONGEST - AROUND, LONGEST // 2, -1)
    spaces = (end for end in ends if text[end] == " " != text[end - 1])
    borders = (end for end in ends if _kind(text[end]) != _kind(text[end - 1]))
    for end in itertools.chain(
        itertools.islice(spaces, N_TRIED), itertools.islice(borders, N_TRIED)
    ):
        left = text[end - AROUND : end]
        for start in (end, end + 1) if text[end] == " " else (end,):
            right = text[start : start + AROUND]
            whole, *apart = _encode(
                tokenizer, [left + text[end:start] + right, left, right], is_chat
            )
            if whole == apart[0] + apart[1]:
                return end, start
    return None


def _kind(character: str) -> tuple[bool, bool]:
    return character.isspace(), character.isalnum()


# --------------------------------------------------------------------------------------- packing


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
        documents: A rank's documents from ``start`` on.
        start: The ``next_position`` of an earlier run's last context continues that run exactly.
    """
    require(context_length >= 2, f"CONTEXT_LENGTH must be at least 2; it is {context_length}.")
    separator = separator_token(tokenizer)
    number, offset, place = start
    before = Place(*place).token if place and offset else 0  # tokens of the document so far
    context = np.empty((2, context_length), dtype=np.int32)  # tokens, documents
    filled, subsets = 0, {}
    for document, text_tokens in tokenize(documents, tokenizer):
        tokens = np.array(text_tokens if before else [separator, *text_tokens], dtype=np.int32)
        place = document.place and document.place._replace(token=before)
        after = before + len(tokens)
        while offset < after:
            if filled == 0 and offset > 0:
                context[:, 0] = separator, document.index
                filled = 1
            taken = tokens[offset - before :][: context_length - filled]
            end = filled + len(taken)
            context[0, filled:end] = taken
            context[1, filled:end] = document.index
            subsets[document.index] = document.subset
            filled, offset = end, offset + len(taken)
            if filled == context_length:
                is_whole = document.ends and offset == after
                following = (number + 1, 0) if is_whole else (number, offset)
                yield Context(*context.copy(), subsets, Position(*following, place))
                filled, subsets = 0, {}
        before = after
        if document.ends:
            number, offset, before = number + 1, 0, 0
