"""What an analysis finds: planted features, brute-force answers, fidelity, the catalogue."""

import shutil

import keras
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LAYER, write_activations

from utils.activations.store import ActivationStore
from utils.artifacts import write_json
from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.fidelity import Fidelity, loss_recovered
from utils.autoencoder.kinds import L1Autoencoder
from utils.autoencoder.saved import load_autoencoder, save_autoencoder
from utils.features import catalogue, feature_pass, geometry, pass_backup
from utils.features.best import BestPerGroup
from utils.features.examples import (
    AROUND,
    N_BUCKETS,
    N_PER_BUCKET,
    N_TOP,
    WINDOW,
    text_around,
)
from utils.features.feature_pass import N_BINS, FeaturePass, Histograms, SubsetSums, by_feature
from utils.features.geometry import map_directions
from utils.features.labels import make_label
from utils.features.pass_backup import PassBackup
from utils.features.studies.cross_entropy import measure_losses
from utils.features.studies.places import promoted_tokens
from utils.language_model import load_language_model, token_texts
from utils.settings import InputError, TimeIsUp, TimeLimit
from utils.steering.feature_model import FeatureEncoder, FeatureModel

CONTEXT, N_CONTEXTS, N_FEATURES = 64, 60, 6
NORM = 2.0  # of the decoder rows: what is reported is twice the latent
WORDS = " rose  tulip  spade  ship  anchor  rope".split("  ")
PIECES = [f" {word.strip()}" for word in WORDS]


# --------------------------------------------------------------------------------- planted features
#
# Feature i, 0 to 3, is active on token i alone, feature 0 in subset "a" only; feature 4 on every
# token; feature 5 never. The encoder is the identity, so that activations are latents.


@pytest.fixture(scope="module")
def planted() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shape = (N_CONTEXTS, CONTEXT)
    tokens = draw.integers(0, 6, shape, np.int32)
    subsets = np.repeat(draw.integers(0, 2, (N_CONTEXTS, 1), np.int16), CONTEXT, axis=1)
    kept = draw.random(shape) < 0.9
    kept[:, 0] = False
    # Values that float16 holds exactly, and no two of a feature's alike but by rare chance.
    values = (1 + draw.integers(0, 2_000, (*shape, N_FEATURES)) / 1_024).astype(np.float16)
    active = tokens[..., None] == np.arange(N_FEATURES)
    active[..., 0] &= subsets == 0
    active[..., 4], active[..., 5] = True, False
    return {
        "activations": np.where(active, values, np.float16(-1)),
        "tokens": tokens,
        "kept": kept,
        "documents": np.repeat(np.arange(N_CONTEXTS, dtype=np.int32)[:, None], CONTEXT, axis=1),
        "subsets": subsets,
    }


