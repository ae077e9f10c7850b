"""The catalogue of features: the tables that an analysis writes, read and searched once it is done.

features.parquet    a row a feature: statistics, label, promoted tokens, neighbours, place on a map
examples.parquet    a row an example: tokens and activations around a feature's peak
vocabulary.json     the text of every token, so that reading needs no tokenizer
summary.json        results of the analysis as a whole, and the model and data it is of
"""

import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from utils import artifacts
from utils.activations.store import ActivationStore
from utils.characters import is_word, whole_characters, words_in
from utils.features.examples import WINDOW, text_at, window_start
from utils.features.labels import make_label
from utils.settings import require

if TYPE_CHECKING:
    import torch

    from utils.language_model import LanguageModel

SUMMARY_FILE, FEATURES_FILE = "summary.json", "features.parquet"
EXAMPLES_FILE, TOKEN_TEXTS_FILE = "examples.parquet", "vocabulary.json"
REMEDY = (  # for a damaged file; the answers of a judge stay
    "Delete pass.json, study-*.json and browser/index.html beside it, and run the same command of "
    "analyze_features.py again."
)
N_PROMOTED = 10  # tokens listed as promoted, as suppressed, as peaks
N_NEIGHBOURS = 10  # of each feature, that are kept
ROWS_PER_GROUP = 4_096  # of examples.parquet, whose row groups are read one at a time


