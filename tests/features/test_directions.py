"""Special directions: a feature the model computes with costs more than one it ignores."""

import numpy as np
import pytest
import torch
from conftest import write_activations
from tiny_llama import D_MODEL, WORDS, tiny_language_model

from utils.activations.store import ActivationStore
from utils.autoencoder.kinds import L1Autoencoder
from utils.features.studies.directions import draw_directions, measure_directions, summarise
from utils.language_model import residual_at
from utils.steering.feature_model import FeatureModel

LAYER, CONTEXT, N_CONTEXTS = 3, 24, 12
IGNORED = 8  # dimensions that the unembedding does not read


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model whose unembedding was fitted to its text, but reads nothing of the first dimensions.

    Features 0 to 5 are what tells six tokens apart; feature 6 is the first dimension.
    """
    model = tiny_language_model()
    draw = np.random.default_rng(0)
    tokens = (draw.integers(0, 6, (N_CONTEXTS, 1)) + np.arange(CONTEXT)) % 6 + 4  # the next: + 1
    residual = residual_at(model, torch.from_numpy(tokens), LAYER).clone()
    head = torch.nn.Parameter(torch.zeros(WORDS, D_MODEL))
    optimizer = torch.optim.Adam([head], lr=0.03)
    for _ in range(100):
        read = head * (torch.arange(D_MODEL) >= IGNORED)
        logits = model.model.model.norm(residual)[:, :-1] @ read.T
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), torch.from_numpy(tokens[:, 1:])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.model.lm_head.weight = torch.nn.Parameter(read.detach(), requires_grad=False)

    folder = tmp_path_factory.mktemp("planted")
    kept = np.ones(tokens.shape, bool)
    kept[:, 0] = False
    zeros = np.zeros(tokens.shape, np.int32)
    arrays = {"activations": residual.numpy(), "tokens": tokens, "kept": kept}
    write_activations(folder, arrays | {"documents": zeros, "subsets": zeros}, 4, "float32")
    means = torch.stack([residual[tokens == token].mean(dim=0) for token in range(4, 10)])
    mean = residual.mean(dim=(0, 1))
    rows = torch.cat([means - mean, torch.eye(D_MODEL)[:1] * 4])
    autoencoder = L1Autoencoder(d_model=D_MODEL, n_latents=7)
    autoencoder.center.assign(mean)
    autoencoder.W_dec.assign(rows)
    autoencoder.W_enc.assign(torch.linalg.pinv(rows.T))  # each row of the six is 1 on its token
    return FeatureModel(model, LAYER, autoencoder, 1e9), ActivationStore(folder)


def test_what_the_model_computes_with_costs_more(planted):
    model, store = planted
    table = measure_directions(model, store, range(N_CONTEXTS), np.arange(7), seed=0)
    assert len(table) == 7 * 3 * 2
    used, ignored = (
        {(row["change"], row["direction"]): row for row in summarise(own, seed=0)}
        for own in (table[table.feature < 6], table[table.feature == 6])
    )
    own, other = used["ablated", "feature"], used["ablated", "random"]
    assert own["rise"][0] > 2 * other["rise"][0] and own["kl"][0] > 2 * other["kl"][0]
    assert (
        other["larger"] == 1
        and other["p"] < 0.05 < own["p"] == 1
        and own["kl"][1] < own["kl"][0] < own["kl"][2]
    )
    for measure in ("rise", "kl"):
        assert abs(ignored["ablated", "feature"][measure][0]) < 0.1 * own[measure][0]


@pytest.mark.parametrize("standardize", [False, True])
def test_the_rise_is_that_of_the_changed_stream(planted, standardize):
    model, store = planted
    config = {**model.autoencoder.get_config(), "standardize_tokens": standardize}
    autoencoder = L1Autoencoder.from_config(config)
    autoencoder.set_weights(model.autoencoder.get_weights())
    model = FeatureModel(model.language_model, LAYER, autoencoder, model.outlier_norm)
    table = measure_directions(model, store, range(N_CONTEXTS), np.array([2]), seed=0)
    own = table[(table.direction == "feature") & (table.change == "ablated")].iloc[0]
    tokens = torch.from_numpy(store.read("tokens", [own.context])).long()
    (activations,) = store.read("activations", [own.context])
    latents = autoencoder.encode(activations)[:, 2].detach()
    latents[0] = 0
    if standardize:
        latents *= torch.from_numpy(activations.std(axis=1, ddof=1))
    change = -latents[:, None] * torch.tensor(autoencoder.directions()[2])

    def predict(change) -> torch.Tensor:
        with model.replaced(lambda residual: residual + change):
            return model.language_model.model(tokens).logits[0, :-1].log_softmax(dim=-1)

    untouched, changed = predict(torch.zeros_like(change)), predict(change)
    assert own.n == int((latents > 0).sum())
    rise = (untouched - changed).gather(1, tokens[0, 1:, None]).sum()
    kl = (untouched.exp() * (untouched - changed)).sum()
    assert [own.rise, own.kl] == pytest.approx([float(rise) / own.n, float(kl) / own.n], rel=1e-3)


def test_directions_have_the_covariance_of_the_activations():
    draw = np.random.default_rng(0)
    spread = np.array([10.0, 1, 0.1])
    rows = 5 + draw.standard_normal((4_000, 3)) * spread
    mixed, even = draw_directions(rows, 2_000, seed=0)
    assert torch.allclose(mixed.norm(dim=1), torch.ones(2_000))
    assert abs(mixed[:, 0]).mean() > 0.8 > 0.1 > abs(mixed[:, 2]).mean()
    assert abs(even).mean(dim=0).numpy() == pytest.approx([0.5] * 3, abs=0.03)
