"""Clamps, on a random LLaMA of four blocks and random autoencoders."""

import math

import pytest
import torch
from keras import ops
from tiny_llama import (
    CONTEXT,
    LAYER,
    N_LATENTS,
    PROMPT,
    tiny_autoencoder,
    tiny_language_model,
)

from utils.autoencoder.kinds import KINDS
from utils.language_model import residual_at, watched_passes
from utils.settings import InputError
from utils.steering.clamps import Clamp, change_by, steered
from utils.steering.feature_model import FeatureEncoder, FeatureModel
from utils.steering.generation import generate, generate_tokens, prompt_tokens


@pytest.fixture(scope="module")
def language_model():
    return tiny_language_model()


@pytest.fixture(scope="module")
def tokens(language_model):
    return prompt_tokens(language_model, PROMPT)


@pytest.fixture(scope="module")
def residual(language_model, tokens):
    return residual_at(language_model, tokens, LAYER)


@pytest.fixture(scope="module", params=list(KINDS))
def autoencoder(request, residual):
    return tiny_autoencoder(request.param, residual)


@pytest.fixture(scope="module")
def model(language_model, autoencoder):
    return in_place(language_model, autoencoder)


@pytest.fixture(scope="module")
def features(autoencoder, residual):
    """Features by how strongly they are active on the prompt, the strongest first."""
    latents = as_torch(autoencoder.encode(residual[0]))
    return latents.sum(0).argsort(descending=True).tolist()


def logits(language_model, tokens):
    return language_model.model(tokens).logits


def in_place(language_model, autoencoder, outlier_norm=math.inf):
    return FeatureModel(language_model, LAYER, autoencoder, outlier_norm)


def steered_residual(model, tokens, clamps):
    with steered(model, clamps):
        return model.residual(tokens)


def encoded(autoencoder, residual, features=None):
    return FeatureEncoder(autoencoder).encode(residual, features)


def as_torch(weight):
    return ops.convert_to_tensor(weight).detach()


def direction(autoencoder, feature):
    """Raw change of the residual stream for each unit of a feature's activation, by hand."""
    row = as_torch(autoencoder.W_dec)[feature]
    return row / row.norm() / as_torch(autoencoder.scale)


# ------------------------------------------------------------------------------- what a clamp does


def test_known_answer():
    # Decoder rows of norm 2, scale 1/10: the raw (30, 7) is x = (3, 0.7), f_0 = 3 and f_1 = 0.7.
    made = KINDS["l1"](d_model=2, n_latents=2)
    made.W_enc.assign([[1.0, 0.0], [0.0, 1.0]])
    made.W_dec.assign([[2.0, 0.0], [0.0, 2.0]])
    made.scale.assign(0.1)
    # A reported maximum of 8 is a latent of 4: it grows by 1, x by 2, the raw residual by 20.
    for strength, expected in ((1.0, 20.0), (-1.0, -140.0)):
        change = change_by(FeatureEncoder(made), [Clamp(0, strength, maximum=8.0)])
        result = change(torch.tensor([[30.0, 7.0]]))
        torch.testing.assert_close(result, torch.tensor([[expected, 0.0]]))


def test_steered_residual_moves_to_the_target(model, autoencoder, tokens, residual, features):
    feature = features[0]
    changed = steered_residual(model, tokens, [Clamp(feature, 2.0, 3.0)])
    norm = as_torch(autoencoder.W_dec)[feature].norm()
    present = as_torch(autoencoder.encode(residual[0]))[None, :, feature, None] * norm
    expected = (2.0 * 3.0 - present) * direction(autoencoder, feature)
    expected[:, 0] = 0  # BOS
    torch.testing.assert_close(changed - residual, expected, rtol=1e-5, atol=1e-5)


