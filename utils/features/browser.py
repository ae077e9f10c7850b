"""The feature browser: a static page that needs no network and no server.

index.html         the page; this, style.css and *.js are copied from browser_page/
data/index.js      columns of all features, for the list, the filters and the map
data/search.js     further texts to search besides labels, loaded after the page is shown
data/NNNNN.js      details of `PER_FILE` features each, loaded when one is opened
pictures/          of the studies

Pages from the file system may not fetch, but may load scripts: each file of data is a call of
`receive` with a name and JSON. The page inserts text as text, never as HTML.
"""

import functools
import json
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.compute
from numpy.typing import ArrayLike
from tqdm import tqdm

from utils.artifacts import replacing
from utils.characters import readable
from utils.features.catalogue import Catalogue
from utils.settings import Json

PAGE = Path(__file__).parent / "browser_page"
PER_FILE = 32  # features whose details are in one file: some 250 kB
FILES_TOGETHER = 64  # files whose examples are in memory at once
DETAILED = (
    "promoted_tokens", "suppressed_tokens", "neighbours", "neighbour_cosines", "histogram",
    "histogram_range", "explanation",
)  # fmt: skip
# All other columns of numbers of features.parquet are scores.
STATISTICS = ("frequency", "max_activation", "mean_activation", "top_subset_share")
PLACES = ("umap_x", "umap_y")
NO_SCORES = ("feature", "dead", "histogram_range", *STATISTICS, *PLACES)
# Around a marked token of an example: see `_runs`.
OPENINGS, CLOSINGS = map(pyarrow.array, (['["', ',["', '",["'], ["]", '],"', ",1]", ',1],"']))
MEANINGS = {  # of the numbers of the summary table
    "Tokens analysed": "Tokens of {dataset} on which the features were counted.",
    "Live features": "Features active at least once on these tokens, and the size of the "
    "dictionary.",
    "Dead latents": "The rest: directions that were learnt but never used here.",
    "L0": "Features active on a token, on average. Few are easier to understand than many.",
    "Variance explained": "How much of what distinguishes activations the features rebuild; FVU is "
    "what is left.",
    "Cosine similarity": "Between an activation and its reconstruction; 1 is the same direction.",
    "Cross-entropy, untouched": "How badly the model itself predicts the next token; lower is "
    "better.",
    "Cross-entropy, reconstructed": "The same when the features alone stand in for {layer}.",
    "Cross-entropy, zero-ablated": "The same when zeros stand in for {layer}.",
    "Loss recovered": "Where the reconstruction lies between zeros (0%) and the untouched model "
    "(100%).",
    "Excluded positions": "Positions left out of training and analysis, by reason, of all that "
    "were saved.",
}


def write_browser(
    folder: Path,
    catalogue: Catalogue,
    summary: dict[str, Json],
    pictures: dict[str, Path],
    shown: dict[str, list[int]],
) -> None:
    """Write the browser of a catalogue; ``index.html`` last, so that a page is always whole.

    Args:
        summary: Of the catalogue, with names for people.
        pictures: Files by caption.
        shown: Feature numbers under ``"selected"`` and ``"random"``.
    """
    for name in ("data", "pictures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for path in pictures.values():
        shutil.copyfile(path, folder / "pictures" / path.name)
    features = catalogue.features
    index = {
        "about": {name: summary[name] for name in ("model_name", "layer", "kind", "dataset")},
        "per_file": PER_FILE,
        "facts": facts(summary),
        "pictures": [_picture(caption, path) for caption, path in pictures.items()],
        "shown": shown,
        **_columns(features),
    }
    _write(folder, "index", index)
    _write(folder, "search", _searched(features))
    _write_details(folder, catalogue)
    for path in sorted(PAGE.iterdir(), key=lambda path: path.name == "index.html"):
        with replacing(folder / path.name) as partial:
            shutil.copyfile(path, partial)


def _write(folder: Path, name: str, content: Json) -> None:
    """A script that hands ``content`` to the page.

    "<" and all that is not ASCII are escaped: no text can end a script, or depend on an encoding.
    """
    _write_text(folder, name, _as_json(content))


def _write_text(folder: Path, name: str, text: str) -> None:
    path = folder / "data" / f"{name}.js"
    path.write_text(f"receive({json.dumps(name)}, {text});\n", "ascii")


def _as_json(content: Json) -> str:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


@functools.lru_cache(2**18)
def _escaped(text: str) -> str | None:
    """A text as between the quotes of its JSON; None where it holds a part of a character."""
    return json.dumps(text)[1:-1].replace("<", "\\u003c") if readable(text) == text else None


def _columns(features: pd.DataFrame) -> dict[str, Json]:
    """The columns of all features that the page always holds."""
    subsets = features["top_subset"][features["top_subset_share"] >= 0.5].value_counts().index
    subsets = [*subsets, *sorted(set(features["top_subset"].dropna()) - set(subsets))]
    numbers = features.select_dtypes("number")
    scores = [name for name in numbers if name not in NO_SCORES and numbers[name].notna().any()]
    return {
        "subsets": subsets,
        "subset": pd.Categorical(features["top_subset"], subsets).codes.tolist(),
        "label": features["label"].fillna("").tolist(),
        "scores": scores,
        **{name: _rounded(features[name]) for name in (*STATISTICS, *PLACES, *scores)},
    }


def _rounded(values: ArrayLike, digits: int = 4) -> list[float | None]:
    """Numbers to some significant digits; None for NaN."""
    values = np.asarray(values, float).tolist()
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]


