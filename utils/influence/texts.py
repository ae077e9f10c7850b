"""Texts written while the model is changed, each scored by the untouched model.

Texts are written after neutral prompts by these methods:

    feature          clamped to c · max
    mean difference  a vector added: the mean residual of texts that the feature is highest on, less
                     that of texts drawn at random
    random           a random direction added
    reconstruction   x̂ in place of x, nothing clamped
    untouched

The vectors have the norm c · max / scale, what the clamp adds where the feature is silent. The
untouched model reads each text again:

    concept      mean over the generated tokens of the feature's activation, as a share of max
    words        share of the text's words that the feature's highest examples peak at
    perplexity   of the text, given its prompt
    repetition   share of the text's three-token sequences that were there before

Reference: "Scaling Monosemanticity", Influence on Behavior, and its mean-difference baseline.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from utils.artifacts import append_record
from utils.features.catalogue import Catalogue, words_of
from utils.influence.generations import key, read_records
from utils.language_model import (
    LanguageModel,
    learnt_positions,
    replaced_residual,
    residual_at,
)
from utils.steering.clamps import (
    Clamp,
    change_by,
    changed,
    decode,
    encode,
    generate_tokens,
    prompt_tokens,
)
from utils.steering.evaluation import as_torch, split_reconstruction

METHODS = ("untouched", "reconstruction", "feature", "mean difference", "random")
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
N_TEXTS = 8  # of each side of a mean difference
ROWS_TOGETHER = 16  # texts read at once; each token takes a row of logits over the vocabulary
SCORES = ("concept", "words", "perplexity", "repetition")


def repetition(tokens: Sequence[int], n: int = 3) -> float:
    """Share of the n-token sequences that were there before; 0 for a text shorter than that."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def share_of_words(text: str, wanted: set[str]) -> float:
    """Share of the words of a text that are wanted, in lower case."""
    words = re.findall(r"\w+", text.lower())
    return sum(word in wanted for word in words) / max(1, len(words))


@torch.inference_mode()
def read_again(
    models: tuple, layer: int, outlier_norm: float, prompts: Sequence, texts: Sequence, feature: int
) -> tuple[list[float], list[float]]:
    """What the untouched model makes of texts: their perplexity, and a feature's activation.

    Args:
        models: Language model and autoencoder.
        prompts, texts: Tokens, (1, prompt) and (text,) each.

    Returns:
        Perplexity of each text given its prompt, and the mean activation of the feature on its
        tokens; 1 and 0 for an empty text.
    """
    language_model, autoencoder = models
    chosen = torch.tensor([feature], device=language_model.device)
    norm = as_torch(autoencoder.W_dec)[feature].norm().to(chosen.device)
    perplexities, activations = [], []
    pairs = list(zip(prompts, texts, strict=True))
    for some in (pairs[i : i + ROWS_TOGETHER] for i in range(0, len(pairs), ROWS_TOGETHER)):
        rows = [torch.cat([prompt[0], text]) for prompt, text in some]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, True, language_model.bos)
        kept = []
        with replaced_residual(language_model.blocks[layer], kept.append):
            logits = language_model.model(tokens, use_cache=False).logits
        latents = encode(autoencoder, kept[0], chosen)[..., 0] * norm
        latents *= learnt_positions(language_model, tokens, kept[0], outlier_norm)
        for row, (prompt, text) in enumerate(some):
            at = slice(prompt.shape[1], prompt.shape[1] + len(text))
            before = logits[row, at.start - 1 : at.stop - 1].float()
            loss = torch.nn.functional.cross_entropy(before, text, reduction="sum")
            perplexities.append(float(torch.exp(loss / max(1, len(text)))))
            activations.append(float(latents[row, at].sum() / max(1, len(text))))
    return perplexities, activations


def write_texts(
    models: tuple,
    catalogue: Catalogue,
    change: Callable,
    prompts: Sequence[str],
    feature: int,
    settings: Any,
    where: str | Sequence[int] = "everywhere",
    chat: bool = False,
) -> list[dict[str, Any]]:
    """Generate a text after each prompt, with ``change`` of `steering.changed`, and score it.

    Returns:
        For each prompt ``text`` and the `SCORES`.
    """
    language_model, _ = models
    layer, outlier_norm = catalogue.summary["layer"], catalogue.summary["outlier_norm"]
    known = catalogue.features.loc[feature]
    tokens = [prompt_tokens(language_model, prompt, chat) for prompt in prompts]
    with changed(language_model, layer, change, outlier_norm, where):
        texts = generate_tokens(
            language_model,
            tokens,
            settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
        )
    perplexities, activations = read_again(models, layer, outlier_norm, tokens, texts, feature)
    wanted, records = words_of(known["peak_tokens"]), []
    for text, perplexity, activation in zip(texts, perplexities, activations, strict=True):
        said = decode(language_model, text)
        records.append(
            {"text": said, "concept": activation / float(known["max_activation"])}
            | {"words": share_of_words(said, wanted), "perplexity": perplexity}
            | {"repetition": repetition(text.tolist())}
        )
    return records


