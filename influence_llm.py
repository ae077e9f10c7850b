"""Change what the language model says by clamping a feature, or find the features that lead to it.

Reads data/analysis (analyze_features.py) and data/autoencoder (train_autoencoder.py); model and
layer are those they were made from. STUDY chooses:

steer      Prints untouched and steered text side by side and appends both to
           data/influence/generations.jsonl. What is recorded there is shown, not generated again.
evidence   Measures how much of their concepts features bring into texts, and at what price, beside
           mean-difference vectors and random directions; writes data/influence/evidence*.csv
           and .png. Goes on where it was.
attribute  Prints which features lead to the next token, by gradient and by ablation, and writes
           data/influence/attribution.csv, .json and .png, in place of an earlier prompt's; over
           held-out prompts too, if asked.

    python influence_llm.py --prompt "My favourite food is" --feature countries --strength 0 1 2
    python influence_llm.py --feature "San Francisco" --strength auto --where generated
    python influence_llm.py --study attribute --prompt "The capital of France is"
"""

import math
import shutil
import sys
from pathlib import Path
from typing import Literal

from utils.artifacts import make_folder, write_json
from utils.backend import use_backend
from utils.features.catalogue import Catalogue
from utils.features.search import choose_features
from utils.settings import Settings, read_settings, require, require_positive, run

Study = Literal["steer", "evidence", "attribute"]

# --- what to do
STUDY: Study = "steer"  # steer: with features changed; evidence: does it work; attribute: why
PLAYGROUND = False  # a page at 127.0.0.1 to find features and turn them, instead of a study
CHAT = False  # a chat in the terminal with features turned, instead of a study
PORT = 7_860  # of the playground

# --- what to say
PROMPT = "My favourite food is"  # text that the model continues
CHAT_TEMPLATE = False  # put PROMPT into the model's chat template, so that it is replied to
MAX_NEW_TOKENS = 40  # tokens to generate; fewer where the model ends its text
TEMPERATURE = 0.0  # 0 takes the likeliest token; 1 draws from the model's own distribution
SEED = 0  # of the drawing

# --- what to change
FEATURE: tuple[int | str, ...] = ()  # numbers, or words to find features by; none proposes some
INTERVENTION = "clamp"  # clamp to, or add, STRENGTH × the maximum; scale what is there; ablate
STRENGTH: tuple[float, ...] | Literal["auto"] = (0.0, 1.0, 2.0)  # -10 to 10; auto finds the limit
WHERE: tuple[int, ...] | str = "everywhere"  # everywhere, generated, or positions; BOS is at 0
SAVE_VECTOR: tuple[str, ...] = ()  # .safetensors, or .gguf for llama.cpp: what STRENGTH would add
N_PROPOSALS = 5  # features to propose where FEATURE names none, or for each word

# --- evidence, and STRENGTH auto
N_FEATURES = 20  # features to measure: the first proposed that steer on trial prompts
N_TRIED = 100  # proposed features to try for that, at most
MAX_PERPLEXITY = 3.0  # times the untouched, above which a text is no longer fluent

# --- attribute
PAIR: tuple[str, ...] = ()  # two tokens to compare, as ' Paris' ' London'; none: the likeliest two
N_ABLATED = 20  # features, of the largest attribution, that are ablated too
N_PROMPTS = 0  # held-out prompts to correlate attribution and ablation over; 50 are plenty
PROMPT_TOKENS = 24  # of each of them
FEATURES_PER_PROMPT = 48  # drawn from the active ones of each

# --- folders
ACTIVATIONS_DIR = "data/activations"  # folder of save_activations.py; for N_PROMPTS alone
ANALYSIS_DIR = "data/analysis"  # folder of analyze_features.py
AUTOENCODER_DIR = "data/autoencoder"  # folder of train_autoencoder.py
INFLUENCE_DIR = "data/influence"  # folder to write to

