"""Text for the terminal: quantities with units; texts wrapped, side by side, a token marked."""

import itertools
import math
from collections.abc import Sequence

from rich.cells import set_cell_size
from rich.console import Console
from rich.text import Text

BYTES = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
SECONDS = {"days": 86_400, "hours": 3_600, "minutes": 60, "seconds": 1}


def significant(number: float, digits: int = 3) -> str:
    """A number to some significant digits, with all those before the point: 61,204 or 0.0312."""
    exponent = math.floor(math.log10(abs(number))) if number else 0
    return f"{number:,.{max(0, digits - 1 - exponent)}f}"


def in_bytes(number: float) -> str:
    """A size, as 512 bytes, 9.33 MB or 616 GB."""
    for unit, size in BYTES.items():
        if number >= size:
            return f"{significant(number / size)} {unit}"
    return f"{number:.0f} bytes"


def in_time(seconds: float) -> str:
    """A duration, as 37 seconds, 50 minutes or 5.2 hours."""
    for unit, size in SECONDS.items():
        if seconds >= 2 * size:
            return f"{significant(seconds / size, 2)} {unit}"
    return "a second"


def in_rate(per_second: float, unit: str = "tokens") -> str:
    """A rate, as 436 tokens/s."""
    return f"{significant(per_second)} {unit}/s"


def mark_peak(token_texts: Sequence[str], peak: int, width: int) -> str:
    """One line of the text around the token ``token_texts[peak]``, which is marked by « »."""
    token_texts = [one_line(text) for text in token_texts]
    left, right = "".join(token_texts[:peak]), "".join(token_texts[peak + 1 :])
    word = token_texts[peak].lstrip() or token_texts[peak]
    left += token_texts[peak][: len(token_texts[peak]) - len(word)]
    room = max(2, width - len(word) - 2)
    # The left side gets more of the line, because the model's activations depend on it alone.
    kept_right = min(len(right), max(room // 3, room - len(left)))
    kept_left = room - kept_right
    if len(left) > kept_left:
        left = "…" + left[len(left) - kept_left + 1 :]
    if len(right) > kept_right:
        right = right[: max(0, kept_right - 1)] + "…"
    return f"{left}«{word}»{right}"


def one_line(text: str) -> str:
    """Text for printing within a line: line breaks as ⏎, control characters as spaces."""
    return "".join(c if c.isprintable() else " " for c in text.replace("\n", "⏎"))


def side_by_side(
    titles: tuple[str, str], texts: tuple[str, str], width: int, narrowest: int = 28
) -> str:
    """Two columns, or one text under the other if a column would be narrower than ``narrowest``."""
    column = (width - 3) // 2
    stacked = column < narrowest
    column = width if stacked else column
    pairs = zip(titles, texts, strict=True)
    blocks = [[*wrap(title, column), "─" * column, *wrap(text, column)] for title, text in pairs]
    if stacked:
        return "\n".join([*blocks[0], "", *blocks[1]])
    rows = itertools.zip_longest(*blocks, fillvalue="")
    return "\n".join(f"{set_cell_size(left, column)} │ {right}" for left, right in rows)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns of a terminal; line breaks of the text are kept."""
    lines = []
    for line in map(one_line, text.strip().split("\n")):
        lines += [row.plain.rstrip() for row in Text(line).wrap(Console(width=width), width)]
    return lines if any(lines) else ["(nothing: the text ends)"]
