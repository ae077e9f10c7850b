"""Change a language model's texts by clamping features, or find the features that lead to them.

Reads data/analysis (analyze_features.py), data/autoencoder (train_autoencoder.py) and the language
model that they were made from. STUDY is one of:

- steer prints untouched and steered text side by side and appends both to
  data/influence/generations.jsonl; a text that is recorded there is not generated again. One
  feature is drawn, too, beside what it makes the model write: data/influence/feature-N.png.
- evidence measures how much features bring their concepts into texts, and the cost in fluency,
  compared with mean-difference vectors and random directions; it writes
  data/influence/evidence*.csv and .png, and continues an interrupted run.
- attribute prints which features lead to the next token, by gradient and by ablation, and replaces
  data/influence/attribution.csv, .json and .png; optionally over held-out prompts too.

    python influence_llm.py --prompt "My favourite food is" --feature countries --strength 0 1 2
    python influence_llm.py --feature "San Francisco" --strength auto --where generated
    python influence_llm.py --study attribute --prompt "The capital of France is"
"""

import math
import shutil
import sys
from pathlib import Path
from typing import Literal

from utils.artifacts import make_folder, write_csv, write_json
from utils.backend import use_backend
from utils.features.catalogue import Catalogue
from utils.features.search import choose_features
from utils.settings import (
    Settings,
    read_settings,
    require,
    require_positive,
    require_unicode,
    run,
)

Study = Literal["steer", "evidence", "attribute"]
Strength = tuple[float, ...] | Literal["auto"]

# --- use
STUDY: Study = "steer"  # steer: change features; evidence: test steering; attribute: explain tokens
PLAYGROUND = False  # serve a web page at 127.0.0.1 to search and clamp features, not a study
CHAT = False  # chat in the terminal with clamped features, not a study
PORT = 7_860  # port of the playground

# --- generation
PROMPT = "My favourite food is"  # text that the model continues
CHAT_TEMPLATE = False  # put PROMPT into the model's chat template, so that the model replies to it
MAX_NEW_TOKENS = 40  # largest number of tokens to generate
TEMPERATURE = 0.0  # 0: the likeliest tokens; 1: samples from the model's distribution
SEED = 0  # random seed

# --- steer
FEATURE: tuple[int | str, ...] = ()  # numbers or words ('"12"' is a word); empty: some are proposed
INTERVENTION = "clamp"  # clamp to or add STRENGTH × maximum, scale by STRENGTH, or ablate
STRENGTH: Strength = (0.0, 1.0, 2.0)  # from -10 to 10; auto: the largest with fluent texts
WHERE: tuple[int, ...] | str = "everywhere"  # everywhere, generated (new tokens), or positions ≥ 1
SAVE_VECTOR: tuple[str, ...] = ()  # files: .safetensors, .gguf (llama.cpp), .json (Neuronpedia)
N_PROPOSALS = 5  # features to propose if FEATURE is empty, or to list for each of its words

# --- evidence, and STRENGTH auto
N_FEATURES = 20  # features to test: the first proposed that steer on trial prompts
N_TRIED = 100  # largest number of proposed features to try
MAX_PERPLEXITY = 3.0  # largest perplexity of a fluent text, relative to the untouched text's

# --- attribute
PAIR: tuple[str, ...] = ()  # two tokens to compare, as ' Paris' ' London'; if empty, the likeliest
N_ABLATED = 20  # features of the largest attribution to ablate
N_PROMPTS = 0  # held-out prompts to correlate attribution with ablation over, such as 50
PROMPT_TOKENS = 24  # tokens in each held-out prompt
FEATURES_PER_PROMPT = 48  # active features drawn for each held-out prompt

# --- folders
ACTIVATIONS_DIR = "data/activations"  # folder of save_activations.py; read only with N_PROMPTS
ANALYSIS_DIR = "data/analysis"  # folder of analyze_features.py
AUTOENCODER_DIR = "data/autoencoder"  # folder of train_autoencoder.py
INFLUENCE_DIR = "data/influence"  # output folder

