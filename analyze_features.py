"""Analyse the features of a trained autoencoder: how sparse, how faithful, what they fire on.

Reads data/activations and data/autoencoder, and the model and layer that they were made from.
Writes data/analysis: features.parquet and examples.parquet (the catalogue of features), a table for
each study, summary.json, plots, and browser/index.html, a page to look at it all.

    python analyze_features.py --n-reported 40
    python analyze_features.py --search "San Francisco"   # searches what is there
"""

import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

from utils.artifacts import RunRecord, open_stage, read_json, require_disk_space
from utils.backend import use_backend
from utils.features import studies
from utils.features.catalogue import Catalogue
from utils.features.search import in_words, search, show_matches
from utils.settings import Settings, read_settings, require, require_positive, run

# --- input
ACTIVATIONS_DIR = "data/activations"  # folder of save_activations.py
AUTOENCODER_DIR = "data/autoencoder"  # folder of train_autoencoder.py

# --- what to look at
N_TOKENS: int | None = 10_000_000  # tokens of the activations to go through; None: all of them
N_LOSS_TOKENS = 16_384  # held-out tokens to measure the language model's cross-entropy on
STUDIES: tuple[studies.Name, ...] = studies.NAMES  # to make: utils/features/studies/ has them
N_STUDIED = 1_000  # features drawn for specificity and neurons
N_NEURON_TOKENS = 65_536  # tokens to correlate features with neurons over, and to compare them
N_EXPLAINED = 200  # features whose explanations are scored; all have one
OTHER_AUTOENCODERS: tuple[str, ...] = ()  # other sizes' folders, for completeness and splitting
MAP_FEATURES = True  # draw the UMAP of decoder directions; a minute for each 20,000 features
N_REPORTED = 30  # features that stand out, marked in the browser beside ten drawn at random
BATCH_SIZE = 8_192  # tokens encoded together
SEED = 0  # of the random examples, the features drawn, and the map

# --- a judge of specificity and explanations; None: word lists and words at peaks judge
JUDGE: str | None = None  # an instruct model: embedded, a hub name, a folder, or one at JUDGE_URL
JUDGE_URL: str | None = None  # OpenAI-compatible, to /v1; its key is JUDGE_API_KEY in .env
JUDGE_PRICE: tuple[float, float] | None = None  # of a million tokens in and out, for an estimate

# --- instead of analysing: search the finished analysis in ANALYSIS_DIR
SEARCH: str | None = None  # words: features that peak at them, are labelled or promote them
SEARCH_LIKE: int | None = None  # a feature: those that write the most similar directions
SEARCH_PROMPT: tuple[str, ...] = ()  # texts: features active on all of them; loads the model
SEARCH_NOT: tuple[str, ...] = ()  # texts that features found by SEARCH_PROMPT are silent on
SEARCH_TOKEN: str | None = None  # compare at this token of each text; None: the mean over it
SEARCH_CLASSIFIER = False  # tell SEARCH_PROMPT from SEARCH_NOT by a linear classifier of features
N_FOUND = 10  # features to print

# --- writing
ANALYSIS_DIR = "data/analysis"  # folder to write to
OVERWRITE = False  # delete an earlier analysis in ANALYSIS_DIR that had other settings

# --- not settings
NOT_RECORDED = (
    "activations_dir",
    "autoencoder_dir",
    "other_autoencoders",
    "judge_url",
    "judge_price",
    "analysis_dir",
    "overwrite",
    "search",
    "search_like",
    "search_prompt",
    "search_not",
    "search_token",
    "search_classifier",
    "n_found",
)
N_DESCRIBED = 5  # features in the closing words
BYTES_PER_FEATURE = 20_000  # of the tables and the browser
PAGE = "browser/index.html"  # written last: where it is, the analysis is finished
OUTPUTS = (
    "*.parquet", "*.csv", "pass.json", "study-*.json", "summary.json", "vocabulary.json", "*.png",
    "browser",
)  # fmt: skip


