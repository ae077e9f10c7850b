"""Evidence for steering: known answers, and the study on the tiny run."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from keras import ops

from utils.artifacts import append_record
from utils.characters import words_in
from utils.features.catalogue import Catalogue, share_of
from utils.influence import evidence, generations, texts
from utils.influence.texts import SCORES, Texts, Writer
from utils.settings import InputError
from utils.steering.feature_model import FeatureModel
from utils.steering.generation import prompt_tokens


def test_repetition_known_answers():
    assert texts.repetition([1, 2, 3, 4, 5]) == 0
    assert texts.repetition([7] * 6) == 0.75  # four sequences, one of them new
    assert texts.repetition([1, 2, 3, 1, 2, 3]) == 0.25
    assert texts.repetition([1, 2]) == 0


def test_share_of_words_known_answer():
    assert share_of({"ship"}, words_in("The ship, a SHIP of shipping.")) == pytest.approx(2 / 6)
    assert share_of({"ship"}, words_in("")) == 0


def made_table() -> pd.DataFrame:
    """Two features; the clamp holds to strength 1, random breaks at once, untouched is as it is."""
    rows = []
    for feature in (3, 8):
        for prompt in (*evidence.TRIAL_PROMPTS, *evidence.PROMPTS):
            base = {"feature": feature, "prompt": prompt, "words": 0.0, "repetition": 0.1}
            flat = {"strength": 0.0, "concept": 0.02, "perplexity": 5.0}
            rows += [{**base, **flat, "method": name} for name in evidence.METHODS[:2]]
            for strength in evidence.STRENGTHS:
                at = {**base, "strength": strength}
                perplexity = 10.0 if strength <= 1 else 20.0
                steered = {"concept": 0.3 * strength, "perplexity": perplexity}
                rows.append({**at, **steered, "method": "feature"})
                collapsed = {"concept": 0.1, "perplexity": 5.0, "repetition": 0.1 + strength}
                rows.append({**at, **collapsed, "method": "mean difference"})
                broken = {"concept": 0.01, "perplexity": 50.0}
                rows.append({**at, **broken, "method": "random"})
    return pd.DataFrame(rows)


def useful_strengths(table: pd.DataFrame) -> dict[str, float]:
    """By method, of feature 3."""
    worst = evidence.least_fluent(table)
    return {
        method: evidence.useful_strength(
            worst[(worst.method == method) & (worst.feature == 3)], 3.2
        )[0]
        for method in evidence.METHODS[2:]
    }


def test_the_useful_strength_is_the_last_before_fluency_breaks():
    table = made_table()
    assert useful_strengths(table) == {"feature": 1.0, "mean difference": 0.25, "random": 0.25}
    # After one prompt of several it is too much.
    broken = (table["method"] == "feature") & (table["prompt"] == evidence.TRIAL_PROMPTS[1])
    table.loc[broken & (table["strength"] > 0.5), "perplexity"] = 16.0
    assert useful_strengths(table)["feature"] == 0.5
    means = evidence.relative(made_table())
    ratios = means.set_index(["feature", "method", "strength"]).perplexity
    assert ratios[(3, "feature", 1.0)] == pytest.approx(2)
    assert ratios[(3, "feature", 2.0)] == pytest.approx(4)
    assert ratios[(3, "untouched", 0.0)] == pytest.approx(1)


def test_features_are_judged_on_the_prompts_not_tried():
    table = made_table()
    trial = table["prompt"].isin(evidence.TRIAL_PROMPTS)
    table.loc[trial & (table["method"] == "feature"), "concept"] = 9.0  # must count for nothing
    best = evidence.at_useful_strength(table, 3.2)
    rows = best[best["method"] == "feature"]
    assert rows["concept"].tolist() == pytest.approx([0.3, 0.3]) and (rows["strength"] == 1).all()
    same = best[best["method"] == "random at the feature's strength"]
    assert same["concept"].tolist() == pytest.approx([0.01, 0.01]) and (same["strength"] == 1).all()
    summary = evidence.summarise(best, 5, 3.2, seed=0)
    shares = [summary[f"share_{name}"] for name in ("raised", "fluent", "both")]
    assert (summary["n_tried"], summary["n_features"]) == (5, 2) and shares == [1, 1, 1]
    assert summary["perplexity"] == pytest.approx(2) and summary["median_strength"] == 1
    assert summary["concept"]["feature"] == pytest.approx([0.3, 0.3, 0.3])
    assert summary["p_feature_greater"]["random"] == pytest.approx(0.25)  # the least for two pairs
    broken = best.copy()  # one feature raised and not fluent, the other fluent and not raised
    first = (broken["method"] == "feature") & (broken["feature"] == broken["feature"].min())
    second = (broken["method"] == "feature") & ~first
    broken.loc[first, "perplexity"], broken.loc[second, "concept"] = 9.0, 0.0
    summary = evidence.summarise(broken, 5, 3.2, seed=0)
    shares = [summary[f"share_{name}"] for name in ("raised", "fluent", "both")]
    assert shares == [0.5, 0.5, 0]


def test_curves_are_means_over_features():
    table = made_table()
    table.loc[(table["method"] == "feature") & (table["feature"] == 8), "perplexity"] *= 4
    curve = evidence.mean_scores(table, seed=0).set_index(["method", "strength"])
    row = curve.loc[("feature", 1.0)]
    assert row.n == 2 and row.concept == pytest.approx(0.3)
    assert row.perplexity == pytest.approx(4)  # the geometric mean of 2 and 8
    assert row.perplexity_low == pytest.approx(2) and row.perplexity_high == pytest.approx(8)


@pytest.fixture(scope="module")
def loaded(tiny_run):
    catalogue = Catalogue(tiny_run.folder / "analysis")
    path = tiny_run.folder / "autoencoder" / "autoencoder.keras"
    return catalogue, FeatureModel.load(catalogue.summary, path)


def test_texts_are_scored_as_by_the_untouched_model_alone(loaded):
    catalogue, model = loaded
    language_model = model.language_model
    feature = int(catalogue.propose(1)["feature"].item())
    prompts = [prompt_tokens(language_model, words) for words in ("rose tulip", "ship")]
    written = [torch.tensor([40, 50, 60]), torch.tensor([70])]
    scores = texts.score_texts(model, prompts, written, feature)
    for prompt, text, perplexity, activation in zip(prompts, written, *scores, strict=True):
        tokens = torch.cat([prompt[0], text])[None]
        logp = language_model.model(tokens).logits[0].float().log_softmax(-1)
        n = prompt.shape[1]
        of_text = logp[torch.arange(n - 1, n - 1 + len(text)), text]
        assert perplexity == pytest.approx(float(torch.exp(-of_text.mean())), rel=1e-4)
        latents = model.autoencoder.encode(model.residual(tokens)[0].float())[n:, feature]
        norm = ops.norm(model.autoencoder.W_dec[feature])
        assert activation == pytest.approx(float((latents * norm).mean()), rel=1e-4, abs=1e-5)


def test_vectors_have_the_norm_of_the_clamp_and_one_direction(loaded):
    catalogue, model = loaded
    feature = int(catalogue.propose(1)["feature"].item())
    maximum = float(catalogue.features.loc[feature, "max_activation"])
    writer = Writer(model, catalogue, SimpleNamespace(seed=0))
    strengths = [0.5, 1.0, 2.0]
    expected = torch.tensor(strengths) * maximum / float(model.autoencoder.scale)
    expected = expected[:, None].expand(3, 4)
    for method in ("mean difference", "random"):
        change = writer.change_by_method(method, feature, strengths)
        added = change(torch.zeros(3, 4, model.d_model))
        torch.testing.assert_close(added.norm(dim=-1), expected)
        torch.testing.assert_close(added[0] * 4, added[2])
    # Where the feature is silent the clamp's change is as long: its row turned away makes it so.
    silent = ops.convert_to_tensor(model.autoencoder.center).detach() - 1e3 * model.directions(
        torch.tensor([feature])
    )
    silent = silent[0].expand(3, 4, -1)
    assert not model.encode(silent)[..., feature].any()
    clamp = writer.change_by_method("feature", feature, strengths)
    torch.testing.assert_close(clamp(silent).norm(dim=-1), expected)


class MadeTexts(Texts):
    """Features that bring in their concept as they are told to."""

    def __init__(self, concepts):
        self.concepts = concepts

    def table(self, feature, methods, prompts):
        table = made_table()
        table = table[(table["feature"] == 3) & table["method"].isin(methods)]
        table = table[table["prompt"].isin(prompts)].assign(feature=feature)
        concept = table["concept"].mask(table["method"] == "feature", self.concepts[feature])
        return table.assign(concept=concept)


def test_features_that_do_not_steer_on_trial_are_passed_over():
    made = MadeTexts({1: 0.02, 2: 0.5, 3: 0.0, 4: 0.3, 5: 0.9})  # untouched: 0.02
    table, n_tried = evidence.collect(made, [1, 2, 3, 4, 5], 2, 3.2)
    assert table["feature"].unique().tolist() == [2, 4] and n_tried == 4
    assert set(table["method"]) == set(evidence.METHODS)
    table, n_tried = evidence.collect(made, [3, 5], 2, 3.2)
    assert table["feature"].unique().tolist() == [5] and n_tried == 2
    with pytest.raises(InputError, match="none of 2 proposed does"):
        evidence.collect(made, [1, 3], 2, 3.2)


def test_texts_of_another_analysis_are_written_anew(monkeypatch, tmp_path):
    features = pd.DataFrame({"max_activation": [4.0], "peak_tokens": [["rose"]]})
    summary = {"model_name": "tiny", "layer": 1, "outlier_norm": 9.0}
    catalogue = SimpleNamespace(
        features=features, summary=summary | {"autoencoder_fingerprint": "1"}
    )
    settings = SimpleNamespace(max_new_tokens=3, temperature=0.0, seed=0)
    written = []

    def write(self, _feature, requests):
        written.append(len(requests))
        for request in requests:
            record = {"request": request, "text": "", **dict.fromkeys(SCORES, 1.0)}
            self._recorded[generations.key(request)] = record
            append_record(self.log, record)

    monkeypatch.setattr(Texts, "_write_missing", write)
    log = tmp_path / "log.jsonl"
    log.touch()

    def read():
        Texts(None, catalogue, settings, log).table(0, ("feature",), ("w1",))
        return len(written)

    assert (read(), read()) == (1, 1)
    features.loc[0, "max_activation"] = 8.0  # that strengths are multiples of
    assert (read(), read()) == (2, 2)
    summary["outlier_norm"] = 7.0
    catalogue.summary = summary | {"autoencoder_fingerprint": "1"}
    assert (read(), read()) == (3, 3)


def numbers_of(path) -> dict[str, float]:
    """All numbers of a JSON file, by where they are."""
    flat = pd.json_normalize(json.loads(path.read_text())).iloc[0].explode()
    return {f"{name} {place}": value for place, (name, value) in enumerate(flat.items())}


def test_the_study_goes_on_where_it_was(run_here, tiny_run, tmp_path):
    flags = [
        *tiny_run.flags.influence_folders, "--study", "evidence", "--n-features", 3,
        "--max-new-tokens", 8, "--influence-dir", tmp_path,
    ]  # fmt: skip
    printed = run_here("influence_llm", *flags).stdout
    assert "concept score above the untouched text's" in printed
    log = tmp_path / "evidence.jsonl"
    lines = log.read_text().splitlines()
    n_settings = 2 + 3 * len(evidence.STRENGTHS)
    n_prompts, n_trial = len(evidence.TRIAL_PROMPTS + evidence.PROMPTS), len(evidence.TRIAL_PROMPTS)
    n_passed_over = json.loads((tmp_path / "evidence.json").read_text())["n_tried"] - 3
    n_tried_in_vain = n_passed_over * (1 + len(evidence.STRENGTHS)) * n_trial
    assert len(lines) == 3 * n_settings * n_prompts + n_tried_in_vain
    untouched = {json.loads(line)["text"] for line in lines if '"untouched"' in line}
    assert len(untouched) <= n_prompts  # whatever the feature
    summary = numbers_of(tmp_path / "evidence.json")
    log.write_text("\n".join(lines[: len(lines) // 2 + 3]) + '\n{"torn')  # killed within a line
    run_here("influence_llm", *flags)
    again = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    key = generations.key
    assert {key(record["request"]) for record in again} == {
        key(json.loads(line)["request"]) for line in lines
    }
    # Texts missing from a batch are read in a smaller one, which rounds otherwise.
    assert numbers_of(tmp_path / "evidence.json") == pytest.approx(summary, rel=1e-5)
    assert (tmp_path / "evidence.png").stat().st_size > 10_000
    curve = pd.read_csv(tmp_path / "evidence_curves.csv")
    assert (curve.n == 3).all() and np.isfinite(curve.perplexity).all()


def test_a_strength_is_found_for_several_features(run_here, tiny_run, tmp_path):
    flags = ["--feature", "anchor", "rose", "--strength", "auto", "--max-new-tokens", 8]
    flags += ["--where", "generated", "--intervention", "add", "--influence-dir", tmp_path]
    printed = run_here("influence_llm", *tiny_run.flags.influence_llm, *flags).stdout
    record = json.loads((tmp_path / "generations.jsonl").read_text())
    request = record["request"]
    assert len(request["features"]) == 2 and request["strength"] in evidence.STRENGTHS
    assert f" {request['strength']:g} times the maximum" in printed
    assert f"{request['strength']:g} × their maximum" in printed.replace("\n", " ")


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--intervention", "push"], "INTERVENTION must be one of clamp, add, scale, ablate"),
        (["--where", "nowhere"], "WHERE must be everywhere or generated, or positions"),
        (["--strength", "nan"], "STRENGTH must be one finite number or several, or auto"),
        (["--study", "evidence", "--n-features", 0], "N_FEATURES must be greater than 0"),
        (["--study", "evidence", "--strength", 2], "STRENGTH is for steer; this is evidence"),
        (["--study", "attribute", "--feature", 3], "FEATURE is for steer; this is attribute"),
        (["--chat", "--playground"], "One of PLAYGROUND and CHAT"),
        (["--chat", "--save-vector", "v.gguf"], "SAVE_VECTOR is for steer; this is chat"),
        (["--intervention", "ablate", "--strength", 1], "does not matter to INTERVENTION ablate"),
        (["--strength", 0, "--save-vector", "v.gguf"], "SAVE_VECTOR needs one STRENGTH other"),
        (["--save-vector", "v.gguf", "--strength", 1, "--where", "generated"], "needs WHERE every"),
        (["--save-vector", "v.txt", "--strength", "auto"], "SAVE_VECTOR must end in"),
        (["--save-vector", "v.gguf", "--strength", 1e38], "STRENGTH must keep a saved vector"),
        (["--where", 0], "positions from 1 on, for BOS, at 0, is never changed"),
        (["--where", 100_000, "--strength", 1], "WHERE must have a position below"),
        (["--max-perplexity", 1.2], "MAX_PERPLEXITY must be greater than 1.5 times"),
        (["--temperature", 1e-40], "TEMPERATURE must be 0 or a finite number from 0.01 on"),
        (["--playground", "--port", 0], "PORT must be from 1 to 65535; it is 0"),
        (["--study", "attribute", "--n-prompts", 1], "N_PROMPTS must be 0, or 2 and more"),
        (["--study", "attribute", "--prompt-tokens", 1], "PROMPT_TOKENS must be at least 2"),
        (["--study", "attribute", "--pair", "rose", "rose"], "PAIR must be two different tokens"),
        (["--strength", "auto", "--where", 3], "STRENGTH auto needs"),
        (["--chat-template"], "CHAT_TEMPLATE need a model with a chat template"),
    ],
)
def test_what_cannot_be_is_refused(run_here, tiny_run, tmp_path, flags, rule):
    words = [*tiny_run.flags.influence_folders, "--influence-dir", tmp_path / "out", *flags]
    if not {"--study", "--chat", "--playground"} & set(flags):
        words += ["--feature", "rose"]
    done = run_here("influence_llm", *words, check=False)
    assert done.returncode == 1 and rule in done.message
    assert not any(path.stat().st_size for path in tmp_path.glob("out/*"))
