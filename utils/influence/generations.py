"""Generations: pairs of an untouched and a steered text, in a log that spares writing them twice.

A line of ``generations.jsonl`` is a request, which holds everything that a text depends on, with
the two texts. A request that is in the log is shown from there.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from utils.artifacts import append_record, make_folder, read_log
from utils.features.catalogue import Catalogue
from utils.settings import Json, require
from utils.steering.clamps import Clamp, steered
from utils.steering.feature_model import FeatureModel
from utils.steering.generation import generate, prompt_tokens
from utils.terminal import side_by_side

Request = dict[str, Json]  # everything that a text depends on


class WritingSettings(Protocol):
    """The settings of influence_llm.py that every text depends on."""

    max_new_tokens: int
    temperature: float
    seed: int


class GenerationSettings(WritingSettings, Protocol):
    """The settings of influence_llm.py that a steered text depends on, but FEATURE and STRENGTH."""

    prompt: str
    chat_template: bool
    intervention: str
    where: str | tuple[int, ...]


def list_requests(
    settings: GenerationSettings,
    catalogue: Catalogue,
    features: list[int],
    strengths: Sequence[float],
) -> list[Request]:
    """A request for each different strength, in multiples of the features' ``maxima``."""
    summary, maxima = catalogue.summary, catalogue.features["max_activation"]
    return [
        {
            "prompt": settings.prompt,
            "chat_template": settings.chat_template,
            "features": features,
            "intervention": settings.intervention,
            "where": list(settings.where) if isinstance(settings.where, tuple) else settings.where,
            "strength": strength,
            "maxima": [float(maxima[feature]) for feature in features],
            "max_new_tokens": settings.max_new_tokens,
            "temperature": float(settings.temperature),
            "seed": settings.seed,
            "autoencoder_fingerprint": summary["autoencoder_fingerprint"],
            "model_name": summary["model_name"],
            "layer": summary["layer"],
            "outlier_norm": summary["outlier_norm"],
        }
        for strength in dict.fromkeys(map(float, strengths))
    ]


def key(request: Request) -> str:
    return json.dumps(request, sort_keys=True)


def open_log(folder: str, name: str = "generations.jsonl") -> Path:
    """The path of a log in INFLUENCE_DIR; folder and file are created if they are not there.

    Raises:
        InputError: The folder cannot be written to.
    """
    log = make_folder(folder, "--influence-dir") / name
    log.open("ab").close()
    return log


def read_records(
    log: Path, results: frozenset[str] = frozenset({"untouched", "steered"})
) -> dict[str, dict[str, Json]]:
    """The records that hold ``results``, by the `key` of their request; see `read_log`."""
    records = read_log(log, {"request", *results})
    return {key(record["request"]): record for record in records}


def load_model(catalogue: Catalogue, autoencoder_path: Path) -> FeatureModel:
    """The language model that was analysed, with the autoencoder in it; prints its name."""
    summary = catalogue.summary
    print(
        f"Loading {summary['model_name']}; features act on the output of block {summary['layer']}."
    )
    return FeatureModel.load(summary, autoencoder_path)


def generate_records(
    requests: list[Request],
    recorded: dict[str, dict[str, Json]],
    model: FeatureModel | None,
    log: Path,
) -> Iterator[dict[str, Json]]:
    """Yield the record of each request, from ``recorded`` or newly generated and logged."""
    untouched = None
    for request in requests:
        if key(request) in recorded:
            yield {**recorded[key(request)], "was_recorded": True}
            continue
        if untouched is None:
            require_reach(model, request)
            untouched = generate_text(model, request, steer=False)
        text = generate_text(model, request, steer=True)
        record = {"request": request, "untouched": untouched, "steered": text}
        append_record(log, record)
        yield record


def require_reach(model: FeatureModel, request: Request) -> None:
    """Refuse positions that are all beyond the longest text that a request can give."""
    prompt = prompt_tokens(model.language_model, request["prompt"], request["chat_template"])
    end = prompt.shape[1] + request["max_new_tokens"]
    where = request["where"]
    require(
        isinstance(where, str) or min(where) < end,
        f"WHERE must have a position below {end}, where the text ends at the latest; it is "
        f"{where}.",
    )


def clamps_of(request: Request) -> list[Clamp]:
    """The changes of features that a request asks for."""
    strength, how = request["strength"], request["intervention"]
    pairs = zip(request["features"], request["maxima"], strict=True)
    return [Clamp(feature, strength, maximum, how) for feature, maximum in pairs]


def generate_text(model: FeatureModel, request: Request, steer: bool) -> str:
    """The steered or the untouched continuation of a request's prompt."""
    steering = steered(model, clamps_of(request), request["where"])
    with steering if steer else contextlib.nullcontext():
        return generate(
            model.language_model,
            request["prompt"],
            request["max_new_tokens"],
            request["chat_template"],
            temperature=request["temperature"],
            seed=request["seed"],
        )


def show_record(record: dict[str, Json], width: int) -> str:
    """The two texts of a record under their titles, in lines of at most ``width`` columns."""
    title = change_title(record["request"])
    if record.get("was_recorded"):
        title += " (recorded)"
    return side_by_side(("untouched", title), (record["untouched"], record["steered"]), width)


def change_title(request: Request) -> str:
    """The change that a request makes, in words."""
    features, c, how = request["features"], request["strength"], request["intervention"]
    plural, its = ("s", "their") if len(features) > 1 else ("", "its")
    name = f"feature{plural} {', '.join(map(str, features))}"
    if how == "ablate" or (how == "clamp" and c == 0):
        return f"{name} at 0: ablation"
    return {
        "clamp": f"{name} at {c:g} × {its} maximum",
        "add": f"{c:g} × {its} maximum added to {name}",
        "scale": f"{name} scaled by {c:g}",
    }[how]