# --- not settings
# Settings and the uses that they are for; set for another use, a setting is refused.
ONLY_FOR = {
    "feature intervention strength where save_vector n_proposals": ("steer",),
    "max_perplexity": ("steer", "evidence"),
    "n_features n_tried": ("evidence",),
    "pair n_ablated n_prompts prompt_tokens features_per_prompt": ("attribute",),
    "study": ("steer", "evidence", "attribute"),
    "prompt chat_template": ("steer", "attribute", "playground"),
    "max_new_tokens temperature": ("steer", "evidence", "playground", "chat"),
    "port": ("playground",),
}


def main() -> None:
    settings = read_settings(sys.modules[__name__])
    use_backend("torch")
    use = use_of(settings)
    check(settings)
    catalogue = Catalogue(settings.analysis_dir)
    autoencoder_path = catalogue.autoencoder_path(settings.autoencoder_dir)
    uses = {"steer": steer, "evidence": evidence, "attribute": attribute}
    uses |= {"chat": chat, "playground": playground}
    uses[use](settings, catalogue, autoencoder_path)


def steer(settings: Settings, catalogue: Catalogue, autoencoder_path: Path) -> None:
    """Generate texts with and without features changed."""
    from utils.influence import generations
    from utils.influence.evidence import describe_strength, find_strength
    from utils.influence.export import require_exportable, save_vectors
    from utils.influence.portrait import draw_portrait
    from utils.influence.texts import Writer

    # 1. Choose the features to change, by number, word or proposal.
    require_exportable(settings.save_vector, catalogue.summary["layer"])
    width = shutil.get_terminal_size().columns
    features = choose_features(catalogue, settings.feature, settings.n_proposals, width)
    log = generations.open_log(settings.influence_dir)
    recorded, model = generations.read_records(log), None

    # 2. With STRENGTH auto, find the largest strength at which texts are fluent.
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

    # 4. Generate the texts that are not recorded yet, and print all side by side.
    print(f"Prompt: {settings.prompt}")
    records = []
    for record in generations.generate_records(requests, recorded, model, log):
        print("\n" + generations.show_record(record, width))
        records.append(record)

    # 5. Draw a feature beside what it makes the model write.
    picture = log.with_name(f"feature-{features[0]}.png")
    if len(features) == 1:
        draw_portrait(catalogue, records, picture)
        print(f"\nDrawn: {picture}")
    if not model:
        print(f"\nAll of this was recorded in {log}; the model was not loaded.")


def evidence(settings: Settings, catalogue: Catalogue, autoencoder_path: Path) -> None:
    """Test whether clamped features bring in their concepts, better than other directions do."""
    from utils.influence import evidence as study
    from utils.influence.generations import load_model, open_log
    from utils.influence.texts import Texts

    # 1. Propose features by a rule, none by hand.
    log = open_log(settings.influence_dir, "evidence.jsonl")
    candidates = catalogue.propose(settings.n_tried)["feature"].tolist()
    model = load_model(catalogue, autoencoder_path)

    # 2. For those that steer on trial prompts, write texts by every method at every strength, and
    #    score them with the untouched model.
    texts = Texts(model, catalogue, settings, log)
    max_perplexity = settings.max_perplexity
    table, n_tried = study.collect(texts, candidates, settings.n_features, max_perplexity)

    # 3. Find each feature's useful strength on trial prompts, and judge it on the other prompts.
    best = study.at_useful_strength(table, max_perplexity)
    best.insert(1, "label", catalogue.features["label"][best["feature"]].to_numpy())
    scores = study.mean_scores(table, settings.seed)
    summary = study.summarise(best, n_tried, max_perplexity, settings.seed)

    # 4. Write tables and a picture, and print the result.
    write_csv(log.with_name("evidence_features.csv"), best)
    write_csv(log.with_name("evidence_curves.csv"), scores)
    write_json(log.with_name("evidence.json"), summary)
    study.plot_evidence(scores, max_perplexity, log.with_name("evidence.png"))
    print(study.show_evidence(summary, max_perplexity))


