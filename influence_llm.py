"""Change what the language model says, by clamping a feature while it writes.

Reads data/analysis (analyze_features.py) and data/autoencoder (train_autoencoder.py); model and
layer are those they were made from. Prints untouched and steered text side by side and appends both
to data/influence/generations.jsonl. What is recorded there is shown, not generated again.

    python influence_llm.py --prompt "My favourite food is" --feature countries --strength 0 1 2
"""

import math
import shutil
import sys
from pathlib import Path
from typing import Any

from utils.artifacts import fingerprint, missing_stage
from utils.backend import use_backend
from utils.settings import read_settings, require, require_positive, run
from utils.terminal import show_feature, show_record

# --- what to say
PROMPT = "My favourite food is"  # plain text that the model continues
MAX_NEW_TOKENS = 40  # tokens to generate; fewer where the model ends its text
TEMPERATURE = 0.0  # 0 takes the likeliest token; 1 draws from the model's own distribution
SEED = 0  # of the drawing

# --- what to change
FEATURE: int | str | None = None  # a number, or a word to find a feature by; None proposes some
STRENGTH: tuple[float, ...] = (0.0, 1.0, 2.0)  # multiples of its maximum, -10 to 10; 0 ablates it
N_PROPOSALS = 5  # features to propose where FEATURE is None

# --- folders
ANALYSIS_DIR = "data/analysis"  # folder of analyze_features.py
AUTOENCODER_DIR = "data/autoencoder"  # folder of train_autoencoder.py
INFLUENCE_DIR = "data/influence"  # folder to write to


def main() -> None:
    settings = read_settings(sys.modules[__name__])

    # 1. Read the analysis, and choose the feature to clamp: by number, by word, or proposed.
    check(settings)
    use_backend("torch")
    from utils import generations

    catalogue, autoencoder_path = read_analysis(settings)
    feature = choose_feature(catalogue, settings)
    log = generations.open_log(settings.influence_dir)
    requests = generations.list_requests(settings, catalogue, feature)
    recorded = generations.read_records(log)

    # 2. Load the model and the autoencoder, unless every text is recorded already.
    missing = [request for request in requests if generations.key(request) not in recorded]
    models = generations.load_models(catalogue, autoencoder_path) if missing else None

    # 3. Generate, untouched and steered, what is not recorded yet.
    records = generations.generate_records(requests, recorded, models, log)

    # 4. Print the texts side by side.
    print(f"Prompt: {settings.prompt}")
    for record in records:
        print("\n" + show_record(record, shutil.get_terminal_size().columns))
    if not missing:
        print(f"\nAll of this was recorded in {log}; the model was not loaded.")


def check(settings: Any) -> None:
    """Refuse wrong settings before anything is read."""
    require_positive(settings, "max_new_tokens", "n_proposals")
    require(bool(settings.prompt.strip()), "PROMPT must hold some text; it is empty.")
    require(
        len(settings.strength) > 0 and all(map(math.isfinite, settings.strength)),
        f"STRENGTH must be one finite number or several; it is {settings.strength}. "
        "The useful range is -10 to 10.",
    )
    require(
        math.isfinite(settings.temperature) and settings.temperature >= 0,
        f"TEMPERATURE must be 0 or a finite number above; it is {settings.temperature}.",
    )
    require(0 <= settings.seed < 2**63, f"SEED must be from 0 to 2^63 - 1; it is {settings.seed}.")


def read_analysis(settings: Any) -> tuple[Any, Path]:
    """The catalogue of features, and the path of the autoencoder that it is of.

    Raises:
        InputError: One is missing, or the analysis is of another autoencoder.
    """
    from utils.catalogue import Catalogue

    catalogue = Catalogue(settings.analysis_dir)
    path = Path(settings.autoencoder_dir) / "autoencoder.keras"
    if not path.exists():
        raise missing_stage(path.parent, "autoencoder", "train_autoencoder.py")
    analysed, found = catalogue.summary["autoencoder_fingerprint"], fingerprint(path)
    require(
        analysed == found,
        f"{settings.analysis_dir} must be of the autoencoder in {settings.autoencoder_dir}; it is "
        f"of {analysed}, not of {found}. Run analyze_features.py for this autoencoder, or name the "
        "folders that belong together with --analysis-dir and --autoencoder-dir.",
    )
    return catalogue, path


def choose_feature(catalogue: Any, settings: Any) -> int:
    """The feature that FEATURE asks for; prints it, or the candidates that it is the first of."""
    wanted = settings.feature
    if isinstance(wanted, int):
        check_feature(catalogue, wanted)
        candidates = [wanted]
    elif wanted is None:
        candidates = catalogue.propose(settings.n_proposals)["feature"].tolist()
    else:
        candidates = catalogue.search(wanted, settings.n_proposals)["feature"].tolist()
    require(
        len(candidates) > 0,
        "FEATURE must be a number, or a word that some feature goes by; it is "
        f"{wanted!r}, and none was found. Try a number or another word.",
    )
    for feature in candidates:
        print(show_feature(catalogue, feature, shutil.get_terminal_size().columns) + "\n")
    if not isinstance(wanted, int):
        source = "proposed" if wanted is None else f"found for {wanted!r}"
        print(
            f"Clamping feature {candidates[0]}, the first of {len(candidates)} {source}. To choose "
            "another: --feature NUMBER, or a word to find one by.\n"
        )
    return candidates[0]


def check_feature(catalogue: Any, feature: int) -> None:
    """Refuse a feature that is out of range or dead."""
    n_latents = catalogue.summary["n_latents"]
    n_dead = int(catalogue.features["dead"].sum())
    rule = f"FEATURE must be from 0 to {n_latents - 1}, and not one of the {n_dead} dead ones;"
    remedy = "Leave --feature out for proposals, or give a word to find one by."
    require(0 <= feature < n_latents, f"{rule} it is {feature}. {remedy}")
    dead = bool(catalogue.features.loc[feature, "dead"])
    require(not dead, f"{rule} {feature} was active on no token of the analysis. {remedy}")


if __name__ == "__main__":
    run(main)