@pytest.fixture(scope="module")
def store(planted, tmp_path_factory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("planted")
    write_activations(folder, planted, per_shard=7)
    return ActivationStore(folder)


@pytest.fixture(scope="module")
def found(store) -> FeaturePass:
    autoencoder = L1Autoencoder(d_model=N_FEATURES, n_latents=N_FEATURES)
    autoencoder.W_enc.assign(np.eye(N_FEATURES))
    autoencoder.W_dec.assign(NORM * np.eye(N_FEATURES))
    found = FeaturePass(FeatureEncoder(autoencoder), store, seed=0)
    found.run(range(N_CONTEXTS), batch_size=5 * CONTEXT)
    return found


@pytest.fixture(scope="module")
def reported(planted) -> np.ndarray:
    """The activation of every feature at every position, zero where it is not kept."""
    return np.where(
        planted["kept"][..., None], NORM * np.maximum(planted["activations"], 0), 0
    ).astype(np.float32)


def test_statistics_are_exact(found, planted, reported):
    statistics = found.statistics()
    active = reported > 0
    n_kept = planted["kept"].sum()
    uses = active.sum(axis=(0, 1))
    assert uses[4] == n_kept and uses[5] == 0
    np.testing.assert_allclose(statistics["frequency"], uses / n_kept)
    np.testing.assert_allclose(statistics["max_activation"], reported.max(axis=(0, 1)))
    means = reported.sum(axis=(0, 1), dtype=np.float64) / np.maximum(uses, 1)
    np.testing.assert_allclose(statistics["mean_activation"], means, rtol=1e-6)
    assert statistics["dead"].tolist() == [False] * 5 + [True]
    of_b = (planted["subsets"] == 1)[..., None] * reported
    share_of_b = of_b.sum(axis=(0, 1)) / np.maximum(reported.sum(axis=(0, 1)), 1)
    assert statistics["top_subset"][0] == "a" and statistics["top_subset_share"][0] == 1
    for feature in range(1, 5):
        share = max(share_of_b[feature], 1 - share_of_b[feature])
        assert statistics["top_subset"][feature] == "ab"[int(share_of_b[feature] > 0.5)]
        assert statistics["top_subset_share"][feature] == pytest.approx(share, rel=1e-5)
    assert found.fidelity.n_rows == n_kept
    assert found.fidelity.l0 == pytest.approx(uses.sum() / n_kept)


def test_histograms_count_every_active_token(found, reported):
    statistics = found.statistics()
    for feature in range(N_FEATURES):
        active = reported[..., feature][reported[..., feature] > 0]
        span = statistics["histogram_range"][feature]
        expected, _ = np.histogram(active, N_BINS, (0, span))
        assert np.array_equal(statistics["histogram"][feature], expected)
        assert not len(active) or span / 2 < active.max() <= span


def test_sums_of_many_subsets_are_those_of_few(monkeypatch):
    draw = np.random.default_rng(0)
    sums = [SubsetSums(50, 7)]
    monkeypatch.setattr(feature_pass, "DENSE_SUMS", 0)
    sums.append(SubsetSums(50, 7))
    total = np.zeros((50, 7))
    for n in (300, 0, 500):
        feature, subset = draw.integers(0, 49, n), draw.integers(0, 7, n)
        activation = draw.random(n).astype(np.float32)
        np.add.at(total, (feature, subset), activation.astype(float))
        for one in sums:
            one.add(*map(torch.from_numpy, (feature, subset, activation)))
        sums[1]._merge()
    share = total.max(axis=1) / np.maximum(total.sum(axis=1), 1e-9)
    for one in sums:
        assert one.leading()[0].tolist() == total.argmax(axis=1).tolist()
        np.testing.assert_allclose(one.leading()[1], share, rtol=1e-12)


def test_active_features_are_sorted_by_counting():
    draw = np.random.default_rng(0)
    row = torch.from_numpy(np.sort(draw.integers(0, 50, 4_000)))
    feature = torch.from_numpy(draw.integers(0, 90, 4_000).astype(np.int32))
    activation = torch.from_numpy(draw.random(4_000, np.float32))
    order = feature.sort(stable=True).indices
    for n in (4_000, 0):
        values = row[:n], feature[:n], activation[:n]
        for found, before in zip(by_feature(*values, 100), values, strict=True):
            assert found.tolist() == (before[order].tolist() if n else [])


def test_histograms_widen_as_larger_values_come():
    draw = np.random.default_rng(0)
    histograms, seen = Histograms(3), [[], [], []]
    for scale in (1e-6, 0.3, 0.1, 40):  # the first below the smallest range
        group = draw.integers(0, 2, 5_000)
        values = (scale * (1 - draw.random(5_000))).astype(np.float32)
        histograms.add(torch.from_numpy(group), torch.from_numpy(values))
        for i in range(2):
            seen[i] += values[group == i].tolist()
    assert histograms.ranges.tolist() == [64, 64, 2**-16]
    for i, values in enumerate(seen):
        expected, _ = np.histogram(values, N_BINS, (0, histograms.ranges[i].item()))
        assert histograms.counts[i].tolist() == expected.tolist()
    histograms.add(torch.tensor([2]), torch.tensor([8.0]))  # a power of two is in the last bin
    assert histograms.ranges[2] == 8 and histograms.counts[2].tolist() == [0] * 31 + [1]


def test_top_examples_are_the_highest_peaks_of_contexts(found, reported):
    examples = pd.DataFrame({k: list(v) for k, v in found.examples().items()})
    for feature in range(N_FEATURES):
        top = examples[(examples["feature"] == feature) & (examples["bucket"] == 0)]
        peaks = reported[..., feature].max(axis=1)
        order = np.argsort(-peaks, kind="stable")
        expected = [context for context in order if peaks[context] > 0][:N_TOP]
        assert top["rank"].tolist() == list(range(len(expected)))
        np.testing.assert_array_equal(top["activation"], peaks[expected])
        # Peaks of one height may come in any order.
        assert sorted(peaks[top["context"]]) == sorted(peaks[expected])
        for example in top.itertuples():
            assert reported[example.context, example.position, feature] == example.activation


def test_examples_are_of_the_contexts_that_were_chosen(found, store, reported):
    chosen = store.sample(17 * CONTEXT)
    assert len(set(np.diff(chosen))) > 1 and chosen[-1] > 0.9 * N_CONTEXTS
    sampled = FeaturePass(found.encoder, store, seed=0)
    sampled.run(chosen, batch_size=5 * CONTEXT)
    examples = sampled.examples()
    assert set(examples["context"]) <= set(chosen) and len(set(examples["context"])) > 10
    places = examples["context"], examples["position"], examples["feature"]
    np.testing.assert_array_equal(reported[places], examples["activation"])


def test_random_examples_lie_in_their_buckets(found, reported):
    examples = pd.DataFrame({k: list(v) for k, v in found.examples().items()})
    below_top = examples[examples["bucket"] > 0]
    assert set(below_top["feature"]) == {0, 1, 2, 3, 4}
    assert below_top.groupby(["feature", "bucket"]).size().max() == N_PER_BUCKET
    for example in below_top.itertuples():
        peaks = reported[example.context, :, example.feature]
        assert peaks.max() == example.activation == peaks[example.position]
        share = example.activation / reported[..., example.feature].max()
        bucket = example.bucket
        assert (N_BUCKETS - bucket) / N_BUCKETS <= share + 1e-6
        assert share <= (N_BUCKETS + 1 - bucket) / N_BUCKETS + 1e-6


def test_windows_are_the_activations_around_the_peak(found, planted, reported):
    table = catalogue.example_table(found.examples(), found.store).to_pandas()
    assert len(table) > 5 * N_TOP
    for example in table.itertuples():
        position = np.flatnonzero(
            reported[example.context, :, example.feature] == np.float32(example.activation)
        )[0]
        start = position - example.peak
        assert start == min(max(position - 32, 0), CONTEXT - WINDOW)
        window = slice(start, start + WINDOW)
        assert np.array_equal(example.tokens, planted["tokens"][example.context, window])
        expected = reported[example.context, window, example.feature].astype(np.float16)
        assert np.array_equal(example.activations, expected)
        assert example.document == example.context
        assert example.subset == "ab"[planted["subsets"][example.context, 0]]


def test_a_pass_depends_on_its_seed_alone(found, store):
    again = FeaturePass(found.encoder, store, seed=0)
    again.run(range(N_CONTEXTS), batch_size=5 * CONTEXT)
    first, second = found.examples(), again.examples()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dense_sums", [2**27, 0])
def test_a_pass_that_was_cut_goes_on_to_the_same_results(
    found, store, tmp_path, monkeypatch, dense_sums
):
    monkeypatch.setattr(feature_pass, "DENSE_SUMS", dense_sums)
    monkeypatch.setattr(pass_backup, "SAVE_EVERY", 0.0)
    path = tmp_path / "pass-backup.npz"
    done = []
    for _ in range(50):
        again = FeaturePass(found.encoder, store, seed=0)
        try:
            backup = PassBackup(path, TimeLimit(1e-9))
            assert backup.limit.allows_another()  # asked before the pass begins
            again.run(range(N_CONTEXTS), 5 * CONTEXT, backup)
            break
        except TimeIsUp as stopped:
            done.append(str(stopped))
    assert done == [
        f"the pass has gone through {n} contexts." for n in [*range(5, N_CONTEXTS, 5), N_CONTEXTS]
    ]
    for name, values in found.statistics().items():
        if name == "top_subset_share" and not dense_sums:
            np.testing.assert_allclose(again.statistics()[name], values, rtol=1e-12)
        else:
            np.testing.assert_array_equal(again.statistics()[name], values, err_msg=name)
    for name, values in found.examples().items():
        np.testing.assert_array_equal(again.examples()[name], values, err_msg=name)
    assert again.subset_shares() == found.subset_shares()
    assert again.l0_counts.tolist() == found.l0_counts.tolist()
    for name in ("n_rows", "fvu", "cosine", "l0"):
        assert getattr(again.fidelity, name) == getattr(found.fidelity, name)


def test_a_backup_of_other_contexts_is_not_taken(found, store, tmp_path, monkeypatch):
    monkeypatch.setattr(pass_backup, "SAVE_EVERY", 0.0)
    for contexts in (range(N_CONTEXTS), range(5, N_CONTEXTS)):
        again = FeaturePass(found.encoder, store, seed=0)
        again.run(contexts, 5 * CONTEXT, PassBackup(tmp_path / "pass-backup.npz", TimeLimit(None)))
    assert again.subset_tokens.sum() == (N_CONTEXTS - 5) * CONTEXT


def test_a_damaged_backup_is_named(found, store, tmp_path):
    path = tmp_path / "pass-backup.npz"
    path.write_bytes(b"PK")
    with pytest.raises(InputError, match=r"pass-backup\.npz is damaged .* begins anew"):
        FeaturePass(found.encoder, store, seed=0).run(
            range(N_CONTEXTS), 5 * CONTEXT, PassBackup(path, TimeLimit(None))
        )


def test_best_per_group_against_brute_force():
    draw = np.random.default_rng(0)
    best = BestPerGroup(n_groups=50, size=3)
    offered = []
    for n in (1_000, 0, 120_000, 7, 5_000):  # the third is more than is held unsorted
        group, priority = draw.integers(0, 45, n), draw.random(n).astype(np.float32)
        wanted = best.wants(torch.from_numpy(group), torch.from_numpy(priority)).numpy()
        entries = {"group": group, "priority": priority, "own": draw.integers(0, 10**9, n)}
        offered.append(pd.DataFrame(entries))
        best.add({name: values[wanted] for name, values in entries.items()})
    assert len(wanted) < n  # what cannot be among the best any more is not wanted
    everything = pd.concat(offered).sort_values(["group", "priority"], ascending=[True, False])
    expected = everything.groupby("group").head(3)
    kept = best.best()
    for name in ("group", "priority", "own"):
        assert np.array_equal(kept[name], expected[name]), name
    assert kept["rank"].tolist() == [0, 1, 2] * 45


def test_of_entries_with_one_text_the_best_is_kept():
    best = BestPerGroup(n_groups=2, size=2)
    for priority in ([1.0, 5.0, 3.0, 2.0], [4.0, 0.5, 6.0, 1.0]):
        text = np.array([7, 7, 8, 9], np.uint64)
        priority = np.float32(priority)
        entries = {"group": np.array([0, 0, 0, 1]), "priority": priority, "text": text}
        best.add(entries)
        kept = best.best()
    assert kept["group"].tolist() == [0, 0, 1] and kept["rank"].tolist() == [0, 1, 0]
    assert kept["text"].tolist() == [8, 7, 9] and kept["priority"].tolist() == [6, 5, 2]


def test_the_text_around_a_position():
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 50_000, (2, 100), np.int32)
    tokens[1, 40 : 40 + 2 * AROUND + 1] = tokens[0, 20 : 20 + 2 * AROUND + 1]
    found = text_around(tokens)
    assert len(np.unique(found)) == 199 and found[1, 40 + AROUND] == found[0, 20 + AROUND]