def test_present_activation_changes_nothing(model, language_model, autoencoder, tokens):
    # One position, because the present activation differs between positions; not BOS.
    first = tokens[:, 1:2]
    activations = encoded(autoencoder, residual_at(language_model, first, LAYER))[0, 0]
    feature = int(activations.argmax())
    assert activations[feature] > 0
    untouched = logits(language_model, first)
    clamp = Clamp(feature, 1.0, float(activations[feature]))
    with steered(model, [clamp]):
        torch.testing.assert_close(logits(language_model, first), untouched, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "strength", "target"),
    [
        ("clamp", 0.0, lambda present: 0 * present),
        ("ablate", 7.0, lambda present: 0 * present),
        ("scale", 2.5, lambda present: 2.5 * present),
        ("add", -1.5, lambda present: present - 1.5 * 5.0),
    ],
)
def test_interventions(model, autoencoder, tokens, residual, features, how, strength, target):
    feature = features[0]
    clamps = [Clamp(feature, strength, 5.0, how)]
    changed = steered_residual(model, tokens, clamps)
    present = encoded(autoencoder, residual)[..., feature, None]
    assert (present > 0).any()
    expected = (target(present) - present) * direction(autoencoder, feature)
    expected[:, 0] = 0  # BOS
    torch.testing.assert_close(changed - residual, expected, rtol=1e-5, atol=1e-5)


def test_some_latents_are_those_of_all(autoencoder, residual, features):
    chosen = torch.tensor([features[0], features[-1], features[5], features[0]])
    several = torch.cat([residual[0] * size for size in (0.3, 1, 3)])
    dense = encoded(autoencoder, several)[:, chosen]
    alone = encoded(autoencoder, several, chosen)
    assert torch.equal(dense > 0, alone > 0) and (dense > 0).any() and (dense == 0).any()
    torch.testing.assert_close(alone, dense, rtol=1e-6, atol=1e-6)


def test_each_row_of_a_batch_has_clamps_of_its_own(model, tokens, features):
    batch = tokens.expand(3, -1)
    rows = [
        [Clamp(features[0], 2.0, 3.0), Clamp(features[1], 0.0, 3.0, "ablate")],
        [Clamp(features[1], -1.0, 3.0, "add")],
        [],
    ]
    together = steered_residual(model, batch, rows)
    for clamps, row in zip(rows, together, strict=True):
        alone = steered_residual(model, tokens, clamps)
        torch.testing.assert_close(row, alone[0], rtol=1e-5, atol=1e-5)


def test_ablation_changes_no_bit_where_the_feature_is_silent(
    model, autoencoder, tokens, residual, features
):
    active = encoded(autoencoder, residual)[0] > 0
    active[0] = False  # BOS is never changed
    partly = [i for i in features if active[:, i].any() and not active[:, i].all()]
    changed = steered_residual(model, tokens, [Clamp(partly[0], 0.0, 5.0)])
    assert torch.equal((changed != residual)[0].any(dim=-1), active[:, partly[0]])


def test_two_clamps_add_up(model, tokens, residual, features):
    clamps = [Clamp(features[0], 1.5, 4.0), Clamp(features[1], -1.0, 3.0)]
    changes = [
        steered_residual(model, tokens, chosen) - residual
        for chosen in (clamps, clamps[:1], clamps[1:])
    ]
    torch.testing.assert_close(changes[0], changes[1] + changes[2], rtol=1e-5, atol=1e-4)


def test_outliers_are_left_alone(language_model, autoencoder, tokens, residual, features):
    norms = residual.norm(dim=-1)
    limit = float(norms.median())
    strict = in_place(language_model, autoencoder, limit)
    changed = steered_residual(strict, tokens, [Clamp(features[0], 2.0, 3.0)])
    same = (changed == residual).all(dim=-1)
    is_bos = tokens == language_model.bos
    assert (same & ~is_bos).any()
    assert torch.equal(same, (norms > limit) | is_bos)


