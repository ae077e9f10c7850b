"""Texts written while the model is changed, each scored by the untouched model.

The methods that change the model at a strength c:

    feature          clamped to c · max
    mean difference  a vector added: the mean residual over the feature's highest examples, minus
                     that over random examples
    random           a random direction added
    reconstruction   x̂ in place of x, nothing clamped
    untouched

The vectors have the norm c · max / scale (times a token's deviation, where the autoencoder
standardises tokens), which is that of the clamp's change where the feature is inactive. The scores
of a text, read by the untouched model:

    concept      the feature's mean activation over the generated tokens, as a share of max
    words        share of the text's words at which the feature's highest examples peak
    perplexity   of the text, given its prompt
    repetition   share of the text's three-token sequences that occurred earlier in it

Reference: "Scaling Monosemanticity", Influence on Behavior, and its mean-difference baseline.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from utils.artifacts import append_record
from utils.characters import words_in
from utils.features.catalogue import Catalogue, share_of, words_of
from utils.influence.generations import WritingSettings, key, read_records
from utils.settings import Json
from utils.steering import generation
from utils.steering.clamps import Clamp, change_by, changed
from utils.steering.feature_model import FeatureModel

METHODS = ("untouched", "reconstruction", "feature", "mean difference", "random")
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
N_TEXTS = 8  # examples on each side of a mean difference
SCORING_BATCH = 16  # texts; each of their tokens takes a row of logits over the vocabulary
SCORES = ("concept", "words", "perplexity", "repetition")


def repetition(tokens: Sequence[int], n: int = 3) -> float:
    """Share of the n-token sequences that occurred earlier; 0 for a text shorter than n."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.inference_mode()
def score_texts(
    model: FeatureModel, prompts: Sequence, texts: Sequence, feature: int
) -> tuple[list[float], list[float]]:
    """The perplexity of each text given its prompt, and a feature's mean activation on its tokens.

    Args:
        prompts, texts: Tokens, shapes (1, prompt) and (text,). An empty text gets 1 and 0.
    """
    language_model = model.language_model
    latent = torch.tensor([feature], device=language_model.device)
    perplexities, means = [], []
    pairs = list(zip(prompts, texts, strict=True))
    for start in range(0, len(pairs), SCORING_BATCH):
        batch = pairs[start : start + SCORING_BATCH]
        rows = [torch.cat([prompt[0], text]) for prompt, text in batch]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, True, language_model.bos)
        residuals = []
        with model.replaced(residuals.append):
            logits = language_model.model(tokens, use_cache=False).logits
        activations = model.encode(residuals[0], latent)[..., 0]
        activations *= model.trained_positions(tokens, residuals[0])
        for row, (prompt, text) in enumerate(batch):
            begin, length = prompt.shape[1], len(text)
            predictions = logits[row, begin - 1 : begin - 1 + length].float()
            loss = torch.nn.functional.cross_entropy(predictions, text, reduction="sum")
            perplexities.append(float(torch.exp(loss / max(1, length))))
            means.append(float(activations[row, begin : begin + length].sum() / max(1, length)))
    return perplexities, means