# --------------------------------------------------------------------------------------- fidelity


def test_fidelity_known_answer():
    rows = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0]], np.float32)
    reconstruction = rows + np.array([[0, 0], [0, 0], [1, 0], [0, 1]], np.float32)
    fidelity = Fidelity(2)
    for part in (slice(0, 3), slice(3, 4)):  # sums over batches
        fidelity.add(rows[part], reconstruction[part], np.array([0, 1, 2, 3])[part])
    assert fidelity.fvu == pytest.approx(2 / 32)
    assert fidelity.l0 == 1.5
    cosines = [0, 1, 4 / np.sqrt(17), 36 / np.sqrt(32 * 41)]
    assert fidelity.cosine == pytest.approx(np.mean(cosines))


def test_fidelity_loses_nothing_over_many_batches():
    """Float32 alone would stop to grow: 2^24 + 1 is 2^24."""
    fidelity = Fidelity(2)
    rows = np.float32([[4096, 0], [-4096, 0]])
    fidelity.add(rows, rows, np.array([1, 0]))
    small = np.float32([[0.5, 0], [-0.5, 0]])
    for _ in range(1_000):
        fidelity.add(small, 0.5 * small, np.array([1, 1]))
    assert fidelity.fvu == pytest.approx(1_000 * 0.125 / (2 * 4096**2 + 1_000 * 0.5), rel=1e-9)
    assert fidelity.l0 == pytest.approx(2_001 / 2_002, rel=1e-12)


