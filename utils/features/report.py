"""The report of an analysis: its plots, and the browser that shows them and every feature."""

from pathlib import Path

import numpy as np
import pandas as pd

from utils import plots
from utils.embedded import TITLES
from utils.features import study_plots
from utils.features.browser import write_browser
from utils.features.catalogue import Catalogue

N_RANDOM = 10  # drawn at random, so that nobody has to take the chosen ones' word for it


def make_report(folder: Path, n_selected: int, seed: int) -> None:
    """Draw the plots of a saved catalogue and write its browser, the last files of a run."""
    catalogue = Catalogue(folder)
    shown = {
        "random": draw_features(catalogue.features, seed),
        "selected": catalogue.propose(n_selected)["feature"].tolist(),
    }
    named = {key: title for key, title in TITLES.items() if catalogue.summary[key] == "embedded"}
    write_browser(
        folder / "browser", catalogue, {**catalogue.summary, **named}, draw_plots(catalogue), shown
    )


def draw_features(features: pd.DataFrame, seed: int) -> list[int]:
    """Living features drawn at random, all alike."""
    alive = features[~features["dead"]]["feature"].to_numpy(copy=True)
    drawn = np.random.default_rng(seed).permutation(alive)[:N_RANDOM]
    return sorted(drawn.tolist())


def draw_plots(catalogue: Catalogue) -> dict[str, Path]:
    """Draw every plot into the catalogue's folder; returns their paths by caption."""
    folder, features, summary = catalogue.folder, catalogue.features, catalogue.summary
    plots.plot_density_histogram(
        features["frequency"].to_numpy(), summary["n_tokens"], folder / "density.png"
    )
    plots.plot_l0_histogram(np.array(summary["l0_counts"]), folder / "l0.png")
    plots.plot_fidelity(summary, folder / "fidelity.png")
    by_subset = pd.read_csv(folder / "fidelity.csv")
    plots.plot_fidelity_by_subset(by_subset, folder / "fidelity_by_subset.png")
    drawn = {
        "How often features fire": folder / "density.png",
        "How many features a token has": folder / "l0.png",
        "What the model loses with the reconstruction": folder / "fidelity.png",
        "In which kind of text it loses most": folder / "fidelity_by_subset.png",
    }
    if summary.get("specificity"):
        levels = pd.DataFrame(summary["specificity"])
        study_plots.plot_specificity(levels, folder / "specificity.png")
        drawn["Is what a feature is about there where it is active?"] = folder / "specificity.png"
    if "completeness" in summary:
        words = pd.read_csv(folder / "completeness.csv")
        study_plots.plot_completeness(words, summary["completeness"], folder / "completeness.png")
        drawn["Which words have a feature?"] = folder / "completeness.png"
    if summary.get("neurons"):
        correlations = pd.read_csv(folder / "neurons.csv")["correlation"].to_numpy()
        study_plots.plot_neurons(correlations, folder / "neurons.png")
        drawn["Is a feature merely a neuron?"] = folder / "neurons.png"
    if "score" in summary.get("explanations", {}):
        scores = pd.read_csv(folder / "explanations.csv")
        study_plots.plot_explanations(scores, summary["explanations"], folder / "explanations.png")
        drawn["Does a phrase tell what a feature fires on?"] = folder / "explanations.png"
    if summary.get("outputs"):
        scores = pd.read_csv(folder / "outputs.csv")
        study_plots.plot_outputs(scores, folder / "outputs.png")
        drawn["Does a feature write what it reads?"] = folder / "outputs.png"
    if summary.get("splitting"):
        # A label may be "null" or "None", which would count as missing.
        numbers = dict.fromkeys(("cosine", "x", "y"), "")
        table = pd.read_csv(folder / "splitting.csv", keep_default_na=False, na_values=numbers)
        family = summary["splitting"]["family"]
        if family is not None:
            study_plots.plot_family(table, family, folder / "family.png")
            drawn["What does a feature become in larger dictionaries?"] = folder / "family.png"
        if "x" in table:
            study_plots.plot_sizes(table, family, folder / "sizes.png")
            drawn["Where are the features of larger dictionaries?"] = folder / "sizes.png"
    if summary.get("directions"):
        study_plots.plot_directions(summary["directions"], folder / "directions.png")
        drawn["Does the model mind a feature's change more?"] = folder / "directions.png"
    if features["umap_x"].notna().any():
        plots.plot_umap(features, folder / "umap.png")
        drawn = {"Features by the direction they write": folder / "umap.png", **drawn}
    return drawn