def _searched(features: pd.DataFrame) -> list[str]:
    """By feature, the texts that are searched besides its label and number, a line each."""
    texts = features.get("explanation", pd.Series("", features.index)).fillna("")
    columns = zip(texts, features["peak_tokens"], features["promoted_tokens"], strict=True)
    return [
        "\n".join([text, *_as_list(peaks), *_as_list(promoted)])
        for text, peaks, promoted in columns
    ]


def _write_details(folder: Path, catalogue: Catalogue) -> None:
    """The details of every feature, written as text: a JSON encoder takes ten times as long."""
    features = catalogue.features
    escaped = pyarrow.array(map(_escaped, catalogue.token_texts), pyarrow.string())
    with tqdm(total=len(features), desc="browser", unit="feature", unit_scale=True) as progress:
        blocks = catalogue.example_blocks(PER_FILE * FILES_TOGETHER)
        for start, examples in blocks:
            batch = features.iloc[start : start + PER_FILE * FILES_TOGETHER]
            texts = _example_texts(examples, catalogue, escaped)
            numbers = examples["feature"].to_numpy()
            ends = np.searchsorted(numbers, batch["feature"].to_numpy(), side="right")
            columns = {name: batch[name].tolist() for name in DETAILED if name in batch}
            details, first = [], 0
            for i, end in enumerate(ends.tolist()):
                row = {name: values[i] for name, values in columns.items()}
                details.append(_details(row, texts[first:end]))
                first = end
            for at in range(0, len(details), PER_FILE):
                name = f"{(start + at) // PER_FILE:05d}"
                _write_text(folder, name, f"[{','.join(details[at : at + PER_FILE])}]")
            progress.update(len(batch))


def _details(row: dict[str, Json], examples: list[str]) -> str:
    """The details of one feature, besides its columns; JSON, with that of its examples."""
    about = {
        "promoted": _as_list(row["promoted_tokens"]),
        "suppressed": _as_list(row["suppressed_tokens"]),
        "neighbours": _as_list(row["neighbours"]),
        "cosines": _rounded(_as_list(row["neighbour_cosines"]), 3),
        "histogram": _as_list(row["histogram"]),
        "range": row["histogram_range"],
        "explanation": row.get("explanation") or "",
    }
    return f'{_as_json(about)[:-1]},"examples":[{",".join(examples)}]}}'


def _example_texts(
    examples: pyarrow.Table, catalogue: Catalogue, escaped: pyarrow.StringArray
) -> list[str]:
    """The JSON of each example: bucket, peak, source, and its text in runs.

    ``escaped`` are the JSON of the tokens' texts.
    """
    if not len(examples):
        return []
    flat = (examples[name].combine_chunks().flatten() for name in ("tokens", "activations"))
    tokens, activations = (values.to_numpy().reshape(len(examples), -1) for values in flat)
    split = np.flatnonzero(escaped.is_null().to_numpy(False)[tokens].any(axis=1))
    whole = [catalogue.texts_of(tokens[i], activations[i].tolist()) for i in split]
    whole = [_escaped(text) for texts in whole for text in texts]
    place = tokens % len(escaped)  # of −1, no token, the last
    place[split] = len(escaped) + np.arange(len(whole)).reshape(-1, tokens.shape[1])
    pieces = pyarrow.concat_arrays([escaped, pyarrow.array(whole, pyarrow.string())])
    runs = _runs(pieces, place, activations, examples["peak"].to_numpy())
    names = ("bucket", "activation", "subset", "document")
    columns = [examples[name].to_pylist() for name in names]
    places = [""] * len(examples)
    if "place" in examples.column_names:  # earlier versions did not record it
        places = [f", token {place}" for place in examples["place"].to_pylist()]
    source = {subset: _escaped(f"{subset} · document ") for subset in set(columns[2])}
    return [
        f'{{"bucket":{bucket},"peak":{activation:.4g},"source":"{source[subset]}{document}{token}",'
        f'"runs":[{text}]}}'
        for text, token, bucket, activation, subset, document in zip(
            runs, places, *columns, strict=True
        )
    ]


