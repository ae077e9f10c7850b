"""Analyse the features of a trained autoencoder: how sparse, how faithful, what they fire on.

Reads data/activations and data/autoencoder, and the model and layer that they were made from.
Writes data/analysis: features.parquet and examples.parquet (the catalogue of features), a table for
each study, summary.json, plots, and report.html, which shows it all.

    python analyze_features.py --n-reported 40
"""

import sys
from pathlib import Path

from utils.artifacts import open_stage, read_json
from utils.backend import use_backend
from utils.settings import as_dict, read_settings, require, require_positive, run

# --- input
ACTIVATIONS_DIR = "data/activations"  # folder of save_activations.py
AUTOENCODER_DIR = "data/autoencoder"  # folder of train_autoencoder.py

# --- what to look at
N_TOKENS: int | None = 10_000_000  # tokens of the activations to go through; None: all of them
N_LOSS_TOKENS = 16_384  # held-out tokens to measure the language model's cross-entropy on
STUDIES = ("specificity", "completeness", "neurons")  # to make beside; see utils/ by these names
N_STUDIED = 1_000  # features drawn for specificity and neurons
N_NEURON_TOKENS = 65_536  # tokens to correlate features with neurons over
OTHER_AUTOENCODERS: tuple[str, ...] = ()  # folders of other sizes, for completeness to compare
MAP_FEATURES = True  # draw the UMAP of decoder directions; a minute for each 20,000 features
N_REPORTED = 30  # features that stand out, shown in the report beside ten drawn at random
BATCH_SIZE = 8_192  # tokens encoded together
SEED = 0  # of the random examples, the features drawn, and the map

# --- writing
ANALYSIS_DIR = "data/analysis"  # folder to write to
OVERWRITE = False  # delete an earlier analysis in ANALYSIS_DIR that had other settings

NOT_RECORDED = (
    "activations_dir",
    "autoencoder_dir",
    "other_autoencoders",
    "analysis_dir",
    "overwrite",
)
N_TOGETHER = 2_048  # tokens whose neurons, up to the layer, are in memory
OUTPUTS = ("*.parquet", "*.csv", "summary.json", "vocabulary.json", "*.png", "report.html")


def main() -> None:
    settings = read_settings(sys.modules[__name__])

    # 1. Check the settings, and open what the earlier scripts wrote.
    check(settings)
    use_backend("torch")  # beside the language model: one framework, one copy of the weights
    from utils import catalogue, completeness, neurons, specificity
    from utils.activations import ActivationStore
    from utils.evaluation import cross_entropies
    from utils.features import FeaturePass
    from utils.kinds import open_autoencoder
    from utils.language_model import load_language_model
    from utils.report import make_report

    store = ActivationStore(settings.activations_dir)
    autoencoder, trained = open_autoencoder(settings.autoencoder_dir, store)
    others = [open_autoencoder(folder, store) for folder in settings.other_autoencoders]
    recorded = {"script": "analyze_features.py", **as_dict(settings, leave_out=NOT_RECORDED)}
    recorded |= {"activations": store.fingerprint, "autoencoder": trained["fingerprint"]}
    recorded["other_autoencoders"] = [other["fingerprint"] for _, other in others]

    with open_stage(settings.analysis_dir, recorded, OUTPUTS, settings.overwrite) as folder:
        if (folder / "report.html").exists():
            print(f"{folder} is finished.\n{describe(read_json(folder / 'summary.json'), folder)}")
            return
        store.verify()
        language_model = load_language_model(store.model_name, store.layer, store.dtype)

        # 2. One pass over the activations: statistics and examples of every feature.
        contexts = store.first(settings.n_tokens)
        found = FeaturePass(autoencoder, store, settings.seed)
        found.run(contexts, settings.batch_size)

        # 3. What the model loses when it computes with the reconstruction.
        _, held_out = store.split(trained["held_out"])
        losses = cross_entropies(
            language_model, autoencoder, store, held_out, settings.n_loss_tokens
        )

        # 4. The tokens each feature promotes, and the map of decoder directions.
        pieces = catalogue.vocabulary(language_model.tokenizer)
        directions = autoencoder.directions()
        promoted = catalogue.promoted_tokens(language_model, directions, pieces)
        places = catalogue.map_directions(
            directions, found.uses > 0, settings.seed, settings.map_features
        )

        examples = catalogue.example_table(found, store)
        features = catalogue.feature_table(found, examples, promoted, places, pieces)
        summary = catalogue.summarise(found, store, trained, losses)

        # 5. Specificity: is what a feature is about there where it is active?
        if "specificity" in settings.studies:
            drawn = specificity.draw_examples(examples, pieces, settings.n_studied, settings.seed)
            scores = specificity.measure_specificity(drawn, found.subset_shares(), settings.seed)
            features["specificity"] = specificity.of_features(scores, len(features))
            levels = specificity.by_level(scores, settings.seed)
            summary["specificity"] = levels.to_dict("records")
            scores.to_csv(folder / "specificity.csv", index=False)

        # 6. Completeness: which words have a feature, and how frequent are they?
        if "completeness" in settings.studies:
            sizes = [autoencoder, *(other for other, _ in others)]
            words, summary["completeness"] = completeness.study(
                sizes, store, contexts, pieces, settings.batch_size, settings.seed
            )
            words.to_csv(folder / "completeness.csv", index=False)

        # 7. Features against neurons: is a feature not merely a neuron?
        if "neurons" in settings.studies:
            some = store.first(settings.n_neuron_tokens)
            n_tokens, n_features = len(some) * store.context_length, settings.n_studied
            frequent = neurons.draw_features(
                features["frequency"].to_numpy(), n_tokens, n_features, settings.seed
            )
            correlations = neurons.correlate_with_neurons(
                language_model, autoencoder, store, some, frequent, N_TOGETHER
            )
            correlations.to_csv(folder / "neurons.csv", index=False)
            summary["neurons"] = neurons.summarise(correlations)

        # 8. Save the catalogue.
        catalogue.save_catalogue(folder, features, examples, pieces, summary)

        # 9. Draw the plots, and put everything into one page.
        make_report(folder, found.fidelity.l0_counts, settings.n_reported, settings.seed)
        print(describe(summary, folder))