def test_bos_within_a_text_is_left_alone(model, tokens, features):
    twice = torch.cat([tokens, tokens], dim=1)
    changed = steered_residual(model, twice, [Clamp(features[0], 2.0, 3.0)])
    same = (changed == model.residual(twice)).all(dim=-1)
    assert torch.equal(same, twice == model.language_model.bos) and same.sum() == 2


# ------------------------------------------------------------------------------ around the model


def test_batch_is_its_rows(model, language_model, tokens, features):
    batch = torch.cat([tokens, tokens.flip(1)])
    clamps = [Clamp(features[0], 2.0, 3.0)]
    with steered(model, clamps):
        together = logits(language_model, batch)
        apart = torch.cat([logits(language_model, row[None]) for row in batch])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype, autoencoder, tokens, features):
    half = tiny_language_model(dtype)
    untouched = residual_at(half, tokens, LAYER)
    clamps = [Clamp(features[0], 2.0, 3.0)]
    changed = steered_residual(in_place(half, autoencoder), tokens, clamps)
    assert changed.dtype == dtype
    expected = untouched.float() + change_by(FeatureEncoder(autoencoder), clamps)(untouched)
    expected[:, 0] = untouched[:, 0]  # BOS
    assert torch.equal(changed, expected.to(dtype))


def test_strength_that_overflows_is_refused(autoencoder, tokens, features):
    half = tiny_language_model(torch.float16)
    with pytest.raises(InputError, match="STRENGTH must keep the residual stream finite"):
        steered_residual(in_place(half, autoencoder), tokens, [Clamp(features[0], 1e6, 3.0)])


def test_hook_comes_off(model, language_model, tokens, features):
    untouched = logits(language_model, tokens)
    clamps = [Clamp(features[0], 5.0, 3.0)]
    with pytest.raises(RuntimeError, match="midway"), steered(model, clamps):
        assert not torch.equal(logits(language_model, tokens), untouched)
        raise RuntimeError("midway")
    assert torch.equal(logits(language_model, tokens), untouched)
    assert not language_model.blocks[LAYER]._forward_hooks


def test_clamps_are_checked(model):
    for clamps, where, rule in [
        ([Clamp(N_LATENTS, 1.0, 1.0)], "everywhere", "between 0 and 63"),
        ([Clamp(3, 1.0, 1.0), Clamp(3, 2.0, 1.0)], "everywhere", "clamped once"),
        ([[], [Clamp(3, math.nan, 1.0)]], "everywhere", "STRENGTH must be finite; it is nan"),
        ([Clamp(3, 1.0, 1.0, "push")], "everywhere", "INTERVENTION must be one of clamp, add"),
        ([Clamp(3, 1.0, 1.0)], "somewhere", "WHERE must be everywhere or generated, or positions"),
        ([Clamp(3, 1.0, 1.0)], [-1], "or positions from 1 on, for BOS, at 0, is never .* is .-1"),
    ]:
        with pytest.raises(InputError, match=rule), steered(model, clamps, where):
            pass


# ------------------------------------------------------------------------------------- generation


def test_cache_does_not_change_steered_text(model, language_model, features):
    clamps = [Clamp(features[0], 3.0, 4.0), Clamp(features[1], -1.0, 4.0)]
    untouched = generate(language_model, PROMPT, 20)
    with steered(model, clamps):
        cached = generate(language_model, PROMPT, 20, use_cache=True)
        whole = generate(language_model, PROMPT, 20, use_cache=False)
    assert cached == whole
    assert cached != untouched


@pytest.mark.parametrize("use_cache", [True, False])
def test_places(model, language_model, features, use_cache):
    """Which positions are changed, seen from the residual stream after the change."""
    clamps = [Clamp(features[0], 3.0, 4.0, "add")]
    prompts = [prompt_tokens(language_model, text) for text in (PROMPT, "w7 w8")]  # 6 and 3 tokens
    for where, expected in {
        "everywhere": ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4]),
        "generated": ([6, 7], [3, 4]),
        (2, 7): ([2, 7], [2]),
    }.items():
        seen, before = [set(), set()], []

        def after(residual, seen=seen, before=before):
            moved = (residual != before.pop()).any(-1)
            positions = passes[0].positions.expand(2, -1)
            for places, at, row in zip(seen, positions, moved, strict=True):
                places |= set(at[row].tolist())

        with (
            watched_passes(language_model) as passes,
            model.replaced(before.append),
            steered(model, clamps, where),
            model.replaced(after),
        ):
            generate_tokens(language_model, prompts, 3, use_cache)
        assert tuple(map(sorted, seen)) == expected