def attribute(settings: Settings, catalogue: Catalogue, autoencoder_path: Path) -> None:
    """Find the features that lead to the next token."""
    from utils.activations.store import ActivationStore, spread
    from utils.autoencoder.saved import read_trained
    from utils.influence import attribution
    from utils.steering.feature_model import FeatureModel
    from utils.steering.generation import prompt_tokens

    # 1. Load the model, in float32: effects of features are too small for bfloat16's precision.
    folder = make_folder(settings.influence_dir, "--influence-dir")
    store = trained = None
    if settings.n_prompts:
        store = ActivationStore(settings.activations_dir)
        trained = read_trained(settings.autoencoder_dir, store)
    model = FeatureModel.load(catalogue.summary, autoencoder_path, "float32")
    language_model = model.language_model

    # 2. Attribute the difference of two logits to active features, in one pass forward and back.
    tokens = prompt_tokens(language_model, settings.prompt, settings.chat_template)
    pair = attribution.token_pair(language_model, settings.pair)
    result = attribution.attribute(model, tokens, pair)
    features = attribution.by_feature(result)

    # 3. Ablate the features of the largest attribution.
    top = features.head(settings.n_ablated)
    labels = catalogue.features["label"]
    top = top.assign(
        ablation=attribution.ablate(model, result, top["feature"]),
        label=labels[top["feature"]].to_numpy(),
    )

    # 4. Print, draw and write the result.
    words = [language_model.tokenizer.decode([token]) for token in result.pair]
    words += catalogue.prompt_texts(language_model, tokens[0])
    print(attribution.show_attribution(words[:2], result.difference, top, settings.prompt))
    write_csv(folder / "attribution.csv", top)
    content = {"prompt": settings.prompt, "chat_template": settings.chat_template}
    content |= {"pair": words[:2], "difference": result.difference}
    write_json(folder / "attribution.json", content)
    attribution.plot_attribution(result, words, labels, folder / "attribution.png")

    # 5. Over held-out prompts: does attribution, or activation alone, predict the ablation?
    if settings.n_prompts:
        split = store.split(trained["held_out"], trained["most_held_out_tokens"])
        contexts = spread(split.held_out, settings.n_prompts)
        sample = settings.prompt_tokens, settings.features_per_prompt, settings.seed
        table = attribution.compare_with_ablation(model, store, contexts, *sample)
        write_csv(folder / "attribution_correlation.csv", table)
        print(attribution.show_correlations(attribution.correlations(table, settings.seed)))


def chat(settings: Settings, catalogue: Catalogue, autoencoder_path: Path) -> None:
    """Run a chat in the terminal, until the user leaves."""
    from utils.influence.chat import Chat
    from utils.influence.generations import load_model

    Chat(catalogue, load_model(catalogue, autoencoder_path), settings).run()


def playground(settings: Settings, catalogue: Catalogue, autoencoder_path: Path) -> None:
    """Serve the playground, until the user leaves."""
    from utils.influence.generations import load_model
    from utils.influence.playground import Playground, require_free_port, serve

    require_free_port(settings.port)
    serve(Playground(catalogue, load_model(catalogue, autoencoder_path)), settings)


def use_of(settings: Settings) -> str:
    """The use that the settings ask for: a study, the playground or the chat.

    Raises:
        InputError: They ask for two, or change a setting that the use does not have.
    """
    require(
        not (settings.playground and settings.chat),
        "One of PLAYGROUND and CHAT can be on at a time.",
    )
    use = "playground" if settings.playground else "chat" if settings.chat else settings.study
    for names, uses in ONLY_FOR.items():
        for name in names.upper().split():
            value = getattr(settings, name.lower())
            require(
                use in uses or value == globals()[name],
                f"{name} is for {', '.join(uses)}; this is {use}, and {name} is {value!r}. "
                "Leave it out.",
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
    require_unicode(settings, "prompt", "feature", "pair")
    require(bool(settings.prompt.strip()), "PROMPT must hold some text; it is empty.")
    require(
        settings.temperature == 0 or 0.01 <= settings.temperature < math.inf,
        f"TEMPERATURE must be 0 or a finite number from 0.01 on; it is {settings.temperature}.",
    )
    require(0 <= settings.seed < 2**63, f"SEED must be from 0 to 2^63 - 1; it is {settings.seed}.")
    check_strength(settings)
    check_saved_vector(settings)


def check_strength(settings: Settings) -> None:
    """Refuse an invalid change of features, and a strength that does not suit it."""
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


if __name__ == "__main__":
    run(main)
