"""An analysis of text outside ASCII: characters split between tokens are whole in all it shows."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
from conftest import write_activations
from tiny_llama import save_tiny_llama
from transformers import AutoTokenizer

from utils.activations.store import ActivationStore
from utils.artifacts import write_json
from utils.autoencoder.kinds import L1Autoencoder
from utils.features import catalogue
from utils.features.browser import _escaped, _runs
from utils.features.examples import draw_examples
from utils.features.feature_pass import FeaturePass
from utils.features.labels import explain
from utils.features.questions import marked_tokens, show
from utils.features.search import show_feature
from utils.features.studies.completeness import find_occurrences
from utils.features.studies.explanations import draw_texts
from utils.features.studies.outputs import tokens_of
from utils.features.studies.specificity import measure_specificity
from utils.features.studies.splitting import label_features
from utils.language_model import token_texts
from utils.steering.feature_model import FeatureEncoder
from utils.steering.generation import prompt_tokens

N_CONTEXTS, CONTEXT = 40, 64
WORDS = ("中", "हिन्दी", "👍", "あ")
FILLING = ("国", "भारत", "❤", "かな")


@pytest.fixture(scope="module")
def analysed(tmp_path_factory) -> SimpleNamespace:
    """Feature i is active on the first token of word i, of two to six bytes, strongest; 4 never."""
    folder = tmp_path_factory.mktemp("scripts")
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_llama(folder / "model", ["rose tulip"]))
    draw, shape = np.random.default_rng(0), (N_CONTEXTS, CONTEXT)
    tokens, values = np.zeros(shape, np.int32), np.full((*shape, 5), -1, np.float16)
    for row in range(N_CONTEXTS):
        place = 1
        while place < CONTEXT:
            kind = int(draw.integers(4))
            word = (WORDS if draw.random() < 0.5 else FILLING)[kind]
            ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
            end = min(CONTEXT, place + len(ids))
            tokens[row, place:end] = ids[: end - place]
            if word in WORDS and place + 1 < CONTEXT:
                values[row, place + 1, kind] = draw.uniform(1, 2)
            place = end
    kept = tokens != tokenizer.bos_token_id
    subsets, documents = np.zeros(shape, np.int16), np.zeros(shape, np.int32)
    arrays = {"activations": values, "tokens": tokens, "kept": kept, "documents": documents}
    (folder / "activations").mkdir()
    write_activations(folder / "activations", arrays | {"subsets": subsets})
    store = ActivationStore(folder / "activations")
    autoencoder = L1Autoencoder(d_model=5, n_latents=5)
    autoencoder.W_enc.assign(np.eye(5))
    autoencoder.W_dec.assign(np.eye(5))
    encoder, texts = FeatureEncoder(autoencoder), token_texts(tokenizer)
    done = FeaturePass(encoder, store, seed=0)
    done.run(range(N_CONTEXTS), batch_size=5 * CONTEXT)
    examples = catalogue.example_table(done.examples(), store)
    peaks = catalogue.PeakTokens(texts)
    catalogue.save_tables(folder, peaks.counted([examples]), texts)
    features = catalogue.feature_table(done.statistics(), peaks)
    features["promoted_tokens"] = [["x"]] * 5
    catalogue.save_features(folder / "features.parquet", features)
    write_json(folder / "summary.json", {"n_latents": 5})
    saved = catalogue.Catalogue(folder)
    return SimpleNamespace(
        tokenizer=tokenizer,
        store=store,
        encoder=encoder,
        texts=texts,
        examples=examples,
        saved=saved,
    )


def test_peaks_labels_and_examples_are_whole(analysed):
    saved = analysed.saved
    # Of हिन्दी the feature is active on the first of its letters, of a mark and letters to come.
    assert saved.features["label"].tolist() == ["中", "ह", "👍", "あ", ""]
    for example in saved.examples_of([0, 1, 2, 3]).itertuples():
        assert "\ufffd" not in "".join(example.token_texts)
        assert example.token_texts[example.peak].strip() == "中ह👍あ"[example.feature]
        shown = show(example.token_texts, marked_tokens(example.activations))
        assert shown.count("\ufdd0") == shown.count("\ufdd1") >= 1 and "\ufdd0\ufdd1" not in shown
        runs = runs_of(example.token_texts, example.activations, example.peak)
        assert all(run and (isinstance(run, str) or run[0]) for run in runs)
    printed = show_feature(saved, 0, 80)
    assert "«中»" in printed and "\ufffd" not in printed


def runs_of(texts: list[str], activations: np.ndarray, peak: int) -> list:
    """The runs of an example in the browser."""
    pieces = pyarrow.array(map(_escaped, texts))
    (runs,) = _runs(pieces, np.arange(len(texts))[None], np.array([activations]), np.array([peak]))
    return json.loads(f"[{runs}]")


def test_text_before_a_split_character_is_shown_once():
    texts, activations = ["The ", "sign ", "", "好", " is"], [0, 0, 0.5, 1, 0]
    assert runs_of(texts, activations, 3) == ["The sign ", ["好", 1, 1], " is"]


def test_runs_at_the_ends_of_an_example():
    assert runs_of(["a", "b", "c"], [1, 0.1234, 2], 2) == [["a", 1], ["b", 0.123], ["c", 2, 1]]
    assert runs_of([',"', "b", "", ""], [0, 1, 0, 0], 1) == [',"', ["b", 1, 1]]
    assert runs_of(["a", "b", ',"'], [0, 0, 0], 1) == ["a", ["b", 0, 1], ',"']


def test_searching_finds_the_feature_and_no_other(analysed):
    for feature, word in enumerate(("中", None, None, "あ")):
        if word:
            assert analysed.saved.search(word, 5)["feature"].tolist() == [feature]
    assert analysed.saved.search("国", 5).empty
    features = analysed.saved.features.assign(label=["हिन्दी", "हिन्दू", "中国", "x", "x"])
    shares = catalogue.share_in({"हिन्दी"}, features["label"])
    assert shares.tolist() == [1, 0, 0, 0, 0]
    assert catalogue.share_in({"国"}, features["label"]).tolist() == [0, 0, 1, 0, 0]
    assert catalogue.share_in({"हिन"}, features["label"]).sum() == 0  # a part of the letters alone
    assert catalogue.is_of("中国", {"中", "国"}) and not catalogue.is_of(".com", {"com"})


def test_explanations_are_of_whole_words(analysed):
    shares = {"a": 1.0, "b": 0.0}
    explained = explain(analysed.examples.to_pandas(), analysed.texts, shares)
    words = [explained[feature].concept.words for feature in range(4)]
    assert "中" in words[0] and "हिन्दी" in words[1] and "👍" in words[2] and "あ" in words[3]
    drawn = draw_examples(analysed.examples, analysed.texts, 4, seed=0)
    scores = measure_specificity(drawn, shares, seed=0)
    assert (scores.groupby("feature")["score"].mean() > 2.5).all()
    texts = draw_texts(analysed.encoder, analysed.store, range(N_CONTEXTS), analysed.texts, 0)
    assert not any("\ufffd" in "".join(pieces) for pieces in texts.table["token_texts"])


def test_words_are_found_in_every_script(analysed):
    found = find_occurrences(analysed.store, range(N_CONTEXTS), analysed.texts, seed=0)
    assert {"中", "国", "あ", "हिन्दी", "भारत"} <= set(found.words)
    at = np.where(found.at < 0, -1, found.word_of[found.at])
    active = analysed.store.read("activations", range(N_CONTEXTS))[..., 0] > 0
    hit = at[active] == found.words.tolist().index("中")
    assert hit.mean() > 0.9  # not of those that the end of a context cuts


def test_labels_of_other_dictionaries_are_whole(analysed):
    table = label_features(
        analysed.encoder, analysed.store, range(N_CONTEXTS), analysed.texts, 5 * CONTEXT
    )
    assert table["label"].tolist() == ["中", "ह", "👍", "あ", ""]


def test_the_tokens_of_a_split_character_are_those_that_begin_it():
    parts = "中".encode().decode("ascii", "surrogateescape")
    numbers = {" a": [3, 4], parts[0]: [7], parts[:2]: [8], " ": [9], "中": [1]}
    assert tokens_of(" a", numbers) == [3, 4] and tokens_of("中", numbers) == [1]
    del numbers["中"]
    assert tokens_of("中", numbers) == [8] and tokens_of("x", numbers) == []


def test_a_prompt_is_shown_whole_with_the_name_of_bos(analysed):
    model = SimpleNamespace(tokenizer=analysed.tokenizer, bos=analysed.tokenizer.bos_token_id)
    tokens = prompt_tokens(SimpleNamespace(**vars(model), device="cpu"), " 中<bos>")[0]
    texts = analysed.saved.prompt_texts(model, tokens)
    assert texts[0] == "<bos>" and "".join(texts) == "<bos> 中<bos>" and "中" in texts