def _runs(
    pieces: pyarrow.StringArray, place: np.ndarray, activations: np.ndarray, peak: np.ndarray
) -> list[str]:
    """The JSON of each example's text in runs, without the brackets around them.

    Runs are strings where the feature is silent and [token, activation] where it is active; the
    token at the peak has a third entry. All examples are joined at once, by Arrow: a loop in
    Python takes several times as long.

    Args:
        pieces: The JSON of texts.
        place: Of each token's text among them, shape (examples, tokens). A token whose character is
            another one's is empty.
        activations: Of the same shape.
        peak: Where the peaks are, shape (examples,).
    """
    last, has_text = place.shape[1] - 1, pyarrow.compute.binary_length(pieces).to_numpy(False) > 0
    marked = (activations > 0) & has_text[place]
    marked[np.arange(len(marked)), peak] = True
    row, column = np.nonzero(marked)
    # 0 where the example begins, 1 after a marked token, 2 after a silent one, whose string ends.
    before = np.where(column == 0, 0, 2 - marked[row, column - 1])
    silent_next = (column < last) & ~marked[row, np.minimum(column + 1, last)]
    after = silent_next + 2 * (column == peak[row])
    numbers = pyarrow.array([f"{value:.3g}" for value in activations[marked].tolist()])
    tokens = pyarrow.compute.binary_join_element_wise(
        OPENINGS.take(pyarrow.array(before)), pieces.take(pyarrow.array(place[marked])), '",',
        numbers, CLOSINGS.take(pyarrow.array(after)), "",
    )  # fmt: skip
    ends = len(pieces) + np.where(marked[:, [0, -1]], 0, 1)  # a quote around silent ones
    place = np.column_stack([ends[:, 0], place, ends[:, 1]])
    place[row, 1 + column] = len(pieces) + 2 + np.arange(len(row))
    pieces = pyarrow.concat_arrays([pieces, pyarrow.array(["", '"']), tokens])
    starts = pyarrow.array(np.arange(len(place) + 1, dtype=np.int32) * place.shape[1])
    lists = pyarrow.ListArray.from_arrays(starts, pieces.take(pyarrow.array(place.ravel())))
    texts = pyarrow.compute.binary_join(lists, "").to_pylist()
    return [text.removesuffix(',""') for text in texts]  # silent tokens without a text


def _picture(caption: str, file: Path) -> dict[str, Json]:
    width, height = struct.unpack(">II", file.read_bytes()[16:24])  # so that text does not jump
    return {"file": file.name, "caption": caption, "width": width, "height": height}


def _as_list(values: object) -> list:
    """A cell of a list column; dead features may have none there."""
    return values if isinstance(values, list) else []


def facts(summary: dict[str, Json]) -> list[tuple[str, str, str]]:
    """Rows of the summary table: a name, its value, its meaning in plain words."""
    losses, layer = summary["cross_entropy"], f"layer {summary['layer']}"
    excluded = [f"{n:,} {reason.replace('_', ' ')}" for reason, n in summary["excluded"].items()]
    explained = f"{1 - summary['fvu']:.1%}"
    if "held_out_fvu" in summary:
        explained += f"; {1 - summary['held_out_fvu']:.1%} on tokens held out of training"
    values = {
        "Tokens analysed": f"{summary['n_tokens']:,}",
        "Live features": f"{summary['n_alive']:,} of {summary['n_latents']:,}",
        "Dead latents": f"{summary['dead_fraction']:.1%}",
        "L0": f"{summary['l0']:,.1f}",
        "Variance explained": explained,
        "Cosine similarity": f"{summary['cosine']:.3f}",
        "Cross-entropy, untouched": f"{losses['untouched']:.3f} nats",
        "Cross-entropy, reconstructed": f"{losses['reconstruction']:.3f} nats",
        "Cross-entropy, zero-ablated": f"{losses['zero_ablated']:.3f} nats",
        "Loss recovered": f"{summary['loss_recovered']:.1%}",
        "Excluded positions": "; ".join(excluded) or "none",
    }
    about = {"dataset": summary["dataset"], "layer": layer}
    return [(name, value, MEANINGS[name].format(**about)) for name, value in values.items()]
