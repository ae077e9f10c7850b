"""The catalogue of features, as a finished analysis has it: loaded and searched.

features.parquet    a row a feature: statistics, label, promoted tokens, neighbours, place on a map
examples.parquet    a row an example: tokens and activations around a feature's peak
vocabulary.json     the text of every token, so that reading needs no tokenizer
summary.json        what the analysis found as a whole, and what it was made from
"""

import functools
import re
from pathlib import Path

import numpy as np
import pandas as pd

from utils.artifacts import fingerprint, missing_stage, read_json
from utils.settings import require

N_NEIGHBOURS = 10  # of each feature, that are kept


class Catalogue:
    """A finished analysis.

    Attributes:
        features: A row a feature, indexed by its number; columns as `feature_table` makes them.
        summary: What the analysis found as a whole, and what it was made from.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "summary.json").exists():
            raise missing_stage(self.folder, "analysis", "analyze_features.py")
        self.summary = read_json(self.folder / "summary.json")
        self.features = pd.read_parquet(self.folder / "features.parquet")
        self.features.index = self.features["feature"]

    @functools.cached_property
    def pieces(self) -> np.ndarray:
        """The text of each token; the last one, for no token, is empty."""
        return np.array([*read_json(self.folder / "vocabulary.json"), ""], dtype=object)

    def examples_of(self, features: list[int]) -> pd.DataFrame:
        """The examples of some features, with ``pieces``, the texts of their windows' tokens."""
        examples = pd.read_parquet(
            self.folder / "examples.parquet", filters=[("feature", "in", list(features))]
        )
        examples["pieces"] = [list(self.pieces[tokens]) for tokens in examples["tokens"]]
        return examples

    def autoencoder_path(self, folder: str | Path) -> Path:
        """The file of the autoencoder in ``folder``, which the analysis must be of.

        Raises:
            InputError: It is missing, or another one.
        """
        path = Path(folder) / "autoencoder.keras"
        if not path.exists():
            raise missing_stage(path.parent, "autoencoder", "train_autoencoder.py")
        analysed, found = self.summary["autoencoder_fingerprint"], fingerprint(path)
        require(
            analysed == found,
            f"{self.folder} must be of the autoencoder in {folder}; it is of {analysed}, not of "
            f"{found}. Run analyze_features.py for this autoencoder, or name the folders that "
            "belong together with --analysis-dir and --autoencoder-dir.",
        )
        return path

    def search(self, words: str, n: int) -> pd.DataFrame:
        """The features that best fit some words, with a column ``match``, best first.

        A feature fits by the share of its highest examples that peak at one of the words, half as
        much by the share of the words that its label has, a tenth as much by the share that its
        explanation has, and a little by the share of the tokens it promotes that are one. Dead
        features never fit, nor those that fit a tenth as well as the best.
        """
        wanted = set(re.findall(r"\w+", words.lower()))
        alive = self.features[~self.features["dead"]]
        match = 0.5 * share_in(wanted, alive["label"])
        if "explanation" in alive:
            match += 0.1 * share_in(wanted, alive["explanation"])
        match += summed_where(wanted, alive["peak_tokens"], alive["peak_shares"])
        n_promoted = alive["promoted_tokens"].map(len)
        match += 0.2 * summed_where(wanted, alive["promoted_tokens"]) / np.maximum(1, n_promoted)
        found = alive.assign(match=match).nlargest(n, "match")
        return found[found["match"] > 0.1 * found["match"].max()]

    def propose(self, n: int) -> pd.DataFrame:
        """Features that stand out, strongest first: easy to name, and likely to steer well.

        Those whose highest examples peak at whole words and that write them: by their output score,
        where the analysis has it, else by the share of the words among the tokens they promote,
        times their maximum. Neither rare nor everywhere.
        """
        features = self.features
        common = features[features["frequency"].between(5e-4, 2e-2)]
        common = common if len(common) else features[~features["dead"]]
        words = common["peak_tokens"].map(words_of)
        at_peak = np.array(list(map(share_at, words, common.itertuples())), float)
        if "output_score" in common:
            writes = common["output_score"].clip(lower=0)
        else:
            promoted = [
                share_of(*pair) for pair in zip(words, common["promoted_tokens"], strict=True)
            ]
            writes = (0.05 + np.array(promoted, float)) * common["max_activation"]
        return common.assign(match=at_peak * writes).nlargest(n, "match")


def words_of(tokens: list[str]) -> set[str]:
    """Tokens that begin a word of four letters or more, in lower case."""
    words = (token.strip().lower() for token in tokens if token[:1].isspace())
    return {word for word in words if len(word) > 3 and word.isalpha()}


def share_in(wanted: set[str], texts: pd.Series) -> np.ndarray:
    """The share of some words in lower case that each text has; 0 if there are none."""
    texts = texts.str.lower()
    found = [texts.str.contains(rf"\b{word}\b") for word in wanted]
    return np.mean(found, axis=0) if found else np.zeros(len(texts))


def summed_where(
    wanted: set[str], tokens: pd.Series, weights: pd.Series | None = None
) -> np.ndarray:
    """Of lists of tokens, a list a feature, the weights of those that are a wanted word, summed.

    Args:
        weights: A number a token; each counts 1 if None.
    """
    if tokens.empty:
        return np.zeros(0)
    feature = np.repeat(np.arange(len(tokens)), tokens.map(len))
    number, texts = pd.factorize(np.concatenate(tokens.to_list()))
    is_wanted = np.array([text.strip().lower() in wanted for text in texts], float)[number]
    if weights is not None:
        is_wanted *= np.concatenate(weights.to_list())
    return np.bincount(feature, is_wanted, minlength=len(tokens))


def share_of(wanted: set[str], tokens: list[str]) -> float:
    """Share of ``tokens`` that are one of the wanted words."""
    return sum(token.strip().lower() in wanted for token in tokens) / max(1, len(tokens))


def share_at(wanted: set[str], feature) -> float:
    """Share of a feature's highest examples that peak at one of the wanted words."""
    peaks = zip(feature.peak_tokens, feature.peak_shares, strict=True)
    return sum(share for token, share in peaks if token.strip().lower() in wanted)