class Writer:
    """Writes texts while the model is changed, and scores them."""

    def __init__(self, model: FeatureModel, catalogue: Catalogue, settings: WritingSettings):
        self.model, self.catalogue, self.settings = model, catalogue, settings

    def maximum(self, feature: int) -> float:
        """The largest activation of a feature over the dataset."""
        return float(self.catalogue.features.loc[feature, "max_activation"])

    def write(
        self,
        change: Callable[[torch.Tensor], torch.Tensor],
        prompts: Sequence[str],
        feature: int,
        where: str | Sequence[int] = "everywhere",
        chat: bool = False,
    ) -> list[dict[str, Json]]:
        """Generate and score a text after each prompt: its ``text`` and `SCORES` for ``feature``.

        Args:
            change, where: As for `changed`.
        """
        language_model, settings = self.model.language_model, self.settings
        tokens = [generation.prompt_tokens(language_model, prompt, chat) for prompt in prompts]
        with changed(self.model, change, where):
            texts = generation.generate_tokens(
                language_model,
                tokens,
                settings.max_new_tokens,
                temperature=settings.temperature,
                seed=settings.seed,
            )
        perplexities, activations = score_texts(self.model, tokens, texts, feature)
        wanted = words_of(self.catalogue.features.loc[feature, "peak_tokens"])
        records = []
        for text, perplexity, activation in zip(texts, perplexities, activations, strict=True):
            record = {"text": generation.decode(language_model, text)}
            record["concept"] = activation / self.maximum(feature)
            record["words"] = share_of(wanted, words_in(record["text"]))
            record["perplexity"] = perplexity
            record["repetition"] = repetition(text.tolist())
            records.append(record)
        return records

    def mean_difference(self, feature: int) -> torch.Tensor:
        """Mean residual over a feature's highest examples, minus that over other features'.

        Shape (d_model,). The baseline of "Scaling Monosemanticity", Influence on Behavior.
        """
        seed, catalogue = self.settings.seed, self.catalogue
        draw = np.random.default_rng([seed, feature])
        alive = catalogue.features.index[~catalogue.features["dead"]]
        drawn = draw.choice(alive.drop(feature), min(N_TEXTS, len(alive) - 1), replace=False)
        highest = catalogue.examples_of([feature])
        highest = highest[highest["bucket"] == 0].sort_values("rank").head(N_TEXTS)
        random = catalogue.examples_of(drawn.tolist()).groupby("feature")
        random = random.sample(1, random_state=seed)
        bos, means = self.model.language_model.bos, []
        for examples in (highest, random):
            rows = []
            for window in examples["tokens"]:
                tokens = torch.tensor([[bos, *window[window >= 0]]])
                residual = self.model.residual(tokens)[0].float()
                rows.append(residual[self.model.trained_positions(tokens[0], residual)])
            means.append(torch.cat(rows).mean(dim=0))
        return means[0] - means[1]

    def change_by_method(self, method: str, feature: int, strengths: list[float]) -> Callable:
        """The change that a method makes to a batch, a strength for each row; see `changed`."""
        model, maximum = self.model, self.maximum(feature)
        device = model.language_model.device
        if method == "untouched":
            return torch.zeros_like
        if method == "reconstruction":
            return lambda residual: model.reconstruct(residual) - residual.float()
        if method == "feature":
            rows = [[Clamp(feature, strength, maximum)] for strength in strengths]
            return change_by(model, rows, device)
        if method == "mean difference":
            vector = self.mean_difference(feature)
        else:
            draw = np.random.default_rng([self.settings.seed, feature])
            vector = torch.tensor(draw.standard_normal(model.d_model), dtype=torch.float32)
        norms = torch.tensor(strengths) * maximum / model.scale
        added = (norms[:, None, None] * vector.cpu() / vector.norm().cpu()).to(device)
        return lambda residual: (added * model.token_scale(residual)).expand_as(residual)

    def change_by_requests(self, feature: int, requests: list[dict[str, Json]]) -> Callable:
        """The change that a batch of requests, ordered by method, asks for; see `changed`."""
        changes, sizes = [], []
        for method, group in itertools.groupby(requests, lambda request: request["method"]):
            strengths = [request["strength"] for request in group]
            changes.append(self.change_by_method(method, feature, strengths))
            sizes.append(len(strengths))

        def change_all(residual: torch.Tensor) -> torch.Tensor:
            parts = zip(changes, residual.split(sizes), strict=True)
            return torch.cat([change(part) for change, part in parts])

        return change_all


class Texts(Writer):
    """Texts by any method after any prompt, with their scores; texts in ``log`` are reused."""

    def __init__(
        self, model: FeatureModel, catalogue: Catalogue, settings: WritingSettings, log: Path
    ):
        super().__init__(model, catalogue, settings)
        self.log = log
        names = ("max_new_tokens", "temperature", "seed")
        self._fixed = {name: getattr(settings, name) for name in names}
        for name in ("model_name", "layer", "outlier_norm", "autoencoder_fingerprint"):
            self._fixed[name] = catalogue.summary[name]
        self._recorded = read_records(log, {"text", *SCORES})

    def table(self, feature: int, methods: Sequence[str], prompts: Sequence[str]) -> pd.DataFrame:
        """Texts of each method at all strengths after each prompt, written as one batch.

        Returns:
            A row a text: ``feature, method, strength, prompt, text`` and the `SCORES`.
        """
        # Another analysis of the same autoencoder may have other maxima and peaks.
        peaks = list(self.catalogue.features.loc[feature, "peak_tokens"])
        fixed = {**self._fixed, "feature": feature, "maximum": self.maximum(feature)}
        requests = [
            {**fixed, "peaks": peaks, "method": method, "strength": strength, "prompt": prompt}
            for method in methods
            for strength in ([0.0] if method in METHODS[:2] else STRENGTHS)
            for prompt in prompts
        ]
        missing = [request for request in requests if key(request) not in self._recorded]
        if missing:
            self._write_missing(feature, missing)
        rows = [{**self._recorded[key(request)], **request} for request in requests]
        return pd.DataFrame(rows)[["feature", "method", "strength", "prompt", *SCORES, "text"]]

    def _write_missing(self, feature: int, requests: list[dict[str, Json]]) -> None:
        change = self.change_by_requests(feature, requests)
        records = self.write(change, [request["prompt"] for request in requests], feature)
        for request, record in zip(requests, records, strict=True):
            self._recorded[key(request)] = record
            append_record(self.log, {"request": request, **record})
