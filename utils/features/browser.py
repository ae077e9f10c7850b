"""The feature browser: a static page that needs no network and no server.

index.html         the page; this, style.css and *.js are copied from browser_page/
data/index.js      columns of all features, for the list, the filters and the map
data/search.js     further texts to search besides labels, loaded after the page is shown
data/NNNNN.js      details of `PER_FILE` features each, loaded when one is opened
pictures/          of the studies

Pages from the file system may not fetch, but may load scripts: each file of data is a call of
`receive` with a name and JSON. The page inserts text as text, never as HTML.
"""

import json
import math
import shutil
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from tqdm import tqdm

from utils.artifacts import replacing
from utils.features.catalogue import Catalogue
from utils.settings import Json

PAGE = Path(__file__).parent / "browser_page"
PER_FILE = 32  # features whose details are in one file: some 250 kB
FILES_TOGETHER = 16  # files whose examples are in memory at once
# All other columns of numbers of features.parquet are scores.
STATISTICS = ("frequency", "max_activation", "mean_activation", "top_subset_share")
PLACES = ("umap_x", "umap_y")
NO_SCORES = ("feature", "dead", "histogram_range", *STATISTICS, *PLACES)
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
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    path = folder / "data" / f"{name}.js"
    path.write_text(f"receive({json.dumps(name)}, {text});\n", "ascii")


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
    features = catalogue.features
    together = PER_FILE * FILES_TOGETHER
    with tqdm(total=len(features), desc="browser", unit="feature", unit_scale=True) as progress:
        for start in range(0, len(features), together):
            batch = features.iloc[start : start + together]
            examples = catalogue.examples_of(batch["feature"].tolist())
            groups = dict(list(examples.sort_values(["bucket", "rank"]).groupby("feature")))
            details = [_details(row, groups.get(row.feature)) for row in batch.itertuples()]
            for first in range(0, len(details), PER_FILE):
                number = (start + first) // PER_FILE
                _write(folder, f"{number:05d}", details[first : first + PER_FILE])
            progress.update(len(batch))


def _details(row: NamedTuple, examples: pd.DataFrame | None) -> dict[str, Json]:
    """The details of one feature, besides its columns."""
    shown = [] if examples is None else examples.itertuples()
    return {
        "promoted": _as_list(row.promoted_tokens),
        "suppressed": _as_list(row.suppressed_tokens),
        "neighbours": _as_list(row.neighbours),
        "cosines": _rounded(_as_list(row.neighbour_cosines), 3),
        "histogram": _as_list(row.histogram),
        "range": row.histogram_range,
        "explanation": getattr(row, "explanation", None) or "",
        "examples": [
            {
                "bucket": example.bucket,
                "peak": float(f"{example.activation:.4g}"),
                "source": f"{example.subset} · document {example.document}",
                "runs": _runs(example),
            }
            for example in shown
        ],
    }


def _runs(example: NamedTuple) -> list[str | list]:
    """An example's text: strings where the feature is silent, [token, activation] where active.

    The token at the peak has a third entry.
    """
    runs: list[str | list] = []
    end = 0
    active = np.flatnonzero(example.activations > 0).tolist()
    for position in sorted({*active, example.peak}):
        if not example.token_texts[position] and position != example.peak:
            continue  # its character is another token's
        runs += ["".join(example.token_texts[end:position])] if position > end else []
        run = [example.token_texts[position], float(f"{example.activations[position]:.3g}")]
        runs.append([*run, 1] if position == example.peak else run)
        end = position + 1
    rest = "".join(example.token_texts[end:])
    return [*runs, rest] if rest else runs


def _picture(caption: str, file: Path) -> dict[str, Json]:
    width, height = struct.unpack(">II", file.read_bytes()[16:24])  # so that text does not jump
    return {"file": file.name, "caption": caption, "width": width, "height": height}


def _as_list(values: object) -> list:
    """A cell of a list column; dead features may have None or NaN there."""
    return np.asarray(values).tolist() if isinstance(values, list | np.ndarray) else []


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
