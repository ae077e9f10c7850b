"""Texts that were generated: what decided each, a log of them, and generating what it lacks.

A line of ``generations.jsonl`` is a request, which holds all that decides a text, with the
untouched and the steered text. The same request is shown again, not generated again.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.artifacts import append_record, make_folder, records_of
from utils.autoencoder.saved import load_autoencoder
from utils.language_model import LanguageModel, load_language_model
from utils.settings import require
from utils.steering.clamps import Clamp, generate, prompt_tokens, steered


def list_requests(
    settings: Any, catalogue: Any, features: list[int], strengths: Sequence[float]
) -> list[dict[str, Any]]:
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


def key(request: dict[str, Any]) -> str:
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
) -> dict[str, dict[str, Any]]:
    """The records with ``results`` by the `key` of their request; torn lines are passed over."""
    records = records_of(log, {"request", *results})
    return {key(record["request"]): record for record in records}


def load_models(catalogue: Any, autoencoder_path: Path) -> tuple[Any, Any]:
    """The language model that the analysis names, and the autoencoder."""
    summary = catalogue.summary
    print(f"Loading {summary['model_name']}, to be changed after block {summary['layer']}.")
    language_model = load_language_model(summary["model_name"], summary["layer"], summary["dtype"])
    return language_model, load_autoencoder(autoencoder_path)


def generate_records(
    requests: list[dict], recorded: dict[str, dict], models: tuple | None, log: Path
) -> Iterator[dict[str, Any]]:
    """Yield the record of each request: as recorded, else generated now and recorded at once."""
    untouched = None
    for request in requests:
        if key(request) in recorded:
            yield {**recorded[key(request)], "was_recorded": True}
            continue
        if untouched is None:
            require_reach(models[0], request)
            untouched = generate_text(models, request, steer=False)
        steered = generate_text(models, request, steer=True)
        record = {"request": request, "untouched": untouched, "steered": steered}
        append_record(log, record)
        yield record


def require_reach(language_model: LanguageModel, request: dict[str, Any]) -> None:
    """Refuse positions that are all beyond the text that a request can come to."""
    prompt = prompt_tokens(language_model, request["prompt"], request["chat_template"])
    end = prompt.shape[1] + request["max_new_tokens"]
    where = request["where"]
    require(
        isinstance(where, str) or min(where) < end,
        f"WHERE must have a position below {end}, where the text ends at the latest; it is "
        f"{where}.",
    )


def clamps_of(request: dict[str, Any]) -> list[Clamp]:
    """What a request changes."""
    features = zip(request["features"], request["maxima"], strict=True)
    how = request["intervention"]
    return [Clamp(feature, request["strength"], maximum, how) for feature, maximum in features]


def generate_text(models: tuple, request: dict[str, Any], steer: bool) -> str:
    """The continuation that a request asks for, or the untouched one."""
    language_model, autoencoder = models
    clamps = clamps_of(request)
    place = request["outlier_norm"], request["where"]
    steering = steered(language_model, request["layer"], autoencoder, clamps, *place)
    with steering if steer else contextlib.nullcontext():
        return generate(
            language_model,
            request["prompt"],
            request["max_new_tokens"],
            request["chat_template"],
            temperature=request["temperature"],
            seed=request["seed"],
        )
