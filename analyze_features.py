"""Analyse the features of a trained autoencoder: sparsity, fidelity, meaning.

Reads data/activations and data/autoencoder, and the language model that they were made from.
Writes data/analysis: features.parquet and examples.parquet (the catalogue of features), a table for
each study, summary.json, plots, and browser/index.html, a page to browse all of it.

    python analyze_features.py --n-reported 40
    python analyze_features.py --search "San Francisco"   # in a finished analysis
    python analyze_features.py --export neuronpedia saedashboard
"""

import itertools
import re
import shutil
import sys
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from utils.artifacts import RunRecord, open_stage, require_disk_space
from utils.backend import use_backend
from utils.features import share, studies
from utils.features.catalogue import Catalogue
from utils.features.search import in_words, search, show_matches
from utils.settings import (
    Settings,
    read_settings,
    require,
    require_positive,
    require_unicode,
    run,
)

# --- input
ACTIVATIONS_DIR = "data/activations"  # folder of save_activations.py
AUTOENCODER_DIR = "data/autoencoder"  # folder of train_autoencoder.py

# --- scope
N_TOKENS: int | None = 10_000_000  # tokens for statistics and examples of features; None: all
N_LOSS_TOKENS = 16_384  # held-out tokens for the cross-entropy with reconstructed activations
STUDIES: tuple[studies.Name, ...] = studies.NAMES  # which to run; see utils/features/studies/
N_STUDIED = 1_000  # random features in the studies of specificity and neurons
N_NEURON_TOKENS = 65_536  # tokens over which features are compared with MLP neurons
N_EXPLAINED = 200  # features whose explanations are scored; every feature has an explanation
OTHER_AUTOENCODERS: tuple[str, ...] = ()  # folders of other sizes, for completeness and splitting
MAP_FEATURES = True  # draw a UMAP of the decoder directions; takes a minute per 20,000 features
N_REPORTED = 30  # notable features to mark in the browser, besides ten random ones
BATCH_SIZE = 8_192  # tokens encoded in one batch
SEED = 0  # random seed for examples, drawn features and the map

# --- a judge of specificity and explanations; None: word lists and words at peaks judge
JUDGE: str | None = None  # instruct model to grade features: embedded, hub name, folder or API name
JUDGE_URL: str | None = None  # OpenAI-compatible API ending in /v1; key: JUDGE_API_KEY in .env
JUDGE_PRICE: tuple[float, float] | None = None  # per million input and output tokens, to show cost

# --- instead of analysing: search the finished analysis in ANALYSIS_DIR
SEARCH: str | None = None  # words; finds features that peak at, are labelled with or promote them
SEARCH_LIKE: int | None = None  # a feature; finds features with the most similar decoder directions
SEARCH_PROMPT: tuple[str, ...] = ()  # texts; finds features active on all of them; loads the model
SEARCH_NOT: tuple[str, ...] = ()  # texts on which features found by SEARCH_PROMPT must be inactive
SEARCH_TOKEN: str | None = None  # use activations at this token of each text; None: their mean
SEARCH_CLASSIFIER = False  # fit a linear classifier of features: SEARCH_PROMPT against SEARCH_NOT
N_FOUND = 10  # number of search results

# --- afterwards: for other tools; a finished analysis too
EXPORT: tuple[share.Tool, ...] = ()  # files to write: Neuronpedia's bulk layout, SAEDashboard's
EXPORT_DIR = "data/export"  # folder for them
NEURONPEDIA_SOURCE: str | None = None  # MODEL/LAYER-SET on Neuronpedia; None: made up and printed
UPLOAD: Literal["preview", "send"] | None = None  # to Neuronpedia; key: NEURONPEDIA_API_KEY in .env

# --- writing
ANALYSIS_DIR = "data/analysis"  # output folder
MAX_HOURS: float | None = None  # stop in time, with status 75, and go on when run again; see README
OVERWRITE = False  # delete an earlier analysis with other settings in ANALYSIS_DIR

# --- not settings
NOT_RECORDED = (
    "activations_dir", "autoencoder_dir", "judge_url", "judge_price", "analysis_dir", "max_hours",
    "overwrite",
    "search", "search_like", "search_prompt", "search_not", "search_token", "search_classifier",
    "n_found", "studies", "n_reported", "export", "export_dir", "neuronpedia_source", "upload",
    *itertools.chain(*studies.SETTINGS.values()),  # recorded with the findings of each study
)  # fmt: skip
N_DESCRIBED = 5  # features in the closing words
BYTES_PER_FEATURE = 20_000  # in the tables and the browser
OUTPUTS = (
    "*.parquet", "*.csv", "pass.json", "pass-backup.npz", "study-*.json", "summary.json",
    "vocabulary.json", "*.png", "browser",
)  # fmt: skip


