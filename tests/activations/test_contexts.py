"""Contexts: documents to tokens, long ones in pieces, and the packing of tokens."""

import gzip
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import zstandard
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tables import write_table
from utils.activations import contexts, files
from utils.activations import corpus as corpus_module
from utils.activations.contexts import pack_contexts, tokenize
from utils.activations.corpus import Corpus, Document, Position
from utils.language_model import separator_token
from utils.settings import InputError

TEXTS = ["The first.", "A second one, é and 日本.", "line one\nline two", "4"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens with a BOS, as LLaMA's is, only small."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>")


def make_documents(texts: list[str]) -> list[Document]:
    return [Document(n, text, f"subset {n % 2}") for n, text in enumerate(texts)]


# Long documents ------------------------------------------------------------------------------

PIECE = 2_000  # characters, in the place of `LONGEST`
WORDS = (
    "tea",
    "  sugar",
    "12345678",
    "don't",
    "x=1;",
    "日本語。",
    "é",
    "e\u0301",
    "🙂",
    "\n\n",
    "\t",
    "\r\n",
)


@pytest.fixture(scope="module")
def long_text() -> str:
    draw = random.Random(0)
    return " ".join("".join(draw.choices(WORDS, k=3)) for _ in range(3_000))


def split_as_llama_3() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    words = (
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return bpe


def with_a_space_before(model: models.Model, scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return tokenizer


def as_llama_2(trained: Tokenizer) -> Tokenizer:
    """Its words are not split, so that merges decide where they meet."""
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trained.pre_tokenizer = pre_tokenizers.Sequence([])
    return trained


KINDS_OF_TOKENIZER = {
    "llama 3": (split_as_llama_3, trainers.BpeTrainer),
    "llama 2": (lambda: with_a_space_before(models.BPE(), "always"), trainers.BpeTrainer),
    "metaspace": (lambda: with_a_space_before(models.BPE(), "first"), trainers.BpeTrainer),
    "unigram": (lambda: with_a_space_before(models.Unigram(), "always"), trainers.UnigramTrainer),
}


@pytest.mark.parametrize("kind", KINDS_OF_TOKENIZER)
def test_the_pieces_of_a_long_document_have_its_tokens(kind, long_text, monkeypatch, capsys):
    untrained, trainer = KINDS_OF_TOKENIZER[kind]
    trained = untrained()
    options = {"vocab_size": 400, "show_progress": False}
    if trainer is trainers.UnigramTrainer:
        options |= {"special_tokens": ["<unk>"], "unk_token": "<unk>"}
    trained.train_from_iterator([long_text], trainer(**options))
    if kind == "llama 2":
        trained = as_llama_2(trained)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained)
    whole = tokenizer(long_text, add_special_tokens=False).input_ids
    monkeypatch.setattr(contexts, "LONGEST", PIECE)
    pieces = list(tokenize([Document(7, long_text, "s")], tokenizer))
    assert len(pieces) > len(long_text) / PIECE
    assert max(len(document.text) for document, _ in pieces) <= PIECE
    assert [document.ends for document, _ in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [token for _, tokens in pieces for token in tokens] == whole
    assert not capsys.readouterr().out


def test_a_text_without_a_place_to_cut_is_cut_and_said_once(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(contexts, "LONGEST", PIECE)
    documents = [Document(n, "a" * 5 * PIECE, "s") for n in range(2)]
    pieces = list(tokenize(documents, tokenizer))
    for n in range(2):
        mine = [document.text for document, _ in pieces if document.index == n]
        assert "".join(mine) == "a" * 5 * PIECE and len(mine) > 5
    assert capsys.readouterr().out.count("Document 0 is too long to be tokenised in one") == 1


def test_documents_are_tokenised_by_number_and_by_size(tokenizer, monkeypatch):
    calls = []

    def record(tokenizer, texts, are_chats):
        calls.append(list(map(len, texts)))
        return encode(tokenizer, texts, are_chats)

    encode = contexts._encode
    monkeypatch.setattr(contexts, "_encode", record)
    monkeypatch.setattr(contexts, "TOGETHER", 1_000)
    documents = make_documents(["tea"] * 100 + ["tea " * 100] * 12)
    assert len(list(tokenize(documents, tokenizer))) == 112
    assert [len(call) for call in calls] == [64, 39, 3, 3, 3]
    assert max(map(sum, calls)) < 1_000 + 400


# Packing -------------------------------------------------------------------------------------


def test_known_contexts(tokenizer):
    bos = tokenizer.bos_token_id
    first, second = (tokenizer(text, add_special_tokens=False).input_ids for text in ("zqx", "jw"))
    assert (len(first), len(second)) == (3, 2)
    documents = [Document(4, "zqx", "A"), Document(9, "jw", "B")]
    contexts = list(pack_contexts(documents, tokenizer, 3))
    # The stream is BOS z q x BOS j w; the second context goes on inside a document.
    assert contexts[0].tokens.tolist() == [bos, *first[:2]]
    assert contexts[0].documents.tolist() == [4, 4, 4]
    assert contexts[0].subsets == {4: "A"}
    assert contexts[0].next_position == Position(0, 3)
    assert contexts[1].tokens.tolist() == [bos, first[2], bos]
    assert contexts[1].documents.tolist() == [4, 4, 9]
    assert contexts[1].subsets == {4: "A", 9: "B"}
    assert contexts[1].next_position == Position(1, 1)
    assert contexts[2].tokens.tolist() == [bos, *second]
    assert contexts[2].next_position == Position(2, 0)
    assert len(contexts) == 3


def test_a_document_at_the_start_of_a_context_gets_one_bos(tokenizer):
    bos = tokenizer.bos_token_id
    contexts = list(pack_contexts(make_documents(["zqx", "jwv"]), tokenizer, 4))
    assert [context.tokens.tolist().count(bos) for context in contexts] == [1, 1]
    assert [context.next_position for context in contexts] == [Position(1, 0), Position(2, 0)]


def test_a_text_that_spells_a_special_token_does_not_have_it(tokenizer):
    assert tokenizer("zqx<bos>jw", add_special_tokens=False).input_ids.count(tokenizer.bos_token_id)
    ((_, tokens),) = tokenize(make_documents(["zqx<bos>jw"]), tokenizer)
    assert tokenizer.bos_token_id not in tokens and tokenizer.decode(tokens) == "zqx<bos>jw"


def test_contexts_hold_the_stream_and_nothing_else(tokenizer):
    documents = make_documents(TEXTS * 40)
    bos = tokenizer.bos_token_id
    contexts = list(pack_contexts(documents, tokenizer, 16))
    stream = [token for _, tokens in tokenize(documents, tokenizer) for token in tokens]
    packed = []
    for context in contexts:
        assert context.tokens.dtype == context.documents.dtype == np.int32
        assert context.tokens.shape == context.documents.shape == (16,)
        assert context.tokens[0] == bos
        assert set(context.subsets) == set(context.documents.tolist())
        assert all(context.subsets[n] == f"subset {n % 2}" for n in context.subsets)
        packed += [token for token in context.tokens.tolist() if token != bos]
    assert packed == stream[: len(packed)]
    assert len(stream) - len(packed) < 16
    owners = np.concatenate([context.documents for context in contexts])
    assert (np.diff(owners) >= 0).all()


@pytest.mark.parametrize("context_length", [2, 5, 16, 64])
def test_resuming_anywhere_gives_the_uninterrupted_run(tokenizer, context_length):
    documents = make_documents(TEXTS * 20)
    contexts = list(pack_contexts(documents, tokenizer, context_length))
    for number, context in enumerate(contexts):
        position = context.next_position
        resumed = pack_contexts(documents[position.document :], tokenizer, context_length, position)
        # Two contexts stand for all: the next position of the first leads to the second.
        pairs = zip(itertools.islice(resumed, 2), contexts[number + 1 : number + 3], strict=True)
        for again, before in pairs:
            assert again.tokens.tolist() == before.tokens.tolist()
            assert again.documents.tolist() == before.documents.tolist()
            assert again.subsets == before.subsets
            assert again.next_position == before.next_position


def test_resuming_a_rank_of_a_corpus(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"".join(json.dumps({"text": text}).encode() + b"\nbad\n" for text in TEXTS * 10)
    )
    corpus = Corpus(str(path))
    rank = {"rank": 1, "world_size": 3}
    whole = list(pack_contexts(corpus.documents(**rank), tokenizer, 8))
    position = whole[5].next_position
    rest = corpus.documents(position, **rank)
    resumed = list(pack_contexts(rest, tokenizer, 8, position))
    assert [c.tokens.tolist() for c in resumed] == [c.tokens.tolist() for c in whole[6:]]
    assert [c.documents.tolist() for c in resumed] == [c.documents.tolist() for c in whole[6:]]


def test_separator_falls_back_on_eos(tokenizer):
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    assert separator_token(other) == tokenizer.eos_token_id
    context = next(pack_contexts(make_documents(TEXTS), other, 8))
    assert context.tokens[0] == tokenizer.eos_token_id
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="BOS or EOS"):
        next(pack_contexts(make_documents(TEXTS), bare, 8))


def test_contexts_shorter_than_two_tokens_are_refused(tokenizer):
    with pytest.raises(InputError, match="CONTEXT_LENGTH must be at least 2; it is 1"):
        next(pack_contexts(make_documents(TEXTS), tokenizer, 1))


def test_too_little_text_gives_no_context(tokenizer):
    assert list(pack_contexts(make_documents(["zqx"]), tokenizer, 100)) == []


# Going on ------------------------------------------------------------------------------------

SEPARATOR = "<|endoftext|>"
LONG = " ".join(f"word{n} é" for n in range(700))  # longer than a piece


def write_corpus(folder: Path, kind: str) -> str | None:
    """Write texts, among them long, blank and broken ones, as files; returns the separator."""
    texts = [*TEXTS, " ", LONG, "日本 " * 40, *TEXTS]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[3:3] = ["no JSON", ""]
    content = "\n".join(lines).encode()
    if kind in ("parquet", "arrow", "csv"):
        for name in ("a", "b"):
            write_table(folder / f"{name}.{kind}", texts)
    elif kind == "list":
        (folder / "a.json").write_text(f"[{','.join(line for line in lines if line[:1] == '{')}]")
    elif kind == "txt":
        (folder / "a.txt").write_text(f"\ufeff{LONG}", "utf-8")
        (folder / "b.txt").write_text(LONG[::-1])
    elif kind == "separator":
        (folder / "a.txt.gz").write_bytes(gzip.compress(SEPARATOR.join(texts).encode()))
        (folder / "b.txt").write_text(SEPARATOR.join(texts))
        return SEPARATOR
    else:
        (folder / "a.jsonl").write_bytes(content)
        (folder / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    return None


@pytest.mark.parametrize("kind", ["lines", "list", "parquet", "arrow", "csv", "txt", "separator"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_going_on_from_a_place(tokenizer, tmp_path, monkeypatch, kind, world_size):
    for module in (contexts, corpus_module):
        monkeypatch.setattr(module, "LONGEST", PIECE)
    monkeypatch.setattr(files, "CHUNK", 512)
    separator = write_corpus(tmp_path, kind)
    corpus = Corpus(str(tmp_path), separator=separator)
    rank = {"rank": 0, "world_size": world_size}
    whole = list(pack_contexts(corpus.documents(**rank), tokenizer, 128))
    total = dict(corpus.skipped)
    assert len(whole) > 30 and any(context.next_position.place.byte for context in whole)
    for number, context in enumerate(whole[:-1]):
        position = Position(*json.loads(json.dumps(context.next_position)))  # as in a manifest
        resumed = pack_contexts(corpus.documents(position, **rank), tokenizer, 128, position)
        following = next(resumed)
        assert following.tokens.tolist() == whole[number + 1].tokens.tolist()
        assert following.documents.tolist() == whole[number + 1].documents.tolist()
        assert following.next_position == whole[number + 1].next_position
        # Without the place, as earlier versions wrote it.
        if number % 30 == 0:
            position = Position(*position[:2])
            resumed = pack_contexts(corpus.documents(position, **rank), tokenizer, 128, position)
            assert next(resumed).tokens.tolist() == whole[number + 1].tokens.tolist()
            assert sum(1 for _ in resumed) == len(whole) - number - 2
            assert corpus.skipped == total


def test_going_on_reads_nothing_again(tokenizer, tmp_path, monkeypatch):
    for module in (contexts, corpus_module):
        monkeypatch.setattr(module, "LONGEST", PIECE)
    for kind in ("txt", "lines"):
        (tmp_path / kind).mkdir()
        write_corpus(tmp_path / kind, kind)
        corpus = Corpus(str(tmp_path / kind))
        whole = list(pack_contexts(corpus.documents(), tokenizer, 32))
        path = corpus.files[0]
        number = next(n for n, context in enumerate(whole) if context.next_position.place.byte)
        position = whole[number].next_position
        begin = position.place.offset + position.place.byte * (kind == "txt")
        path.write_bytes(b"\xff" * begin + path.read_bytes()[begin:])
        resumed = pack_contexts(corpus.documents(position), tokenizer, 32, position)
        rest = [context.tokens.tolist() for context in resumed]
        assert begin > 0 and rest == [context.tokens.tolist() for context in whole[number + 1 :]]


@pytest.mark.parametrize("size", range(1, 32))
def test_a_separator_is_found_wherever_a_file_is_read_in_pieces(size, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", size)
    texts = ["a", "", "b <|endof", "", "", "ends with </s><|endoftext|"]
    (tmp_path / "a.txt").write_text(SEPARATOR.join(texts))
    documents = files.read_txt(tmp_path / "a.txt", separator=SEPARATOR)
    found = ["".join(parts) for _, parts in documents]
    assert found == texts
