"""An analysis under way: what its studies have in common, and what each of them found.

Every finished step is kept in the folder, so that an analysis that was killed goes on after it.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet
import torch

from utils.activations.store import ActivationStore
from utils.artifacts import read_json, replacing, write_json
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.features import tables
from utils.features.feature_pass import FeaturePass
from utils.features.judge import Answers, open_judge
from utils.features.neighbours import neighbour_table
from utils.language_model import LanguageModel, load_language_model
from utils.steering.evaluation import loss_recovered, measure_losses


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a study found.

    Attributes:
        summary: Its entry of ``summary.json``, plain JSON types; nothing where nothing was found.
        words: The same for people, a sentence a line; empty where nothing was found.
        tables: To write as CSV files, by name.
        columns: To join to the table of features, by name, an entry a feature each.
    """

    summary: Any
    words: str = ""
    tables: dict[str, pd.DataFrame] = dataclasses.field(default_factory=dict)
    columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Analysis:
    """What the studies of one autoencoder read, and where they write.

    Args:
        folder: Where the tables go.
        settings: Of analyze_features.py.
        store: The activations that the autoencoder was trained on.
        autoencoder: To be analysed.
        trained: The metrics of its training, with its settings and fingerprint.
        others: Further dictionaries of the same activations.

    Attributes:
        contexts: Contexts of the store that are gone through.
        held_out: Those held out of training.
        features: The table of features, once `go_through` is done, a row a feature.
        examples: The table of examples, then too.
        pieces: The text of each token, then too.
        subset_shares: Share of the tokens gone through that each corpus subset has, then too.
    """

    def __init__(
        self,
        folder: Path,
        settings: Any,
        store: ActivationStore,
        autoencoder: SparseAutoencoder,
        trained: dict[str, Any],
        others: list[SparseAutoencoder],
    ):
        self.folder, self.settings, self.store = folder, settings, store
        self.autoencoder, self.trained = autoencoder, trained
        self.others = sorted(others, key=lambda other: other.n_latents)
        self.words: list[str] = []
        self.contexts = store.first(settings.n_tokens)
        self.held_out = store.split(trained["held_out"])[1]

    @functools.cached_property
    def language_model(self) -> LanguageModel:
        """The model that the activations are of, loaded when a step first needs it."""
        store = self.store
        return load_language_model(store.model_name, store.layer, store.dtype)

    @functools.cached_property
    def judge(self) -> Answers | None:
        """The language model that judges features, where the settings name one."""
        return open_judge(self.settings, self.folder)

    def verify(self) -> None:
        """Check the shards that the analysis reads against their checksums."""
        n_tokens = self.settings.n_tokens
        n_tokens = n_tokens and max(n_tokens, self.settings.n_neuron_tokens)
        self.store.verify(self.folder, [*self.store.first(n_tokens), *self.held_out])

    @torch.no_grad()
    def go_through(self) -> None:
        """One pass over the activations, and the tables of features and examples of it."""
        done = self.folder / "pass.json"
        if not done.exists():
            found = FeaturePass(self.autoencoder, self.store, self.settings.seed)
            found.run(self.contexts, self.settings.batch_size)
            pieces = tables.vocabulary(self.language_model.tokenizer)
            examples = tables.example_table(found, self.store)
            tables.save_tables(self.folder, examples, pieces)
            features = tables.feature_table(found, examples, pieces)
            tables.save_features(self.folder / "pass.parquet", features)
            write_json(done, tables.summarise(found, self.store, self.trained))
        self.summary = read_json(done)
        self.subset_shares = self.summary["subset_shares"]
        self.features = pd.read_parquet(self.folder / "pass.parquet")
        self.examples = pyarrow.parquet.read_table(self.folder / "examples.parquet")
        self.pieces = read_json(self.folder / "vocabulary.json")

    def place_features(self) -> Findings:
        """What each feature's direction promotes, is near to, and where it lies on a map."""
        directions, alive = self.autoencoder.directions(), ~self.features["dead"].to_numpy()
        columns = dict(tables.promoted_tokens(self.language_model, directions, self.pieces))
        columns |= dict(neighbour_table(directions, alive))
        settings = self.settings
        places = tables.map_directions(directions, alive, settings.seed, settings.map_features)
        columns["umap_x"], columns["umap_y"] = places.T
        return Findings(None, columns=columns)

    def measure_loss(self) -> Findings:
        """What the model loses when it computes with the reconstruction, on held-out tokens."""
        n_tokens = self.settings.n_loss_tokens
        model = self.language_model, self.autoencoder, self.store
        table = measure_losses(*model, self.held_out, n_tokens)
        names = ["untouched", "reconstruction", "zero_ablated", "kl", "n_tokens"]
        table["loss_recovered"] = loss_recovered(table)
        found = {name: table.at["all", name].item() for name in names}  # a count stays whole
        words = (
            f"Cross-entropy {found['untouched']:.3f} untouched, {found['reconstruction']:.3f} with "
            f"the reconstruction, {found['zero_ablated']:.3f} zero-ablated: "
            f"{loss_recovered(found):.1%} of the loss recovered."
        )
        return Findings(found, words, {"fidelity": table.reset_index()})

    @torch.no_grad()
    def make(self, name: str, study: Callable[["Analysis"], Findings]) -> None:
        """Make a study and keep what it found, unless an earlier run did."""
        kept = self.folder / f"study-{name}.json"
        columns = kept.with_suffix(".parquet")
        if not kept.exists():
            found = study(self)
            for table, rows in found.tables.items():
                with replacing(self.folder / f"{table}.csv") as partial:
                    rows.to_csv(partial, index=False)
            with replacing(columns) as partial:
                pd.DataFrame(found.columns, index=self.features.index).to_parquet(partial)
            write_json(kept, {"summary": found.summary, "words": found.words})
        found = read_json(kept)
        if found["summary"] is not None:
            self.summary[name] = found["summary"]
        self.words += [found["words"]] if found["words"] else []
        for column, values in pd.read_parquet(columns).items():
            self.features[column] = values

    def save(self) -> dict[str, Any]:
        """Join what the studies found to the tables; the summary last: where it is, all is there.

        Returns:
            The summary.
        """
        self.summary["loss_recovered"] = loss_recovered(self.summary["cross_entropy"])
        self.summary["words"] = self.words
        tables.save_features(self.folder / "features.parquet", self.features)
        write_json(self.folder / "summary.json", self.summary)
        return self.summary