def mean_difference(
    language_model: LanguageModel, catalogue: Catalogue, feature: int, seed: int
) -> torch.Tensor:
    """Mean residual over texts that a feature is highest on, less that over others, (d_model,)."""
    draw = np.random.default_rng([seed, feature])
    alive = catalogue.features.index[~catalogue.features["dead"]]
    others = draw.choice(alive.drop(feature), min(N_TEXTS, len(alive) - 1), replace=False)
    own = catalogue.examples_of([feature])
    own = own[own["bucket"] == 0].sort_values("rank").head(N_TEXTS)
    drawn = catalogue.examples_of(others.tolist()).groupby("feature").sample(1, random_state=seed)
    layer, means = catalogue.summary["layer"], []
    for examples in (own, drawn):
        rows = []
        for window in examples["tokens"]:
            tokens = torch.tensor([[language_model.bos, *window[window >= 0]]])
            residual = residual_at(language_model, tokens, layer)[0].float()
            limit = catalogue.summary["outlier_norm"]
            rows.append(residual[learnt_positions(language_model, tokens[0], residual, limit)])
        means.append(torch.cat(rows).mean(dim=0))
    return means[0] - means[1]


def change_of(
    models: tuple, catalogue: Catalogue, method: str, feature: int, strengths: list, seed: int
) -> Callable:
    """What a method adds to the residual stream of a batch, each row at a strength of its own."""
    language_model, autoencoder = models
    maximum = float(catalogue.features.loc[feature, "max_activation"])
    device = language_model.device
    if method == "untouched":
        return torch.zeros_like
    if method == "reconstruction":
        return lambda residual: -split_reconstruction(autoencoder, residual)[1]
    if method == "feature":
        rows = [[Clamp(feature, strength, maximum)] for strength in strengths]
        return change_by(autoencoder, rows, device)
    if method == "mean difference":
        vector = mean_difference(language_model, catalogue, feature, seed)
    else:
        draw = np.random.default_rng([seed, feature])
        vector = torch.tensor(draw.standard_normal(language_model.d_model), dtype=torch.float32)
    norms = torch.tensor(strengths) * maximum / float(autoencoder.scale)
    added = (norms[:, None, None] * vector.cpu() / vector.norm().cpu()).to(device)
    return lambda residual: added.expand_as(residual)


def change_of_rows(
    models: tuple, catalogue: Catalogue, feature: int, requests: list[dict], seed: int
) -> Callable:
    """What a batch of requests, method by method, adds to the residual stream."""
    changes, sizes = [], []
    for method, group in itertools.groupby(requests, lambda request: request["method"]):
        strengths = [request["strength"] for request in group]
        changes.append(change_of(models, catalogue, method, feature, strengths, seed))
        sizes.append(len(strengths))

    def change(residual: torch.Tensor) -> torch.Tensor:
        parts = zip(changes, residual.split(sizes), strict=True)
        return torch.cat([change(part) for change, part in parts])

    return change


class Texts:
    """Texts by any method after any prompt, with their scores, each written once.

    Args:
        models: Language model and autoencoder.
        catalogue: The features.
        settings: ``max_new_tokens, temperature, seed``.
        log: Keeps every text when it is there; what is recorded there is not written again.
    """

    def __init__(self, models: tuple, catalogue: Catalogue, settings: Any, log: Path):
        self.models, self.catalogue, self.settings, self.log = models, catalogue, settings, log
        names = ("max_new_tokens", "temperature", "seed")
        self._fixed = {name: getattr(settings, name) for name in names}
        for name in ("model_name", "layer", "outlier_norm", "autoencoder_fingerprint"):
            self._fixed[name] = catalogue.summary[name]
        self._recorded = read_records(log, {"text", *SCORES})

    def of(self, feature: int, methods: Sequence[str], prompts: Sequence[str]) -> pd.DataFrame:
        """The texts of some methods, at all strengths, after some prompts, written as one batch.

        Returns:
            A row a text: ``feature, method, strength, prompt, text`` and the `SCORES`.
        """
        # Of another analysis of the same autoencoder these may be others.
        known = self.catalogue.features.loc[feature]
        own = {"maximum": float(known["max_activation"]), "peaks": list(known["peak_tokens"])}
        requests = [
            {**self._fixed, "feature": feature, **own}
            | {"method": method, "strength": strength, "prompt": prompt}
            for method in methods
            for strength in ([0.0] if method in METHODS[:2] else STRENGTHS)
            for prompt in prompts
        ]
        missing = [request for request in requests if key(request) not in self._recorded]
        if missing:
            self._write(feature, missing)
        rows = [{**self._recorded[key(request)], **request} for request in requests]
        return pd.DataFrame(rows)[["feature", "method", "strength", "prompt", *SCORES, "text"]]

    def _write(self, feature: int, requests: list[dict]) -> None:
        change = change_of_rows(self.models, self.catalogue, feature, requests, self.settings.seed)
        prompts = [request["prompt"] for request in requests]
        records = write_texts(self.models, self.catalogue, change, prompts, feature, self.settings)
        for request, record in zip(requests, records, strict=True):
            self._recorded[key(request)] = record
            append_record(self.log, {"request": request, **record})