def main() -> None:
    settings = read_settings(sys.modules[__name__])

    # 1. Check the settings, and open what the earlier scripts wrote.
    check(settings)
    if settings.search_prompt or (settings.search, settings.search_like) != (None, None):
        print(show_matches(*search(settings), shutil.get_terminal_size().columns))
        return
    use_backend("torch")  # beside the language model: one framework, one copy of the weights
    from utils.activations.store import ActivationStore
    from utils.autoencoder.saved import open_autoencoder
    from utils.features.analysis import Analysis
    from utils.features.report import make_report

    store = ActivationStore(settings.activations_dir)
    autoencoder, trained = open_autoencoder(settings.autoencoder_dir, store)
    others = [open_autoencoder(folder, store) for folder in settings.other_autoencoders]
    sizes = [one.n_latents for one in (autoencoder, *(other for other, _ in others))]
    require(
        len(set(sizes)) == len(sizes),
        "OTHER_AUTOENCODERS must be of other sizes than each other and than the one in "
        f"AUTOENCODER_DIR; they have {', '.join(f'{n:,}' for n in sizes[1:])} latents, and it has "
        f"{sizes[0]:,}. Leave out one of each size.",
    )
    record = RunRecord.of(
        settings,
        NOT_RECORDED,
        activations=store.fingerprint,
        autoencoder=trained["fingerprint"],
        other_autoencoders=[other["fingerprint"] for _, other in others],
    )

    with open_stage(settings.analysis_dir, record, OUTPUTS, settings.overwrite) as folder:
        if (folder / PAGE).exists():
            print(f"{folder} is finished.\n{describe(read_json(folder / 'summary.json'), folder)}")
            return
        require_disk_space(folder, BYTES_PER_FEATURE * autoencoder.n_latents)
        analysis = Analysis(
            folder, settings, store, autoencoder, trained, [other for other, _ in others]
        )
        analysis.verify()

        # 2. One pass over the activations: statistics and examples of every feature.
        analysis.run_pass()

        # 3. The studies, in the paper's order: utils/features/studies/, a file each.
        for name in (*studies.ALWAYS, *studies.NAMES):
            if name in studies.ALWAYS or name in settings.studies:
                analysis.run_study(name)

        # 4. Save the tables, draw the pictures, and put everything into one page.
        summary = analysis.save()
        make_report(folder, settings.n_reported, settings.seed)
        print(describe(summary, folder))


def check(settings: Settings) -> None:
    """Refuse wrong settings before anything is loaded."""
    require_positive(
        settings, "n_tokens", "n_loss_tokens", "n_reported", "n_studied", "n_neuron_tokens",
        "n_explained", "batch_size", "n_found",
    )  # fmt: skip
    require(settings.seed >= 0, f"SEED must not be negative; it is {settings.seed}.")
    require(
        not settings.other_autoencoders or {"completeness", "splitting"} & set(settings.studies),
        "OTHER_AUTOENCODERS is for completeness and splitting, and STUDIES has neither. Leave it "
        "out, or add one.",
    )
    check_judge(settings)
    asked = (settings.search is not None, settings.search_like is not None)
    require(
        sum(asked) + bool(settings.search_prompt) <= 1,
        "One of SEARCH, SEARCH_LIKE and SEARCH_PROMPT can be given at a time.",
    )
    require(
        settings.search is None or bool(re.search(r"\w", settings.search)),
        f"SEARCH must hold a word; it is {settings.search!r}.",
    )
    require(
        all(text.strip() for text in (*settings.search_prompt, *settings.search_not)),
        "SEARCH_PROMPT and SEARCH_NOT must be of texts; one is empty.",
    )
    require(
        bool(settings.search_prompt) or not (settings.search_not or settings.search_token),
        "SEARCH_NOT and SEARCH_TOKEN belong to SEARCH_PROMPT, which is not given.",
    )
    require(
        bool(settings.search_prompt and settings.search_not) or not settings.search_classifier,
        "SEARCH_CLASSIFIER needs texts in both SEARCH_PROMPT and SEARCH_NOT.",
    )


def check_judge(settings: Settings) -> None:
    """Refuse settings of a judge that cannot be meant, or that would save a password."""
    url, price = settings.judge_url, settings.judge_price
    if url is not None:
        require(settings.judge is not None, "JUDGE_URL needs JUDGE, the model to ask for there.")
        parts = urlsplit(url)
        require(
            parts.scheme in ("http", "https") and bool(parts.hostname),
            f"JUDGE_URL must be an http or https address, such as http://127.0.0.1:8000/v1; it is "
            f"{url!r}.",
        )
        require(
            not parts.username and not parts.query,
            "JUDGE_URL must not hold a name, a password or a query. Put the key into .env, as "
            "JUDGE_API_KEY=...",
        )
    require(price is None or min(price) >= 0, f"JUDGE_PRICE must not be negative; it is {price}.")


def describe(summary: dict, folder: Path) -> str:
    """The result in words, and a few features that stand out."""
    explained, held_out = 1 - summary["fvu"], 1 - summary["held_out_fvu"]
    standing_out = Catalogue(folder).propose(N_DESCRIBED).to_dict("records")
    lines = [
        f"Over {summary['n_tokens']:,} tokens: variance explained {explained:.3f} ({held_out:.3f} "
        f"on those held out of training), L0 {summary['l0']:.1f}, {summary['n_alive']:,} of "
        f"{summary['n_latents']:,} features alive.",
        *summary["words"],
        *(f"  {in_words(row)}" for row in standing_out),
        f"Open {folder / PAGE} to look at the features.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
