"""Characters and words of all scripts, from tokens that split them."""

import json

import numpy as np
import pytest
from tiny_llama import save_tiny_llama
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from utils.characters import is_one_word, is_word, whole_characters, words_in
from utils.features.catalogue import save_tables
from utils.features.labels import word_at
from utils.language_model import token_texts

TEXTS = {
    "Chinese": "中国的经济增长很快，北京是首都。",
    "Hindi": "हिन्दी भारत की राजभाषा है।",
    "Japanese": "東京は日本の首都です。カタカナ",
    "emoji": "I 👍🏽 love 👨‍👩‍👧 and 🇫🇷!",
    "Arabic": "العربية لغة جميلة",
    "French": "L’été où Zoë naïve",
}


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> PreTrainedTokenizerFast:
    """Of bytes and pairs of an English text, as GPT-2's and LLaMA 3's."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("tokenizer"), ["rose tulip spade"])
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def byte_fallback() -> PreTrainedTokenizerFast:
    """Of letters, with bytes for others, as LLaMA 2's and Gemma's."""
    names = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghijklmnopqrstuvwxyz▁国"]
    numbers = {name: number for number, name in enumerate(names)}
    made = Tokenizer(models.BPE(numbers, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_texts_of_every_script_are_whole(request, kind, language):
    tokenizer, text = request.getfixturevalue(kind), TEXTS[language]
    texts = token_texts(tokenizer)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [texts[token] for token in tokens]
    assert len(pieces) > len(text)
    for weights in (None, np.random.default_rng(0).random(len(pieces))):
        whole = whole_characters(pieces, weights)
        assert "".join(whole) == text and len(whole) == len(pieces)
    for start in range(len(pieces) - 6):  # a window may cut characters at its ends, and shows none
        window = "".join(whole_characters(pieces[start : start + 6]))
        assert window in text and "\ufffd" not in window


def test_a_split_character_is_at_its_last_token_or_the_most_active():
    parts = list("中".encode().decode("ascii", "surrogateescape"))
    assert whole_characters(["a", *parts, "b"]) == ["a", "", "", "中", "b"]
    assert whole_characters(["a", *parts, "b"], [9, 1, 3, 2, 9]) == ["a", "", "中", "", "b"]
    assert whole_characters(["a", parts[0], "b"]) == ["a", "\ufffd", "b"]  # never was a character
    assert whole_characters(["a b", ""]) == ["a b", ""]


def test_the_vocabulary_keeps_its_bytes_and_not_the_name_of_bos(byte_level, tmp_path):
    import pyarrow

    texts = token_texts(byte_level)
    save_tables(tmp_path, [pyarrow.table({"feature": [0]})], texts)
    assert json.loads((tmp_path / "vocabulary.json").read_text("utf-8")) == texts
    assert texts[byte_level.bos_token_id] == "\n" and texts[byte_level.eos_token_id] == "<eos>"
    plain = byte_level("rose tulip", add_special_tokens=False)["input_ids"]
    assert "".join(texts[token] for token in plain) == "rose tulip"


def test_marks_belong_to_letters_and_ideographs_are_words():
    assert words_in("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words_in("Zoe\u0308 naïve_1, don't") == ["zoe\u0308", "naïve_1", "don", "t"]
    assert words_in("中国 東京タワー") == ["中", "国", "東", "京", "タワー"]
    assert is_word("हिन्दी") and not is_word("x1") and not is_word("") and not is_word("\u0308")
    assert is_one_word("हि", "\u0928") and is_one_word("रा", "\u093e") and is_one_word("ab", "cd")
    assert not any(is_one_word(*pair) for pair in (("中", "国"), ("a", "."), ("", "a"), ("a", "_")))
    assert word_at([" हि", "न", "\u094dदी", " भा"], 1) == "हिन्दी"
    assert word_at(["caf", "", "é", " noir"], 0) == word_at(["caf", "", "é", " noir"], 1) == "café"
    assert word_at([" the", "'", "s"], 1) == "'" and word_at([" a", "\n"], 1) == "'\\n'"