class Identity(SparseAutoencoder):
    """Reconstructs ``share`` of its input."""

    share = 1.0

    def encode(self, activations):
        return activations

    def decode(self, latents, activations=None):
        return self.share * latents


class Nothing(Identity):
    share = 0.0


def test_losses_of_identity_and_nothing(tiny_run, tiny_model):
    store = ActivationStore(tiny_run.folder / "activations")
    language_model = load_language_model(str(tiny_model), LAYER, "float32")

    def in_place(autoencoder):
        return FeatureModel(language_model, LAYER, autoencoder, store.outlier_norm)

    measured = {
        cls: measure_losses(in_place(cls(d_model=32, n_latents=32)), store, range(100, 200), 640)
        for cls in (Identity, Nothing)
    }
    subsets = measured[Nothing].loc[["Garden", "Harbour"]]
    identity, nothing = (measured[cls].loc["all"] for cls in (Identity, Nothing))
    assert identity["kl"] == pytest.approx(0, abs=1e-5) and nothing["kl"] > 0.01
    assert identity["fvu"] == pytest.approx(0, abs=1e-6) and nothing["fvu"] >= 1
    assert subsets["n_tokens"].sum() == nothing["n_tokens"]
    weighted = np.average(subsets[["untouched", "zero_ablated", "kl"]], 0, subsets["n_tokens"])
    assert weighted == pytest.approx(nothing[["untouched", "zero_ablated", "kl"]].to_numpy(float))
    assert loss_recovered(identity) == pytest.approx(1, abs=1e-4)
    assert identity["reconstruction"] == pytest.approx(identity["untouched"], abs=1e-5)
    assert loss_recovered(nothing) == 0
    assert nothing["reconstruction"] == nothing["zero_ablated"] != nothing["untouched"]

    tokens = torch.from_numpy(store.read("tokens", range(100, 200, 5))).long()
    with torch.no_grad():
        likelihoods = language_model.model(tokens).logits[:, :-1].log_softmax(dim=-1)
    losses = -likelihoods.gather(-1, tokens[:, 1:, None])[..., 0]
    losses = losses[tokens[:, 1:] != language_model.bos]
    assert identity["n_tokens"] == len(losses)
    assert identity["untouched"] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_loss_recovered_known_answer():
    losses = {"untouched": 2.0, "reconstruction": 2.5, "zero_ablated": 4.0}
    assert loss_recovered(losses) == 0.75