# --- not settings
# What has a meaning for some uses alone; given for another, it is refused.
ONLY_FOR = {
    **dict.fromkeys(("feature", "intervention", "strength", "where", "save_vector"), ("steer",)),
    "n_proposals": ("steer",),
    "max_perplexity": ("steer", "evidence"),
    **dict.fromkeys(("n_features", "n_tried"), ("evidence",)),
    **dict.fromkeys(("pair", "n_ablated", "n_prompts"), ("attribute",)),
    **dict.fromkeys(("prompt_tokens", "features_per_prompt"), ("attribute",)),
    "study": ("steer", "evidence", "attribute"),
    "prompt": ("steer", "attribute", "playground"),
    "chat_template": ("steer", "attribute", "playground"),
    **dict.fromkeys(("max_new_tokens", "temperature"), ("steer", "evidence", "playground", "chat")),
    "port": ("playground",),
}


def main() -> None:
    settings = read_settings(sys.modules[__name__])
    use_backend("torch")
    use = use_of(settings)
    check(settings)
    catalogue, autoencoder_path = read_analysis(settings)
    studies = {"steer": steer, "evidence": evidence, "attribute": attribute}
    uses = studies | {"chat": chat, "playground": playground}
    uses[use](settings, catalogue, autoencoder_path)


def steer(settings: Settings, catalogue: Catalogue, autoencoder_path: Path) -> None:
    """Texts with and without features changed."""
    from utils.influence import generations
    from utils.influence.evidence import describe_strength, find_strength
    from utils.influence.export import require_exportable, save_vectors
    from utils.influence.texts import Writer

    # 1. Choose the features to change: by number, by word, or proposed.
    require_exportable(settings.save_vector, catalogue.summary["layer"])
    width = shutil.get_terminal_size().columns
    features = choose_features(catalogue, settings.feature, settings.n_proposals, width)
    log = generations.open_log(settings.influence_dir)
    recorded, model = generations.read_records(log), None

    # 2. Find how strongly, if asked: up to where the text falls apart.
    strengths = (0.0,) if settings.intervention == "ablate" else settings.strength
    if strengths == "auto":
        model = generations.load_model(catalogue, autoencoder_path)
        writer = Writer(model, catalogue, settings)
        strength, n_fluent = find_strength(writer, features, settings)
        print(describe_strength(strength, n_fluent, settings.intervention))
        strengths = (strength,)

    # 3. Load the model and the autoencoder, unless every text is recorded already.
    requests = generations.list_requests(settings, catalogue, features, strengths)
    if settings.save_vector:
        clamps = generations.clamps_of(requests[0])
        save_vectors(settings.save_vector, clamps, catalogue.summary, autoencoder_path)
    missing = [request for request in requests if generations.key(request) not in recorded]
    if missing and not model:
        model = generations.load_model(catalogue, autoencoder_path)

    # 4. Generate, untouched and steered, what is not recorded yet.
    records = generations.generate_records(requests, recorded, model, log)

    # 5. Print the texts side by side.
    print(f"Prompt: {settings.prompt}")
    for record in records:
        print("\n" + generations.show_record(record, width))
    if not model:
        print(f"\nAll of this was recorded in {log}; the model was not loaded.")


def evidence(settings: Settings, catalogue: Catalogue, autoencoder_path: Path) -> None:
    """Whether features steer what they are about, and better than other directions do."""
    from utils.influence import evidence
    from utils.influence.generations import load_model
    from utils.influence.texts import Texts

    # 1. Propose features by a rule, none by hand.
    folder = make_folder(settings.influence_dir, "--influence-dir")
    candidates = catalogue.propose(settings.n_tried)["feature"].tolist()
    model = load_model(catalogue, autoencoder_path)

    # 2. Of those that steer on trial, write texts by every method at every strength, and let the
    #    untouched model read them.
    log = folder / "evidence.jsonl"
    log.open("ab").close()
    texts = Texts(model, catalogue, settings, log)
    limits = settings.n_features, settings.max_perplexity
    table, n_tried = evidence.collect(texts, candidates, *limits)

    # 3. Find each feature's useful strength on some prompts, and judge it on the others.
    best = evidence.at_useful_strength(table, settings.max_perplexity)
    best.insert(1, "label", catalogue.features["label"][best["feature"]].to_numpy())
    curves = evidence.curves(table, settings.seed)
    summary = evidence.summarise(best, n_tried, settings.max_perplexity, settings.seed)

    # 4. Write tables and a picture, and print the result.
    best.to_csv(folder / "evidence_features.csv", index=False)
    curves.to_csv(folder / "evidence_curves.csv", index=False)
    write_json(folder / "evidence.json", summary)
    evidence.plot_evidence(curves, settings.max_perplexity, folder / "evidence.png")
    print(evidence.show_evidence(summary, settings.max_perplexity))