def main() -> None:
    settings = read_settings(sys.modules[__name__])

    # 1. Check the settings, and open the outputs of the earlier scripts.
    check(settings)
    if settings.search_prompt or (settings.search, settings.search_like) != (None, None):
        print(show_matches(*search(settings), shutil.get_terminal_size().columns))
        return
    # On PyTorch, like the language model, so that weights need not be copied.
    use_backend("torch", keep_memory=True)
    from utils.activations.store import ActivationStore
    from utils.autoencoder.saved import open_autoencoder
    from utils.features.analysis import Analysis
    from utils.features.report import make_report

    store = ActivationStore(settings.activations_dir)
    autoencoder, trained = open_autoencoder(settings.autoencoder_dir, store)
    others = [open_autoencoder(folder, store) for folder in settings.other_autoencoders]
    check_sizes([each.n_latents for each in (autoencoder, *(other for other, _ in others))])
    source = share.choose_source(settings, store, trained["kind"], autoencoder.n_latents)
    facts = {"activations": store.fingerprint, "autoencoder": trained["fingerprint"]}
    record = RunRecord.of(settings, NOT_RECORDED, **facts)

    with open_stage(settings.analysis_dir, record, OUTPUTS, settings.overwrite) as folder:
        analysis = Analysis(folder, settings, store, autoencoder, trained, others)
        analysis.check_studies(settings.overwrite)
        if analysis.is_finished():
            catalogue = Catalogue(folder)
            catalogue.verify()
            print(f"{folder} is finished.\n{describe(catalogue.summary, folder)}")
        else:
            require_disk_space(folder, BYTES_PER_FEATURE * autoencoder.n_latents, OUTPUTS)
            analysis.verify()

            # 2. One pass over the activations: statistics and examples of every feature.
            analysis.run_pass()

            # 3. The studies, in the paper's order; each is a module in utils/features/studies/.
            analysis.run_studies()

            # 4. Save the tables, draw the pictures, and write the browser's page.
            summary = analysis.save()
            make_report(folder, settings.n_reported, settings.seed)
            print(describe(summary, folder))

        # 5. Write it for other tools, and send it to Neuronpedia, where that is asked for.
        share.share(settings, folder, source)


def check_sizes(sizes: list[int]) -> None:
    """Refuse two dictionaries of one size; the first is that of AUTOENCODER_DIR."""
    require(
        len(set(sizes)) == len(sizes),
        "OTHER_AUTOENCODERS must be of other sizes than each other and than the one in "
        f"AUTOENCODER_DIR; they have {', '.join(f'{n:,}' for n in sizes[1:])} latents, and it has "
        f"{sizes[0]:,}. Leave out one of each size.",
    )


def check(settings: Settings) -> None:
    """Refuse wrong settings before anything is loaded."""
    require_positive(
        settings, "n_tokens", "n_loss_tokens", "n_reported", "n_studied", "n_neuron_tokens",
        "n_explained", "batch_size", "n_found", "max_hours",
    )  # fmt: skip
    require(settings.seed >= 0, f"SEED must not be negative; it is {settings.seed}.")
    require(
        not settings.other_autoencoders or {"completeness", "splitting"} & set(settings.studies),
        "OTHER_AUTOENCODERS is for completeness and splitting, and STUDIES has neither. Leave it "
        "out, or add one.",
    )
    check_judge(settings)
    share.check(settings)
    searches = (settings.search, settings.search_like, settings.search_prompt or None)
    require(
        sum(search is not None for search in searches) <= 1,
        "One of SEARCH, SEARCH_LIKE and SEARCH_PROMPT can be given at a time.",
    )
    require(
        not (settings.export or settings.upload) or searches == (None, None, None),
        "EXPORT and UPLOAD are of an analysis, and SEARCH only looks into it. Leave one out.",
    )
    require_unicode(settings, "search", "search_prompt", "search_not", "search_token")
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
    """Refuse a judge's settings that are invalid, or that hold a password."""
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
    """The result in words, and a few notable features."""
    explained, held_out = 1 - summary["fvu"], 1 - summary["held_out_fvu"]
    notable = Catalogue(folder).propose(N_DESCRIBED).to_dict("records")
    lines = [
        f"Over {summary['n_tokens']:,} tokens: variance explained {explained:.3f} ({held_out:.3f} "
        f"on those held out of training), L0 {summary['l0']:.1f}, {summary['n_alive']:,} of "
        f"{summary['n_latents']:,} features alive.",
        *summary["words"],
        "Features that stand out:",
        *(f"  {in_words(row)}" for row in notable),
        f"Open {folder / 'browser' / 'index.html'} to look at the features.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