def test_a_padded_batch_says_what_its_prompts_say_alone(model, language_model, features):
    clamps = [Clamp(features[0], 3.0, 4.0)]
    prompts = [prompt_tokens(language_model, text) for text in (PROMPT, "w7 w8", "w9")]
    for where in ("everywhere", "generated"):
        texts = []
        for batch in (prompts, *([prompt] for prompt in prompts)):
            with steered(model, clamps, where):
                texts.append([row.tolist() for row in generate_tokens(language_model, batch, 12)])
        assert texts[0] == texts[1] + texts[2] + texts[3]


def test_chat_is_put_into_the_models_template(model, language_model, monkeypatch):
    with pytest.raises(
        InputError, match="CHAT_TEMPLATE need a model with a chat template; tiny has none"
    ):
        generate(language_model, PROMPT, 3, chat=True)
    template = "{{ bos_token }} w5 {{ messages[0].content }} w6"
    monkeypatch.setattr(language_model.tokenizer, "chat_template", template)
    assert prompt_tokens(language_model, "w9", chat=True).tolist() == [[0, 5, 9, 6]]
    assert generate(language_model, "w9", 5, chat=True) == generate(language_model, "w5 w9 w6", 5)


def test_generation_is_greedy_and_only_the_continuation(language_model, tokens):
    text = generate(language_model, PROMPT, 3)
    expected = tokens
    for _ in range(3):
        likeliest = logits(language_model, expected)[:, -1:].argmax(-1)
        expected = torch.cat([expected, likeliest], dim=1)
    assert text == language_model.tokenizer.decode(expected[0, tokens.shape[1] :])


def test_drawing_depends_on_the_seed_alone(language_model):
    drawn = [generate(language_model, PROMPT, 10, temperature=1.0, seed=s) for s in (0, 1, 0)]
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[1]


def test_generation_ignores_the_models_own_settings(model, language_model, monkeypatch):
    expected = generate(language_model, PROMPT, 10, temperature=1.0)
    greedy = generate(language_model, PROMPT, 10)
    config = language_model.model.generation_config
    for name, value in {"do_sample": True, "temperature": 0.01, "top_p": 0.1, "top_k": 1}.items():
        monkeypatch.setattr(config, name, value)
    assert generate(language_model, PROMPT, 10, temperature=1.0) == expected
    assert generate(language_model, PROMPT, 10) == greedy


def test_generation_stops_at_the_end_of_the_text(model, language_model, monkeypatch):
    words = generate(language_model, PROMPT, 10).split()
    stop = language_model.tokenizer.convert_tokens_to_ids(words[4])
    monkeypatch.setattr(language_model.model.generation_config, "eos_token_id", stop)
    assert generate(language_model, PROMPT, 10).split() == words[: words.index(words[4]) + 1]


def test_prompt_begins_with_one_bos(language_model):
    assert prompt_tokens(language_model, "w5 w6").tolist() == [[0, 5, 6]]
    assert prompt_tokens(language_model, "<s> w5 w6").tolist() == [[0, 5, 6]]


def test_too_long_a_prompt_is_refused(language_model):
    prompt = " ".join(["w5"] * (CONTEXT - 6))  # and BOS: five tokens short of the context
    assert generate(language_model, prompt, 5)
    with pytest.raises(InputError, match="leave room for MAX_NEW_TOKENS"):
        generate(language_model, prompt, 6)