class Catalogue:
    """A finished analysis.

    Attributes:
        features: A row a feature, indexed by its number: `feature_table`, and the studies' columns.
        summary: Results of the analysis as a whole, and the model and data it is of.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / SUMMARY_FILE).exists():
            raise artifacts.missing_stage(self.folder, "analysis", "analyze_features.py")
        self.summary = artifacts.read_json(self.folder / SUMMARY_FILE, REMEDY)
        with artifacts.reading(self.folder / FEATURES_FILE, REMEDY) as path:
            self.features = pd.read_parquet(path)
        self.features.index = self.features["feature"]

    def verify(self) -> None:
        """Compare the files that are read later with their checksums; raises `InputError`."""
        tables = sorted(self.folder.glob("*.csv"))
        for path in (self.folder / EXAMPLES_FILE, self.folder / TOKEN_TEXTS_FILE, *tables):
            with artifacts.reading(path, REMEDY):
                pass

    @functools.cached_property
    def token_texts(self) -> np.ndarray:
        """The text of each token, or of its bytes; the last one, for no token, is empty."""
        texts = artifacts.read_json(self.folder / TOKEN_TEXTS_FILE, REMEDY)
        return np.array([*texts, ""], dtype=object)

    def table(self, name: str, **options) -> pd.DataFrame:
        """A study's table; ``options`` are those of `pandas.read_csv`."""
        with artifacts.reading(self.folder / f"{name}.csv", REMEDY) as path:
            return pd.read_csv(path, **options)

    def examples_of(self, features: list[int]) -> pd.DataFrame:
        """The examples of some features, with ``token_texts`` of their windows."""
        wanted = [("feature", "in", list(features))]
        with artifacts.reading(self.folder / EXAMPLES_FILE, REMEDY) as path:
            examples = pd.read_parquet(path, filters=wanted)
        windows = zip(examples["tokens"], examples["activations"], strict=True)
        return examples.assign(token_texts=[self.texts_of(*window) for window in windows])

    def texts_of(self, tokens: np.ndarray, activations: np.ndarray | None = None) -> list[str]:
        """The texts of tokens that follow one another; see `whole_characters`."""
        return whole_characters(list(self.token_texts[tokens]), activations)

    def prompt_texts(self, language_model: "LanguageModel", tokens: "torch.Tensor") -> list[str]:
        """The texts of a prompt's tokens, (context,); of BOS its name."""
        numbers, bos = tokens.cpu().numpy(), language_model.bos
        name, texts = language_model.tokenizer.decode([bos]), self.texts_of(numbers)
        return [
            name if number == bos else text for number, text in zip(numbers, texts, strict=True)
        ]

    def autoencoder_path(self, folder: str | Path) -> Path:
        """The file of the autoencoder in ``folder``, which the analysis must be of.

        Raises:
            InputError: It is missing, or another one.
        """
        path = Path(folder) / artifacts.AUTOENCODER_FILE
        if not path.exists():
            raise artifacts.missing_stage(path.parent, "autoencoder", "train_autoencoder.py")
        with artifacts.reading(path, f"Delete {path.parent} and train it again."):
            present = artifacts.fingerprint(path)
        analysed = self.summary["autoencoder_fingerprint"]
        require(
            analysed == present,
            f"{self.folder} must be of the autoencoder in {folder}; it is of {analysed}, not of "
            f"{present}. Run analyze_features.py for this autoencoder, or name the folders that "
            "belong together with --analysis-dir and --autoencoder-dir.",
        )
        return path

    def search(self, words: str, n: int) -> pd.DataFrame:
        """The features that best match some words, with a column ``match``, best first.

        The share of a feature's highest examples that peak at one of the words, half the share of
        the words that its label has, a tenth of the share that its explanation has, and a fifth of
        the share of its promoted tokens that are one of the words, are summed. Dead features are
        left out, and features that match at most a tenth as well as the best.
        """
        wanted = set(words_in(words))
        alive = self.features[~self.features["dead"]]
        match = 0.5 * share_in(wanted, alive["label"])
        if "explanation" in alive:
            match += 0.1 * share_in(wanted, alive["explanation"])
        match += summed_where(wanted, alive["peak_tokens"], alive["peak_shares"])
        n_promoted = alive["promoted_tokens"].map(len)
        match += 0.2 * summed_where(wanted, alive["promoted_tokens"]) / np.maximum(1, n_promoted)
        best = alive.assign(match=match).nlargest(n, "match")
        return best[best["match"] > 0.1 * best["match"].max()]

    def propose(self, n: int) -> pd.DataFrame:
        """Features that stand out, strongest first: easy to name, and likely to steer well.

        They are neither rare nor everywhere, their highest examples peak at whole words, and they
        write these: by their output score if there is one, else by the share of the words among
        the tokens they promote, times their maximum.
        """
        features = self.features
        common = features[features["frequency"].between(5e-4, 2e-2)]
        common = common if len(common) else features[~features["dead"]]
        words = common["peak_tokens"].map(words_of)
        at_peak = list(map(share_at, words, common["peak_tokens"], common["peak_shares"]))
        if "output_score" in common:
            writes = common["output_score"].clip(lower=0)
        else:
            promoted = list(map(share_of, words, common["promoted_tokens"]))
            writes = (0.05 + np.array(promoted, float)) * common["max_activation"]
        return common.assign(match=np.array(at_peak, float) * writes).nlargest(n, "match")


def words_of(tokens: list[str]) -> set[str]:
    """Tokens that begin a word of four letters or more, in lower case."""
    words = (token.strip().lower() for token in tokens if token[:1].isspace())
    return {word for word in words if len(word) > 3 and is_word(word)}


def share_in(wanted: set[str], texts: pd.Series) -> np.ndarray:
    """The share of some words in lower case that each text has; 0 if there are none."""
    texts = texts.str.lower()
    present = [[word in text and word in words_in(text) for text in texts] for word in wanted]
    return np.mean(present, axis=0) if present else np.zeros(len(texts))


def summed_where(
    wanted: set[str], tokens: pd.Series, weights: pd.Series | None = None
) -> np.ndarray:
    """Of each list of tokens, the summed weights (1 if None) of those that are a wanted word."""
    if tokens.empty:
        return np.zeros(0)
    feature = np.repeat(np.arange(len(tokens)), tokens.map(len))
    number, texts = pd.factorize(np.concatenate(tokens.to_list()))
    is_wanted = np.array([is_of(text.strip().lower(), wanted) for text in texts], float)[number]
    if weights is not None:
        is_wanted *= np.concatenate(weights.to_list())
    return np.bincount(feature, is_wanted, minlength=len(tokens))


