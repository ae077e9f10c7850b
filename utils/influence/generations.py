"""Texts that were generated: what decided each, a log of them, and generating what it lacks.

A line of ``generations.jsonl`` is a request, which holds all that decides a text, with the
untouched and the steered text. The same request is shown again, not generated again.
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

Request = dict[str, Json]  # all that decides a text


class WritingSettings(Protocol):
    """How texts are written, of the settings of influence_llm.py."""

    max_new_tokens: int
    temperature: float
    seed: int


class GenerationSettings(WritingSettings, Protocol):
    """All that decides a text but features and strengths, of the settings of influence_llm.py."""

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
    """All that decides a text, for each strength once; ``maxima`` are what strengths multiply."""
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


def open_log(folder: str) -> Path:
    """The file of the records, made if it is not there.

    Raises:
        InputError: It cannot be written.
    """
    log = make_folder(folder, "--influence-dir") / "generations.jsonl"
    log.open("ab").close()
    return log


def read_records(
    log: Path, results: frozenset[str] = frozenset({"untouched", "steered"})
) -> dict[str, dict[str, Json]]:
    """The records with ``results`` by the `key` of their request; torn lines are passed over."""
    records = read_log(log, {"request", *results})
    return {key(record["request"]): record for record in records}


def load_model(catalogue: Catalogue, autoencoder_path: Path) -> FeatureModel:
    """The language model that the analysis names, with the autoencoder in it."""
    summary = catalogue.summary
    print(f"Loading {summary['model_name']}, to be changed after block {summary['layer']}.")
    return FeatureModel.load(summary, autoencoder_path)


def generate_records(
    requests: list[Request],
    recorded: dict[str, dict[str, Json]],
    model: FeatureModel | None,
    log: Path,
) -> Iterator[dict[str, Json]]:
    """Yield the record of each request: as recorded, else generated now and recorded at once."""
    untouched = None
    for request in requests:
        if key(request) in recorded:
            yield {**recorded[key(request)], "was_recorded": True}
            continue
        if untouched is None:
            require_reach(model, request)
            untouched = generate_text(model, request, steer=False)
        steered = generate_text(model, request, steer=True)
        record = {"request": request, "untouched": untouched, "steered": steered}
        append_record(log, record)
        yield record


def require_reach(model: FeatureModel, request: Request) -> None:
    """Refuse positions that are all beyond the text that a request can come to."""
    prompt = prompt_tokens(model.language_model, request["prompt"], request["chat_template"])
    end = prompt.shape[1] + request["max_new_tokens"]
    where = request["where"]
    require(
        isinstance(where, str) or min(where) < end,
        f"WHERE must have a position below {end}, where the text ends at the latest; it is "
        f"{where}.",
    )


def clamps_of(request: Request) -> list[Clamp]:
    """What a request changes."""
    features = zip(request["features"], request["maxima"], strict=True)
    how = request["intervention"]
    return [Clamp(feature, request["strength"], maximum, how) for feature, maximum in features]


def generate_text(model: FeatureModel, request: Request, steer: bool) -> str:
    """The continuation that a request asks for, or the untouched one."""
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
    """The two texts of a record under their titles, as lines of at most ``width`` characters."""
    title = change_title(record["request"])
    if record.get("was_recorded"):
        title += " (recorded)"
    return side_by_side(("untouched", title), (record["untouched"], record["steered"]), width)


def change_title(request: Request) -> str:
    """What a request does to its features, in words."""
    features, c, how = request["features"], request["strength"], request["intervention"]
    several = len(features) > 1
    name = f"feature{'s' * several} {', '.join(map(str, features))}"
    if how == "ablate" or (how == "clamp" and c == 0):
        return f"{name} at 0: ablation"
    its = "their" if several else "its"
    return {
        "clamp": f"{name} at {c:g} × {its} maximum",
        "add": f"{c:g} × {its} maximum added to {name}",
        "scale": f"{name} scaled by {c:g}",
    }[how]