def check(settings) -> None:
    """Refuse wrong settings before anything is loaded."""
    require_positive(
        settings, "n_tokens", "n_loss_tokens", "n_reported", "n_studied", "n_neuron_tokens",
        "batch_size",
    )  # fmt: skip
    require(settings.seed >= 0, f"SEED must not be negative; it is {settings.seed}.")
    for study in settings.studies:
        require(study in STUDIES, f"STUDIES must be of {', '.join(STUDIES)}; one is {study!r}.")
    require(
        not settings.other_autoencoders or "completeness" in settings.studies,
        "OTHER_AUTOENCODERS is for completeness, which is not in STUDIES. Leave it out, or add it.",
    )


def describe(summary: dict, folder: Path) -> str:
    """The result in words."""
    losses = summary["cross_entropy"]
    explained, held_out = 1 - summary["fvu"], 1 - summary["held_out_fvu"]
    return (
        f"Over {summary['n_tokens']:,} tokens: variance explained {explained:.3f} ({held_out:.3f} "
        f"on those held out of training), L0 {summary['l0']:.1f}, {summary['n_alive']:,} of "
        f"{summary['n_latents']:,} features alive.\n"
        f"Cross-entropy {losses['untouched']:.3f} untouched, {losses['reconstruction']:.3f} with "
        f"the reconstruction, {losses['zero_ablated']:.3f} zero-ablated: "
        f"{summary['loss_recovered']:.1%} of the loss recovered.\n"
        f"{describe_studies(summary)}"
        f"Open {folder / 'report.html'} to read the features."
    )


def describe_studies(summary: dict) -> str:
    """A line for each study that was made."""
    lines = ""
    if levels := summary.get("specificity"):
        first, last = levels[0], levels[-1]
        lines += (
            f"Specificity, 0 to 3: {first['mean']:.2f} where features are weakest, "
            f"{last['mean']:.2f} where strongest; by another feature's concept "
            f"{last['chance']:.2f}.\n"
        )
    for fit in summary.get("completeness", ()):
        lines += (
            f"Completeness: {fit['n_covered']:,} of {fit['n_words']:,} words have a feature among "
            f"{fit['n_alive']:,}"
        )
        lines += (
            f"; half of those that make up {fit['half']:.1e} of all tokens, "
            f"{fit['half'] * fit['n_alive']:.1f} times a feature's share.\n"
            if "half" in fit
            else ".\n"
        )
    if found := summary.get("neurons"):
        lines += (
            f"Neurons: {found['at_most']:.0%} of {found['n_features']:,} features correlate at "
            "most 0.3 with any neuron of the model up to the layer.\n"
        )
    return lines


if __name__ == "__main__":
    run(main)
