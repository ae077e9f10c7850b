"""Text for the terminal: wrapped lines, two texts side by side, a marked token in its context."""

import itertools
from collections.abc import Sequence

from rich.cells import set_cell_size
from rich.console import Console
from rich.text import Text


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
