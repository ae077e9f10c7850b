"""A picture of one feature: what it reads, beside what the model writes when it is changed.

The left half shows the texts where the feature is most active, shaded by its activation as a share
of its maximum. The right half shows a prompt's continuations, untouched and changed; words at
which the feature peaks are marked.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from utils import plots
from utils.characters import WORD, is_word
from utils.features.catalogue import Catalogue
from utils.influence.generations import change_title
from utils.settings import Json
from utils.terminal import one_line, wrap

READ, BETWEEN, WRITTEN = 58, 5, 52  # columns of the texts read, between, of the texts written
MARGIN = 2  # columns and lines
N_READ = 8  # texts read, each of another document; more if the texts written are longer
N_LINES = 4  # of each text written
FONT, SIZE = "DejaVu Sans Mono", 10  # every character as wide, in points
COLUMN, LINE = 0.602 * SIZE / 72, 1.9 * SIZE / 72  # inches


def draw_portrait(catalogue: Catalogue, records: Sequence[dict[str, Json]], path: Path) -> None:
    """Draw the one feature that ``records`` change, all of one prompt; see `generations`."""
    request = records[0]["request"]
    feature = request["features"][0]
    row = catalogue.features.loc[feature]
    marked = {token.strip().lower() for token in row["peak_tokens"] if is_word(token.strip())}
    written = list(_blocks(records))
    n_texts = max(N_READ, len(written))
    n_lines = n_texts + 2
    columns = READ + BETWEEN + WRITTEN
    size = (columns + 2 * MARGIN) * COLUMN, (n_lines + 2 * MARGIN) * LINE
    with plots.picture(path, f"Feature {feature}: {one_line(row['label'])}", size) as (
        figure,
        axes,
    ):
        figure.set_layout_engine("none")
        axes.set_position((0, 0, 1, 1))
        axes.set(xlim=(-MARGIN, columns + MARGIN), ylim=(n_lines + MARGIN / 2, -1.5 * MARGIN))
        axes.set_axis_off()
        _say(axes, 0, 0, "Where it is most active in the text it was found in", plots.GREY)
        for line, (text, shades) in enumerate(_read(catalogue, feature, n_texts), start=2):
            _shade(axes, 0, line, text, shades / row["max_activation"])
            _say(axes, 0, line, text)
        left = READ + BETWEEN
        prompt = _cut(request["prompt"], WRITTEN - len("After “”, the model writes"))
        _say(axes, left, 0, f"After “{prompt}”, the model writes", plots.GREY)
        for line, (text, is_title) in enumerate(written, start=2):
            if not is_title:
                _shade(axes, left, line, text, _at_words(text, marked))
            _say(axes, left, line, text, plots.GREY if is_title else plots.INK)


def _read(catalogue: Catalogue, feature: int, n: int) -> Iterator[tuple[str, np.ndarray]]:
    """Lines around the highest peaks, READ columns, and the feature activation at each column."""
    examples = catalogue.examples_of([feature])
    top = examples[examples["bucket"] == 0].sort_values("rank").drop_duplicates("document")
    for example in top.head(n).itertuples():
        texts = [one_line(text) for text in example.token_texts]
        lengths = [len(text) for text in texts]
        line = "".join(texts)
        shades = np.repeat(np.maximum(example.activations, 0), lengths)
        # The feature sees what stands to the left of its peak, which gets more of the line.
        before = sum(lengths[: example.peak]) - 3 * READ // 5
        line, shades = " " * -before + line, np.pad(shades, (max(0, -before), READ))
        start = max(0, before)
        line = line[start : start + READ]
        yield line, shades[start : start + len(line)]


def _blocks(records: Sequence[dict[str, Json]]) -> Iterator[tuple[str, bool]]:
    """The lines of the texts, each under its title; whether a line is a title; a blank between."""
    texts = {"untouched": records[0]["untouched"]}
    for record in records:
        texts[change_title(record["request"])] = record["steered"]
    for place, (title, text) in enumerate(texts.items()):
        if place:
            yield "", True
        yield _cut(title, WRITTEN), True
        lines = wrap(text, WRITTEN)
        if len(lines) > N_LINES:
            lines = [*lines[: N_LINES - 1], _cut(lines[N_LINES - 1], WRITTEN - 2) + " …"]
        yield from ((line, False) for line in lines)


def _at_words(text: str, wanted: set[str]) -> np.ndarray:
    """1 at the characters of the wanted words, else 0."""
    shades = np.zeros(len(text))
    for word in WORD.finditer(text):
        shades[word.start() : word.end()] = word[0].lower() in wanted
    return shades


def _cut(text: str, length: int) -> str:
    text = one_line(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _say(axes: Axes, column: int, line: int, text: str, colour: str = plots.INK) -> None:
    style = {"family": FONT, "size": SIZE, "va": "center", "parse_math": False}
    axes.text(column, line, text, color=colour, **style)


def _shade(axes: Axes, column: int, line: int, text: str, shades: np.ndarray) -> None:
    """Mark the characters of a text but spaces, each as strongly as its shade, from 0 to 1."""
    shades = np.where([character.isspace() for character in text], 0, shades).clip(0, 1)
    edges = [0, *(np.flatnonzero(np.diff(shades)) + 1), len(text)]
    for start, end in itertools.pairwise(edges):
        if start < end and shades[start] > 0.02:
            box = Rectangle((column + start, line - 0.45), end - start, 0.9, linewidth=0)
            axes.add_patch(box).set(facecolor=plots.ORANGE, alpha=0.55 * shades[start])
