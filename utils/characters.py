"""Characters and words of all scripts, in texts that come a token at a time.

A character outside ASCII may be split between tokens. The text of a token then holds the bytes of
its part as Python's ``surrogateescape`` does, until `whole_characters` joins them.
"""

import re
import unicodedata
from collections.abc import Sequence

ESCAPED = "\udc80-\udcff"  # bytes that are no whole character
_NEXT, _ESCAPE = "[\udc80-\udcbf]", re.compile(f"[{ESCAPED}]")
# A character of escaped bytes; a part of one, cut at an edge of the text; anything else.
_CHARACTER = re.compile(
    f"((?:[\udcc2-\udcdf]|[\udce0-\udcef]{_NEXT}|[\udcf0-\udcf4]{_NEXT}{{2}}){_NEXT})"
    f"|(\\A{_NEXT}{{1,3}}|[\udcc2-\udcf4]{_NEXT}{{0,2}}\\Z)|.",
    re.DOTALL,
)
# Marks belong to letters, as in Hindi, and joiners to words; Chinese and kana have no spaces, and
# each character counts as a word, as by Unicode's rules.
_MARKS = "".join(c for c in map(chr, range(0x300, 0xE01F0)) if unicodedata.category(c)[0] == "M")
_IDEOGRAPHS = "\u3041-\u3096\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
IDEOGRAPH = re.compile(f"[{_IDEOGRAPHS}]")
WORD = re.compile(f"[{_IDEOGRAPHS}]|(?:(?![{_IDEOGRAPHS}])[\\w{_MARKS}\u200c\u200d])+")


def readable(text: str) -> str:
    """The text of a token alone, with a sign in place of a part of a character."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def whole_characters(pieces: Sequence[str], weights: Sequence[float] | None = None) -> list[str]:
    """The texts of tokens that follow one another, with every character whole in one of them.

    A split character goes to that of its tokens with the largest of ``weights``, or to the last of
    them, for only there the model knows it. Parts of characters at both ends are left out.
    """
    whole = list(pieces)
    parts = [i for i, text in enumerate(pieces) if not text.isascii() and _ESCAPE.search(text)]
    if not parts:
        return whole
    # From the first to the last token with a part, and a text beside them that is no edge.
    first = next((i for i in range(parts[0] - 1, -1, -1) if pieces[i]), parts[0])
    last = next((i for i in range(parts[-1] + 1, len(pieces)) if pieces[i]), parts[-1]) + 1
    whole[first:last] = _joined(
        pieces[first:last], None if weights is None else weights[first:last]
    )
    return whole


def _joined(pieces: Sequence[str], weights: Sequence[float] | None) -> list[str]:
    """`whole_characters`, a character at a time."""
    text = "".join(pieces)
    token = [place for place, piece in enumerate(pieces) for _ in piece]
    whole = [""] * len(pieces)
    for found in _CHARACTER.finditer(text):
        start, place = token[found.start()], token[found.end() - 1]
        if start < place and weights is not None:
            place = max(range(place, start - 1, -1), key=weights.__getitem__)  # of equals the last
        if not found[2]:
            whole[place] += found[0] if found[0].isascii() else readable(found[0])
    return whole


def escaped_text(token: str) -> str | None:
    """The text of a token of bytes, written ``<0xE4>`` or as GPT-2's are; None for others."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)]).decode("utf-8", "surrogateescape")
    try:
        return bytes(map(_BYTES.__getitem__, token)).decode("utf-8", "surrogateescape")
    except KeyError:
        return None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself, or if it is not printable one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + n): b for n, b in enumerate(rest)}


_BYTES = _byte_alphabet()


def words_in(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


def is_word(text: str) -> bool:
    """Whether a text is of letters and their marks alone."""
    return text[:1].isalpha() and all(c.isalpha() or c in _JOINED for c in text)


_JOINED = frozenset(_MARKS + "\u200c\u200d")


def is_one_word(left: str, right: str) -> bool:
    """Whether two neighbouring texts are parts of one word."""
    pair = left[-1:] + right[:1]
    return len(pair) == 2 and "_" not in pair and bool(WORD.fullmatch(pair))