def attribute(settings: Settings, catalogue: Catalogue, autoencoder_path: Path) -> None:
    """The features that lead to the next token."""
    from utils.activations.store import ActivationStore, spread
    from utils.autoencoder.saved import open_autoencoder
    from utils.influence import attribution
    from utils.steering.feature_model import FeatureModel
    from utils.steering.generation import prompt_tokens

    # 1. Load the model, in float32: what a feature does is small beside bfloat16's precision.
    folder = make_folder(settings.influence_dir, "--influence-dir")
    store = trained = None
    if settings.n_prompts:
        store = ActivationStore(settings.activations_dir)
        _, trained = open_autoencoder(settings.autoencoder_dir, store)
    model = FeatureModel.load(catalogue.summary, autoencoder_path, "float32")
    language_model = model.language_model

    # 2. One pass forward and one back: what each active feature adds to the difference of logits.
    tokens = prompt_tokens(language_model, settings.prompt, settings.chat_template)
    pair = attribution.token_pair(language_model, settings.pair)
    result = attribution.attribute(model, tokens, pair)
    features = attribution.of_features(result)

    # 3. Ablate the largest, to see whether it is so.
    top = features.head(settings.n_ablated)
    labels = catalogue.features["label"]
    top = top.assign(
        ablation=attribution.ablate(model, result, top["feature"]),
        label=labels[top["feature"]].to_numpy(),
    )

    # 4. Print, draw and write the result.
    words = [language_model.tokenizer.decode([token]) for token in (*result.pair, *tokens[0])]
    print(attribution.show_attribution(words[:2], result.difference, top, settings.prompt))
    top.to_csv(folder / "attribution.csv", index=False)
    asked = {"prompt": settings.prompt, "chat_template": settings.chat_template}
    answer = {"pair": words[:2], "difference": result.difference}
    write_json(folder / "attribution.json", asked | answer)
    attribution.plot_attribution(result, words, labels, folder / "attribution.png")

    # 5. Over held-out prompts: does attribution, or mere activation, tell what ablation does?
    if settings.n_prompts:
        _, held_out = store.split(trained["held_out"])
        contexts = spread(held_out, settings.n_prompts)
        sample = attribution.Sample(
            settings.prompt_tokens, settings.features_per_prompt, settings.seed
        )
        table = attribution.correlate(model, store, contexts, sample)
        table.to_csv(folder / "attribution_correlation.csv", index=False)
        print(attribution.show_correlations(attribution.correlations(table, settings.seed)))


def chat(settings: Settings, catalogue: Catalogue, autoencoder_path: Path) -> None:
    """A chat in the terminal with features turned, until the user leaves."""
    from utils.influence.chat import Chat
    from utils.influence.generations import load_model

    model = load_model(catalogue, autoencoder_path)
    Chat(catalogue, model, settings.max_new_tokens, settings.temperature, settings.seed).run()


def playground(settings: Settings, catalogue: Catalogue, autoencoder_path: Path) -> None:
    """A page to find features and turn them, until the user leaves."""
    from utils.influence.generations import load_model
    from utils.influence.playground import Playground, require_free, serve

    require_free(settings.port)
    serve(Playground(catalogue, load_model(catalogue, autoencoder_path)), settings)