# -------------------------------------------------------------------------------------- catalogue


@pytest.fixture(scope="module")
def saved(found, store, tmp_path_factory) -> catalogue.Catalogue:
    folder = tmp_path_factory.mktemp("catalogue")
    examples = catalogue.example_table(found.examples(), store)
    promoted = pd.DataFrame(
        {
            "promoted_tokens": [[" sail"]] * 5 + [[" rose"]],
            "suppressed_tokens": [[" x"]] * 6,
        }
    )
    peaks = catalogue.PeakTokens(PIECES)
    catalogue.save_tables(folder, peaks.counted([examples]), PIECES)
    features = catalogue.feature_table(found.statistics(), peaks).join(promoted)
    catalogue.save_features(folder / "features.parquet", features)
    write_json(folder / "summary.json", {"n_latents": N_FEATURES})
    return catalogue.Catalogue(folder)


def test_search_finds_the_planted_word(saved):
    for feature in range(4):
        found = saved.search(PIECES[feature].strip().upper(), 3)
        assert found["feature"].iloc[0] == feature
    assert 4 not in saved.search("rose", 1)["feature"].tolist()
    assert saved.search("zebra", 3).empty
    assert saved.search("sail", 9)["feature"].tolist() == [0, 1, 2, 3, 4]  # promoted; 5 is dead
    # Beside a feature that peaks at a word, one that promotes another among ten is none.
    other = catalogue.Catalogue(saved.folder)
    other.features["promoted_tokens"] = [[" sail", *"abcdefghi"]] * len(other.features)
    assert other.search("sail rose", 9)["feature"].tolist() == [PIECES.index(" rose")]


