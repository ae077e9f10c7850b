"""The catalogue of features: the tables that an analysis writes, read and searched once it is done.

features.parquet    a row a feature: statistics, label, promoted tokens, neighbours, place on a map
examples.parquet    a row an example: tokens and activations around a feature's peak
vocabulary.json     the text of every token, so that reading needs no tokenizer
summary.json        results of the analysis as a whole, and the model and data it is of
"""

import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.compute
import pyarrow.dataset
import pyarrow.parquet

from utils import artifacts
from utils.activations.store import ActivationStore
from utils.characters import is_word, readable, whole_characters, words_in
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
        self.features = read_features(self.folder / FEATURES_FILE)
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

    def example_blocks(
        self, n_features: int, first: int = 0
    ) -> Iterator[tuple[int, pyarrow.Table]]:
        """From ``first`` on, the examples of so many features at a time, with the first's number.

        They are in the order of features.
        """
        with artifacts.reading(self.folder / EXAMPLES_FILE, REMEDY) as path:
            examples = pyarrow.dataset.dataset(path)
            feature = pyarrow.dataset.field("feature")
            for start in range(first, len(self.features), n_features):
                some = (feature >= start) & (feature < start + n_features)
                yield start, examples.to_table(filter=some)

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
    texts = _flattened(tokens).dictionary_encode().combine_chunks()
    is_wanted = [is_of(text.strip().lower(), wanted) for text in texts.dictionary.to_pylist()]
    values = np.array(is_wanted, float)[texts.indices.to_numpy()]
    if weights is not None:
        values *= _flattened(weights).to_numpy()
    return np.bincount(feature, values, minlength=len(tokens))


def _flattened(lists: pd.Series) -> pyarrow.ChunkedArray:
    """The values of a column of lists, one after another."""
    return pyarrow.compute.list_flatten(pyarrow.chunked_array(pyarrow.array(lists)))


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
            "place": store.places.of(context, peak),  # of the peak's token in the document's
            "subset": subset_names,
            "tokens": _lists(tokens),
            "activations": _lists(examples["window"]),
        }
    )


def _lists(values: np.ndarray) -> pyarrow.Array:
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), values.shape[1])


def list_column(
    values: pyarrow.Array | np.ndarray, lengths: np.ndarray
) -> pd.arrays.ArrowExtensionArray:
    """A column of lists of these lengths, from the values of all of them.

    Arrow's, for Python's lists of a million features would take gigabytes. A cell reads as a list.
    """
    starts = pyarrow.array(np.r_[0, np.cumsum(lengths)].astype(np.int32))
    lists = pyarrow.ListArray.from_arrays(starts, pyarrow.array(values))
    return pd.arrays.ArrowExtensionArray(pyarrow.chunked_array([lists]))


def feature_table(statistics: dict[str, np.ndarray], peaks: "PeakTokens") -> pd.DataFrame:
    """A row a feature: `FeaturePass.statistics`, the tokens at its peaks, its label."""
    n = len(statistics["dead"])
    columns = {
        name: values if values.ndim == 1 else list_column(values.ravel(), [values.shape[1]] * n)
        for name, values in statistics.items()
    }
    features = pd.DataFrame({"feature": np.arange(n), **columns, **peaks.columns(n)})
    features["label"] = features["peak_tokens"].map(make_label)
    return features


class PeakTokens:
    """The commonest texts at the peaks of features' highest examples."""

    def __init__(self, token_texts: list[str]):
        self._token_texts = token_texts
        self._numbers: dict[str, int] = {}  # of the texts
        known = [self._number_of(text) if readable(text) == text else -1 for text in token_texts]
        self._known = np.array(known)  # −1 where a token's text depends on those around it
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def _number_of(self, text: str) -> int:
        return self._numbers.setdefault(text, len(self._numbers))

    def counted(self, tables: Iterable[pyarrow.Table]) -> Iterator[pyarrow.Table]:
        """Pass on tables of `example_table`, each with all examples of the features it is of."""
        for table in tables:
            self._add(table)
            yield table

    def _add(self, examples: pyarrow.Table) -> None:
        top = examples.filter(pyarrow.compute.equal(examples["bucket"], 0))
        peak = top["peak"].to_numpy()
        windows = top["tokens"].combine_chunks().flatten().to_numpy().reshape(-1, WINDOW)
        text = self._known[windows[np.arange(len(peak)), peak]]
        for i in np.flatnonzero(text < 0):
            text[i] = self._number_of(text_at(self._token_texts, windows[i], peak[i]))
        pair = top["feature"].to_numpy().astype(np.int64) << 32 | text
        pair, first, count = np.unique(pair, return_index=True, return_counts=True)
        feature = pair >> 32
        order = np.lexsort((first, -count, feature))
        feature, pair, count = feature[order], pair[order], count[order]
        rank = np.arange(len(feature)) - np.searchsorted(feature, feature)
        total = np.bincount(feature, count)[feature]
        listed = rank < N_PROMOTED
        self._parts.append((feature[listed], pair[listed] & 0xFFFFFFFF, (count / total)[listed]))

    def columns(self, n_features: int) -> dict[str, pd.arrays.ArrowExtensionArray]:
        """``peak_tokens`` and ``peak_shares`` of every feature, the commonest first."""
        feature, text, share = map(np.concatenate, zip(*self._parts, strict=True))
        lengths = np.bincount(feature, minlength=n_features)
        texts = pyarrow.array(list(self._numbers), pyarrow.string()).take(pyarrow.array(text))
        return {
            "peak_tokens": list_column(texts, lengths),
            "peak_shares": list_column(share, lengths),
        }


def save_tables(folder: Path, examples: Iterable[pyarrow.Table], token_texts: list[str]) -> None:
    """Write tables of examples into one file as they come, then the text of each token."""
    with artifacts.replacing(folder / EXAMPLES_FILE) as partial:
        first = next(examples := iter(examples))
        with pyarrow.parquet.ParquetWriter(partial, first.schema) as writer:
            for table in itertools.chain([first], examples):
                writer.write_table(table, ROWS_PER_GROUP)
    content = json.dumps(token_texts, indent=1, ensure_ascii=False) + "\n"
    with artifacts.replacing(folder / TOKEN_TEXTS_FILE) as partial:
        partial.write_text(content, "utf-8", "backslashreplace")  # JSON's form too


def save_features(path: Path, features: pd.DataFrame) -> None:
    """Write a table of features, without pandas' notes, which do not know lists."""
    table = pyarrow.Table.from_pandas(features, preserve_index=False)
    with artifacts.replacing(path) as partial:
        pyarrow.parquet.write_table(table.replace_schema_metadata(None), partial)


def read_features(path: Path, remedy: str = REMEDY) -> pd.DataFrame:
    """A table of `save_features`, or of pandas; columns of lists are those of `list_column`.

    If it is damaged, the `InputError` says to do what ``remedy`` says.
    """
    with artifacts.reading(path, remedy):
        table = pyarrow.parquet.read_table(path)
        return table.to_pandas(types_mapper=_list_type, ignore_metadata=True)


def _list_type(kind: pyarrow.DataType) -> pd.ArrowDtype | None:
    return pd.ArrowDtype(kind) if pyarrow.types.is_list(kind) else None