def use_of(settings: Settings) -> str:
    """Which of the uses is asked for: a study, the playground or the chat.

    Raises:
        InputError: Two uses are asked for, or one is given what it has not.
    """
    require(
        not (settings.playground and settings.chat),
        "One of PLAYGROUND and CHAT can be on at a time.",
    )
    use = "playground" if settings.playground else "chat" if settings.chat else settings.study
    for name, uses in ONLY_FOR.items():
        value = getattr(settings, name)
        require(
            use in uses or value == globals()[name.upper()],
            f"{name.upper()} is for {', '.join(uses)}; this is {use}, and {name.upper()} is "
            f"{value!r}. Leave it out.",
        )
    return use


def check(settings: Settings) -> None:
    """Refuse wrong settings before anything is read."""
    from utils.influence.evidence import TRIAL_MARGIN

    require_positive(
        settings, "max_new_tokens", "n_proposals", "n_features", "n_tried", "n_ablated",
        "features_per_prompt",
    )  # fmt: skip
    require(
        settings.max_perplexity * TRIAL_MARGIN > 1,
        f"MAX_PERPLEXITY must be greater than {1 / TRIAL_MARGIN:g} times the untouched, for trials "
        f"allow {TRIAL_MARGIN:.0%} of it; it is {settings.max_perplexity}.",
    )
    require(
        settings.n_prompts == 0 or settings.n_prompts >= 2,
        f"N_PROMPTS must be 0, or 2 and more, to correlate over; it is {settings.n_prompts}.",
    )
    require(
        settings.prompt_tokens >= 2,
        f"PROMPT_TOKENS must be at least 2, for BOS and a token; it is {settings.prompt_tokens}.",
    )
    require(bool(settings.prompt.strip()), "PROMPT must hold some text; it is empty.")
    require(
        settings.temperature == 0 or 0.01 <= settings.temperature < math.inf,
        f"TEMPERATURE must be 0 or a finite number from 0.01 on; it is {settings.temperature}.",
    )
    require(0 <= settings.seed < 2**63, f"SEED must be from 0 to 2^63 - 1; it is {settings.seed}.")
    check_strength(settings)
    check_saved_vector(settings)


def check_strength(settings: Settings) -> None:
    """Refuse a change of features that is none, or a strength that does not suit it."""
    from utils.steering.clamps import check_change

    require(
        settings.strength == "auto"
        or (len(settings.strength) > 0 and all(map(math.isfinite, settings.strength))),
        f"STRENGTH must be one finite number or several, or auto; it is {settings.strength}. "
        "The useful range is -10 to 10.",
    )
    check_change(settings.intervention, settings.where)
    require(
        settings.strength != "auto"
        or (settings.intervention != "ablate" and isinstance(settings.where, str)),
        "STRENGTH auto needs an INTERVENTION other than ablate, and WHERE everywhere or generated.",
    )
    require(
        settings.intervention != "ablate" or settings.strength == STRENGTH,
        "STRENGTH does not matter to INTERVENTION ablate; it is "
        f"{settings.strength}. Leave it out.",
    )


def check_saved_vector(settings: Settings) -> None:
    """Refuse to save a change of features that is not the addition of one vector."""
    if not settings.save_vector:
        return
    require(
        settings.strength == "auto" or (len(settings.strength) == 1 and settings.strength[0] != 0),
        f"SAVE_VECTOR needs one STRENGTH other than 0; there is {settings.strength}. Give one.",
    )
    require(
        settings.where == "everywhere",
        "SAVE_VECTOR needs WHERE everywhere, for that is where other programs add a vector; it is "
        f"{settings.where!r}.",
    )
    require(
        settings.intervention in ("clamp", "add"),
        "SAVE_VECTOR needs INTERVENTION clamp or add, for a vector can only be added; it is "
        f"{settings.intervention}.",
    )


def read_analysis(settings: Settings) -> tuple[Catalogue, Path]:
    """The catalogue of features, and the path of the autoencoder that it is of.

    Raises:
        InputError: One is missing, or the analysis is of another autoencoder.
    """
    catalogue = Catalogue(settings.analysis_dir)
    return catalogue, catalogue.autoencoder_path(settings.autoencoder_dir)


if __name__ == "__main__":
    run(main)