def test_labels_and_examples_of_a_catalogue(saved):
    assert saved.features["label"].tolist()[:4] == ["rose", "tulip", "spade", "ship"]
    assert saved.features.loc[5, "label"] == "" and saved.features.loc[5, "dead"]
    examples = saved.examples_of([2])
    assert set(examples["feature"]) == {2} and len(examples) > N_TOP
    for example in examples.itertuples():
        assert example.token_texts[example.peak] == " spade"


def test_proposals_are_neither_rare_nor_everywhere(saved, monkeypatch):
    # Every planted feature is active on a tenth of the tokens; without a better one, any alive.
    assert sorted(saved.propose(9)["feature"]) == [0, 1, 2, 3, 4]
    features = saved.features.copy()
    monkeypatch.setattr(saved, "features", features)
    features["frequency"] = [0.0001, 0.01, 0.5, 0.01, 0.5, 0.0]
    assert sorted(saved.propose(5)["feature"]) == [1, 3]
    features.loc[3, "max_activation"] *= 2
    assert saved.propose(1)["feature"].tolist() == [3]
    # Where it is known what a feature writes, that counts, and not what it seems to promote.
    features["output_score"] = [0.9, 0.2, 0.9, 0.1, 0.9, np.nan]
    assert saved.propose(2)["feature"].tolist() == [1, 3]
    features["dead"], features["frequency"] = True, 0.0
    assert saved.propose(5).empty and saved.search("rose", 5).empty


def test_promoted_tokens_are_those_a_direction_speaks_for(tiny_model):
    language_model = load_language_model(str(tiny_model), LAYER, "float32")
    texts = token_texts(language_model.tokenizer)
    assert len(texts) == len(language_model.tokenizer)
    directions = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    unembedding = language_model.model.get_output_embeddings().weight.float().numpy()
    tokens = [texts.index(" anchor"), texts.index(" rain")]
    directions[0], directions[1] = 3 * unembedding[tokens[0]], -3 * unembedding[tokens[1]]
    promoted = promoted_tokens(language_model, directions, texts, batch=10)
    assert len(promoted) == 64
    assert promoted["promoted_tokens"][0][0] == " anchor"
    assert promoted["suppressed_tokens"][1][0] == " rain"


def test_the_map_leaves_out_dead_features():
    directions = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    alive = np.arange(40) % 4 > 0
    places = map_directions(directions, alive, seed=0)
    assert np.isfinite(places[alive]).all() and np.isnan(places[~alive]).all()
    assert np.ptp(places[alive], axis=0).min() > 0.1
    for few, wanted in ((np.arange(40) < 3, True), (alive, False)):  # too few to have neighbours
        assert np.isnan(map_directions(directions, few, 0, wanted)).all()


def test_the_map_of_many_features_is_of_a_sample(monkeypatch, capsys):
    monkeypatch.setattr(geometry, "MOST_MAPPED", 20)
    directions = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    alive = np.arange(40) > 3
    mapped = np.isfinite(map_directions(directions, alive, seed=0)[:, 0])
    assert mapped.sum() == 20 and not mapped[~alive].any() and mapped[20:].any()
    assert "Mapping 20 features of 36, drawn at random, with UMAP." in capsys.readouterr().out


def test_an_autoencoder_that_is_silent(tiny_run, run_here, tmp_path):
    """All latents dead: nothing to show, but no fault either."""
    shutil.copytree(tiny_run.folder / "autoencoder", tmp_path / "autoencoder")
    path = tmp_path / "autoencoder" / "autoencoder.keras"
    silent = load_autoencoder(path)
    silent.b_enc.assign(keras.ops.full((128,), -1e6))
    save_autoencoder(silent, path)
    printed = run_here(
        "analyze_features", *tiny_run.flags.analyze_features,
        "--autoencoder-dir", tmp_path / "autoencoder", "--analysis-dir", tmp_path / "analysis",
    ).stdout  # fmt: skip
    assert "0 of 128 features alive" in printed
    for study in ("Specificity", "Neurons", "Explanations", "Outputs", "Directions"):
        assert f"{study}: there is nothing to study" in printed


def test_a_label_names_each_word_once():
    assert make_label([" king", "King", " Queen", "\n\n", " ", "x"]) == "king, Queen, ↵"