def is_of(text: str, wanted: set[str]) -> bool:
    """Whether a text is a wanted word, or wanted words without spaces between them."""
    words = words_in(text)
    return bool(words) and "".join(words) == text and wanted.issuperset(words)


def share_of(wanted: set[str], tokens: Sequence[str]) -> float:
    """Share of ``tokens`` that are a wanted word."""
    return sum(token.strip().lower() in wanted for token in tokens) / max(1, len(tokens))


def share_at(wanted: set[str], tokens: Sequence[str], shares: Sequence[float]) -> float:
    """Summed ``shares`` of the ``tokens`` that are a wanted word."""
    pairs = zip(tokens, shares, strict=True)
    return sum(share for token, share in pairs if token.strip().lower() in wanted)


# ---------------------------------------------------------------------------------------- writing


def example_table(examples: dict[str, np.ndarray], store: ActivationStore) -> pyarrow.Table:
    """A row an example of `FeaturePass.examples`, with the tokens and sources of its window."""
    context, peak = examples["context"], examples["position"]
    starts = window_start(peak, store.context_length)
    tokens = store.windows("tokens", context, starts, WINDOW)
    documents = store.windows("documents", context, peak, 1)[:, 0]
    subsets = store.windows("subsets", context, peak, 1)[:, 0].astype(np.int16)
    subset_names = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(subsets), pyarrow.array(store.subset_names)
    )
    return pyarrow.table(
        {
            "feature": examples["feature"].astype(np.int32),
            "bucket": examples["bucket"].astype(np.int8),
            "rank": examples["rank"].astype(np.int16),
            "activation": examples["activation"],
            "context": context,
            "peak": (peak - starts).astype(np.int16),
            "document": documents,
            "subset": subset_names,
            "tokens": _lists(tokens),
            "activations": _lists(examples["window"]),
        }
    )


def _lists(values: np.ndarray) -> pyarrow.Array:
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), values.shape[1])


def feature_table(
    statistics: dict[str, np.ndarray | list], examples: pyarrow.Table, token_texts: list[str]
) -> pd.DataFrame:
    """A row a feature: `FeaturePass.statistics`, the tokens at its peaks, its label."""
    features = pd.DataFrame(statistics)
    features.insert(0, "feature", np.arange(len(features)))
    counts = _count_peak_tokens(examples, len(features), token_texts)
    peaks = [count.most_common(N_PROMOTED) for count in counts]
    features["peak_tokens"] = [[token for token, _ in pairs] for pairs in peaks]
    features["peak_shares"] = [
        [n / count.total() for _, n in pairs] for pairs, count in zip(peaks, counts, strict=True)
    ]
    features["label"] = features["peak_tokens"].map(make_label)
    return features


def _count_peak_tokens(
    examples: pyarrow.Table, n_features: int, token_texts: list[str]
) -> list[Counter]:
    """How often each text is at the peak of a feature's highest examples, by feature."""
    top = examples.filter(pyarrow.compute.equal(examples["bucket"], 0))
    feature, peak = top["feature"].to_numpy(), top["peak"].to_numpy()
    tokens = top["tokens"].combine_chunks().flatten().to_numpy()
    counts = [Counter() for _ in range(n_features)]
    for number, window, place in zip(feature, tokens.reshape(-1, WINDOW), peak, strict=True):
        counts[number][text_at(token_texts, window, place)] += 1
    return counts


def save_tables(folder: Path, examples: pyarrow.Table, token_texts: list[str]) -> None:
    """Write the table of examples, and the text of each token."""
    with artifacts.replacing(folder / EXAMPLES_FILE) as partial:
        pyarrow.parquet.write_table(examples, partial, row_group_size=ROWS_PER_GROUP)
    content = json.dumps(token_texts, indent=1, ensure_ascii=False) + "\n"
    with artifacts.replacing(folder / TOKEN_TEXTS_FILE) as partial:
        partial.write_text(content, "utf-8", "backslashreplace")  # JSON's form too


def save_features(path: Path, features: pd.DataFrame) -> None:
    """Write a table of features."""
    with artifacts.replacing(path) as partial:
        features.to_parquet(partial, index=False)
