"""An analysis under way: the data that its studies share, and their findings.

Every finished step is kept in the folder, so that an analysis that was killed goes on after it. The
folder is of one pass over the activations. The studies of it are kept by themselves, each with the
settings that it depends on, and may be added and left out later:

pass-backup.npz                          an unfinished pass
pass.json, pass.parquet                  the results of the pass; examples.parquet too
study-NAME.json, study-NAME.parquet      the findings of a study, its settings; columns of features
features.parquet, summary.json           both together, of the studies that were asked for last
"""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import pyarrow.parquet
import torch

from utils.activations.store import ActivationStore
from utils.artifacts import (
    SETTINGS_FILE,
    RunRecord,
    read_json,
    reading,
    write_csv,
    write_json,
)
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.fidelity import loss_recovered
from utils.features import catalogue, studies
from utils.features.catalogue import REMEDY
from utils.features.feature_pass import FeaturePass
from utils.features.judge import Answers, JudgeSettings, open_judge
from utils.features.pass_backup import PassBackup
from utils.language_model import LanguageModel, load_language_model, token_texts
from utils.settings import Json, TimeIsUp, TimeLimit, as_dict, require
from utils.steering.feature_model import FeatureEncoder, FeatureModel

PASS_FILE = "pass.json"  # the results of the pass
BACKUP_FILE = "pass-backup.npz"  # of an unfinished one
PAGE = "browser/index.html"  # written last


