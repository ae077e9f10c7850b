"""An analysis under way: the data that its studies share, and their findings.

Every finished step is kept in the folder, so that an analysis that was killed goes on after it.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import pyarrow.parquet
import torch

from utils.activations.store import ActivationStore
from utils.artifacts import read_json, reading, replacing, write_json
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.fidelity import loss_recovered
from utils.features import catalogue, studies
from utils.features.catalogue import REMEDY
from utils.features.feature_pass import FeaturePass
from utils.features.judge import Answers, JudgeSettings, open_judge
from utils.language_model import LanguageModel, load_language_model, token_texts
from utils.settings import Json
from utils.steering.feature_model import FeatureEncoder, FeatureModel

PASS_FILE = "pass.json"  # the results of the pass


class AnalysisSettings(JudgeSettings, Protocol):
    """The settings of analyze_features.py that an analysis and its studies read."""

    n_tokens: int | None
    n_loss_tokens: int
    n_studied: int
    n_neuron_tokens: int
    n_explained: int
    map_features: bool
    batch_size: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Findings:
    """The results of a study; empty where it has none."""

    summary: Json  # its entry of summary.json; None for no entry
    words: str = ""  # the same for people, a sentence a line
    tables: dict[str, pd.DataFrame] = dataclasses.field(default_factory=dict)  # CSV files by name
    columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # to join to features


class Analysis:
    """The data that the studies of one autoencoder share, and the folder they write to.

    Args:
        folder: For the tables.
        store: The activations that the autoencoder was trained on.
        trained: The metrics of its training, with its settings and fingerprint.
        other_sizes: Further dictionaries of the same activations.

    Attributes:
        all_sizes: All dictionaries, the smallest first.
        contexts: Contexts of the store that are analysed: spread over all of it.
        held_out: Contexts held out of training.
        features: The table of features, a row a feature; this and the next after `run_pass`.
        examples: The table of examples.
        token_texts: The text of each token.
        subset_shares: Share of the analysed tokens by corpus subset.
    """

    def __init__(
        self,
        folder: Path,
        settings: AnalysisSettings,
        store: ActivationStore,
        autoencoder: SparseAutoencoder,
        trained: dict[str, Json],
        other_sizes: list[SparseAutoencoder],
    ):
        self.folder, self.settings, self.store = folder, settings, store
        self.autoencoder, self.trained = autoencoder, trained
        self.all_sizes = sorted([autoencoder, *other_sizes], key=lambda one: one.n_latents)
        self.words: list[str] = []
        self.contexts = store.sample(settings.n_tokens)
        done = folder / PASS_FILE
        if done.exists() and "share_analysed" not in read_json(done, REMEDY):
            self.contexts = range(len(self.contexts))  # those of an earlier version's pass
        self.held_out = store.split(trained["held_out"], trained["most_held_out_tokens"]).held_out

    @functools.cached_property
    def encoder(self) -> FeatureEncoder:
        """The autoencoder, giving feature activations, without a language model."""
        return FeatureEncoder(self.autoencoder)

    @functools.cached_property
    def model(self) -> FeatureModel:
        """The language model with the autoencoder in it."""
        store = self.store
        return FeatureModel(self.language_model, store.layer, self.autoencoder, store.outlier_norm)

    @functools.cached_property
    def language_model(self) -> LanguageModel:
        """The model that made the activations, loaded when a step first needs it."""
        store = self.store
        return load_language_model(store.model_name, store.layer, store.dtype)

    @functools.cached_property
    def judge(self) -> Answers | None:
        """The language model that judges features, if the settings name one."""
        return open_judge(self.settings, self.folder)

    def verify(self) -> None:
        """Check the shards that the analysis reads against their checksums."""
        compared = self.store.sample(self.settings.n_neuron_tokens)
        self.store.verify(self.folder, [*self.contexts, *compared, *self.held_out])

    @torch.no_grad()
    def run_pass(self) -> None:
        """One pass over the activations; it makes the tables of features and examples."""
        done = self.folder / PASS_FILE
        if not done.exists():
            feature_pass = FeaturePass(self.encoder, self.store, self.settings.seed)
            feature_pass.run(self.contexts, self.settings.batch_size)
            texts = token_texts(self.language_model.tokenizer)
            blocks = feature_pass.example_blocks()
            tables = (catalogue.example_table(block, self.store) for block in blocks)
            peaks = catalogue.PeakTokens(texts)
            catalogue.save_tables(self.folder, peaks.counted(tables), texts)
            features = catalogue.feature_table(feature_pass.statistics(), peaks)
            catalogue.save_features(self.folder / "pass.parquet", features)
            share = len(self.contexts) / self.store.n_contexts
            summary = summarise(feature_pass, self.store, self.trained)
            write_json(done, summary | {"share_analysed": share})
        self.summary = read_json(done, REMEDY)
        self.words += missing_in_words(self.summary)
        self.subset_shares = self.summary["subset_shares"]
        self.features = catalogue.read_features(self.folder / "pass.parquet")
        with reading(self.folder / catalogue.EXAMPLES_FILE, REMEDY) as path:
            self.examples = pyarrow.parquet.read_table(path)
        self.token_texts = read_json(self.folder / catalogue.TOKEN_TEXTS_FILE, REMEDY)

    @torch.no_grad()
    def run_study(self, name: str) -> None:
        """Run a study and keep its findings, unless an earlier run did."""
        kept = self.folder / f"study-{name}.json"
        columns = kept.with_suffix(".parquet")
        if not kept.exists():
            if self.judge is not None:
                self.judge.reset_counts()
            findings = studies.load(name).study(self)
            for table, rows in findings.tables.items():
                with replacing(self.folder / f"{table}.csv") as partial:
                    rows.to_csv(partial, index=False)
            table = pd.DataFrame(findings.columns, index=self.features.index)
            catalogue.save_features(columns, table)
            content = {"summary": findings.summary, "words": findings.words}
            if self.judge is not None and self.judge.asked:
                content["judge"] = self.judge.summary()
                content["words"] = "\n".join(
                    [*filter(None, [findings.words]), *self.judge.in_words()]
                )
            write_json(kept, content)
        findings = read_json(kept, REMEDY)
        if findings["summary"] is not None:
            self.summary[name] = findings["summary"]
        if "judge" in findings:
            self.summary.setdefault("judge", {})[name] = findings["judge"]
        self.words += [findings["words"]] if findings["words"] else []
        for column, values in catalogue.read_features(columns).items():
            self.features[column] = values

    def save(self) -> dict[str, Json]:
        """Write the table of features and, last, the summary, which it returns."""
        self.summary["loss_recovered"] = loss_recovered(self.summary["cross_entropy"])
        self.summary["words"] = self.words
        catalogue.save_features(self.folder / catalogue.FEATURES_FILE, self.features)
        write_json(self.folder / catalogue.SUMMARY_FILE, self.summary)
        return self.summary


def missing_in_words(summary: dict[str, Json]) -> list[str]:
    """What of the saved activations is not analysed, as a sentence; nothing if all of it is."""
    share = summary.get("share_analysed", 1.0)
    if share == 1:
        return []
    missing = [name for name, part in summary["subset_shares"].items() if not part]
    names = f", and nothing of {', '.join(missing)}" if missing else ""
    return [
        f"Analysed: {share:.1%} of the saved contexts, evenly spaced over all{names}; N_TOKENS "
        "decides."
    ]


def summarise(feature_pass: FeaturePass, store: ActivationStore, trained: dict) -> dict[str, Json]:
    """The results of the pass as a whole, and the model, data and autoencoder they are from."""
    alive, fidelity = feature_pass.uses.cpu().numpy() > 0, feature_pass.fidelity
    l0_counts = feature_pass.l0_counts.cpu().numpy()
    of_store = ("model_name", "revision", "layer", "dtype", "dataset", "outlier_norm", "excluded")
    return {
        **{name: getattr(store, name) for name in of_store},
        "autoencoder_fingerprint": trained["fingerprint"],
        "kind": trained["kind"],
        "n_latents": len(alive),
        "n_alive": int(alive.sum()),
        "dead_fraction": float(1 - alive.mean()),
        "n_tokens": fidelity.n_rows,
        "fvu": fidelity.fvu,
        "held_out_fvu": trained["fvu"],
        "cosine": fidelity.cosine,
        "l0": fidelity.l0,
        "l0_counts": np.trim_zeros(l0_counts, "b").tolist(),
        "subset_shares": feature_pass.subset_shares(),
    }