class AnalysisSettings(JudgeSettings, Protocol):
    """The settings of analyze_features.py that an analysis and its studies read."""

    n_tokens: int | None
    n_loss_tokens: int
    studies: tuple[studies.Name, ...]
    n_studied: int
    n_neuron_tokens: int
    n_explained: int
    map_features: bool
    n_reported: int
    batch_size: int
    seed: int
    max_hours: float | None


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
        others: Further dictionaries of the same activations, of other sizes, with theirs.

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
        others: list[tuple[SparseAutoencoder, dict[str, Json]]],
    ):
        self.folder, self.settings, self.store = folder, settings, store
        self.autoencoder, self.trained = autoencoder, trained
        every = [autoencoder, *(other for other, _ in others)]
        self.all_sizes = sorted(every, key=lambda one: one.n_latents)
        self.studies = studies.in_order(settings.studies)
        self.recorded = as_dict(settings)  # what findings may depend on
        self.recorded["other_autoencoders"] = [metrics["fingerprint"] for _, metrics in others]
        self.words: list[str] = []
        self.limit = TimeLimit(settings.max_hours)
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
            self._stop_in_time()
            feature_pass = FeaturePass(self.encoder, self.store, self.settings.seed)
            backup = PassBackup(self.folder / BACKUP_FILE, self.limit)
            feature_pass.run(self.contexts, self.settings.batch_size, backup)
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
        for path in self.folder.glob(f"*{BACKUP_FILE}"):  # and one that was not written whole
            path.unlink()
        self.summary = read_json(done, REMEDY)
        self.words += missing_in_words(self.summary)
        self.subset_shares = self.summary["subset_shares"]
        self.features = catalogue.read_features(self.folder / "pass.parquet")
        with reading(self.folder / catalogue.EXAMPLES_FILE, REMEDY) as path:
            self.examples = pyarrow.parquet.read_table(path)
        self.token_texts = read_json(self.folder / catalogue.TOKEN_TEXTS_FILE, REMEDY)

    def _stop_in_time(self) -> None:
        """Raise `TimeIsUp` unless there is time for another step, which is not cut."""
        if not self.limit.allows_another():
            n_kept = sum(self._kept(name).exists() for name in self.studies)
            raise TimeIsUp(f"the pass and {n_kept} of {len(self.studies)} studies are done.")

    # ---- studies

    def check_studies(self, overwrite: bool) -> None:
        """Refuse the findings of studies with other settings, or delete them if ``overwrite``."""
        differing = {name: lines for name in self.studies if (lines := self._differences(name))}
        lines = "\n".join(dict.fromkeys(itertools.chain(*differing.values())))
        require(
            overwrite or not differing,
            f"{self.folder} holds {', '.join(differing)} with other settings:\n{lines}\n"
            "Pass --overwrite to make these studies anew, or name another folder.",
        )
        for name in differing:
            self._kept(name).unlink()

    def _kept(self, name: str) -> Path:
        return self.folder / f"study-{name}.json"

    def _differences(self, name: str) -> list[str]:
        """A line for each setting that the kept findings of a study were made with otherwise."""
        if not self._kept(name).exists():
            return []
        # Earlier versions recorded the settings of all studies together.
        together = read_json(self.folder / SETTINGS_FILE)
        earlier = read_json(self._kept(name), self._remedy(name)).get("settings", together)
        now, defaults, earlier = (
            {each: values[each] for each in studies.SETTINGS[name] if each in values}
            for values in (self.recorded, as_dict(type(self.settings)()), earlier)
        )
        return RunRecord(now, defaults).differences(earlier)

    def _remedy(self, name: str) -> str:
        kept = self._kept(name).name
        return f"Delete {kept} beside it, and run the same command again to make the study anew."

    def is_finished(self) -> bool:
        """Whether the page shows what the settings ask for."""
        if not (self.folder / PAGE).exists():
            return False
        together = as_dict(type(self.settings)()) | read_json(self.folder / SETTINGS_FILE)
        made_of = read_json(self.folder / catalogue.SUMMARY_FILE, REMEDY).get("made_of", together)
        return (
            set(made_of["studies"]) == set(self.settings.studies)
            and made_of["n_reported"] == self.settings.n_reported
            and all(self._kept(name).exists() for name in self.studies)
        )

    def _remove_page(self) -> None:
        """Remove an earlier page, before there are other results than it shows."""
        (self.folder / PAGE).unlink(missing_ok=True)

    @torch.no_grad()
    def run_studies(self) -> None:
        """Run the studies that are asked for, each unless its findings are kept, and join them."""
        for name in self.studies:
            if not self._kept(name).exists():
                self._stop_in_time()
                self._run_study(name)
            self._join(name)
        idle = [
            name for name in studies.NAMES if name not in self.studies and self._kept(name).exists()
        ]
        if idle:
            print(f"Kept, and not shown, for STUDIES leaves it out: {', '.join(idle)}.")

    def _run_study(self, name: str) -> None:
        """Run a study, and keep its findings and the settings that it depends on."""
        if self.judge is not None:
            self.judge.reset_counts()
        try:
            findings = studies.load(name).study(self)
        except Exception as error:
            without = f", or leave {name} out of STUDIES" if name in studies.NAMES else ""
            error.add_note(
                f"This was the study {name}. All that was finished before is kept in "
                f"{self.folder}. Run the same command to try it again{without}."
            )
            raise
        for table, rows in findings.tables.items():
            write_csv(self.folder / f"{table}.csv", rows)
        kept = self._kept(name)
        table = pd.DataFrame(findings.columns, index=self.features.index)
        catalogue.save_features(kept.with_suffix(".parquet"), table)
        words = findings.words
        if not words and findings.summary is not None and not findings.summary:
            words = f"{name.capitalize()}: there is nothing to study."
        content = {"summary": findings.summary, "words": words}
        if self.judge is not None and self.judge.asked:
            content["judge"] = self.judge.summary()
            content["words"] = "\n".join([*filter(None, [words]), *self.judge.in_words()])
        content["settings"] = {each: self.recorded[each] for each in studies.SETTINGS[name]}
        self._remove_page()
        write_json(kept, content)

    def _join(self, name: str) -> None:
        """Join the kept findings of a study to the summary and to the table of features."""
        kept = self._kept(name)
        findings = read_json(kept, self._remedy(name))
        if findings["summary"] is not None:
            self.summary[name] = findings["summary"]
        if "judge" in findings:
            self.summary.setdefault("judge", {})[name] = findings["judge"]
        self.words += [findings["words"]] if findings["words"] else []
        table = catalogue.read_features(kept.with_suffix(".parquet"), self._remedy(name))
        for column, values in table.items():
            self.features[column] = values

    def save(self) -> dict[str, Json]:
        """Write the table of features and, last, the summary, which it returns."""
        self._remove_page()
        self.summary["loss_recovered"] = loss_recovered(self.summary["cross_entropy"])
        self.summary["words"] = self.words
        self.summary["made_of"] = {name: self.recorded[name] for name in ("studies", "n_reported")}
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
