"""Both layouts with random weights: read, and compared with their equations, in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import Answer, D, K, N, Weights, drawn, relu, rows_of
from hand_set import array
from safetensors.torch import save_file

from utils.autoencoder.formats import saelens, sparsify
from utils.autoencoder.formats.hooks import layer_of
from utils.autoencoder.formats.importing import find
from utils.autoencoder.formats.source import Source
from utils.settings import InputError

SAID = {
    "sae_lens_version": "6.54.12", "model_name": "m", "hook_name": "blocks.3.hook_resid_post",
    "context_size": 128, "prepend_bos": True, "hook_head_index": None,
}  # fmt: skip


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)


def save(folder: Path, config: dict, weights: Weights, name: str, dtype=torch.float32) -> Source:
    """Save weights beside their configuration, and give the source that holds both."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    tensors = {key: torch.from_numpy(np.array(values)).to(dtype) for key, values in weights.items()}
    save_file(tensors, folder / name)
    return Source(str(folder))


def largest(values: np.ndarray) -> np.ndarray:
    """Whether a value is one of the K largest of its row."""
    return values >= np.sort(values, axis=1)[:, -K, None]


def require_reads(source: Source, rows: np.ndarray, kind: str, expected: Answer) -> None:
    imported = find(source, None)
    assert imported.kind == kind
    made = imported.build()
    assert 0 < (expected[0] > 0).mean() < 1
    np.testing.assert_allclose(array(made.encode(rows)), expected[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(array(made(rows)), expected[1], rtol=2e-5, atol=1e-4)


# --------------------------------------------------------------------------------------- SAELens


def config_of(architecture: str, **more) -> dict:
    return {
        "architecture": architecture, "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none",
        "reshape_activations": "none", "metadata": SAID, **more,
    }  # fmt: skip


def weights_of(draw: np.random.Generator, architecture: str) -> Weights:
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_dec": (D,)}
    if architecture == "gated":
        return drawn(draw, **shapes, b_gate=(N,), b_mag=(N,), r_mag=(N,))
    weights = drawn(draw, **shapes, b_enc=(N,))
    if architecture == "jumprelu":
        weights["threshold"] = draw.uniform(-1, 3, N).astype(np.float32)  # 0 and below, too
        weights["threshold"][0] = 0
    if "batchtopk" in architecture:
        weights["topk_threshold"] = np.float32(2.5)
    return weights


def saelens_answer(config: dict, w: Weights, rows: np.ndarray) -> Answer:
    """The equations of the architectures, on activations that are not normalised."""
    w = {name: values.astype(np.float64) for name, values in w.items()}
    a = rows.astype(np.float64) - config["apply_b_dec_to_input"] * w["b_dec"]
    norms = np.linalg.norm(w["W_dec"], axis=1) if config.get("rescale_acts_by_decoder_norm") else 1
    if config["architecture"] == "gated":
        magnitude = a @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"]
        f = (a @ w["W_enc"] + w["b_gate"] > 0) * relu(magnitude)
    else:
        hidden = (a @ w["W_enc"] + w["b_enc"]) * norms
        threshold = w.get("threshold", w.get("topk_threshold", -np.inf))
        f = relu(hidden) * (hidden > threshold)
        if config["architecture"] == "topk":
            f = relu(hidden) * largest(hidden)
    return f, (f / norms) @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("subtracts", [False, True])
@pytest.mark.parametrize(
    ("architecture", "kind", "more"),
    [
        ("standard", "l1", {}),
        ("gated", "gated", {}),
        ("jumprelu", "jumprelu", {}),
        ("topk", "topk", {"k": K}),
        ("topk", "topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("batchtopk", "jumprelu", {"k": K, "rescale_acts_by_decoder_norm": False}),
        ("batchtopk", "jumprelu", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("matryoshka_batchtopk", "jumprelu", {"k": K, "rescale_acts_by_decoder_norm": True}),
    ],
)
def test_saelens(draw, tmp_path, architecture, kind, more, subtracts):
    config = config_of(architecture, apply_b_dec_to_input=subtracts, **more)
    weights, rows = weights_of(draw, architecture), rows_of(draw)
    source = save(tmp_path, config, weights, saelens.WEIGHTS)
    require_reads(source, rows, kind, saelens_answer(config, weights, rows))
    origin = find(source, ".").origin
    assert (origin.format, origin.layer, origin.model_name) == ("saelens", 3, "m")
    assert (origin.context_length, origin.prepends_bos, origin.notes) == (128, True, ())


@pytest.mark.parametrize("subtracts", [False, True])
def test_saelens_factor_of_a_checkpoint(draw, tmp_path, subtracts):
    """The threshold is of pre-activations of scaled activations."""
    config = config_of("batchtopk", k=K, rescale_acts_by_decoder_norm=True,
                       apply_b_dec_to_input=subtracts,
                       normalize_activations="expected_average_only_in")  # fmt: skip
    weights, rows = weights_of(draw, "batchtopk"), rows_of(draw)
    save(tmp_path / "step_10", config, weights, saelens.WEIGHTS)
    (tmp_path / "step_10" / saelens.SCALER).write_text('{"scaling_factor": 1.7}')
    f, scaled = saelens_answer(config, weights, np.float32(1.7) * rows)
    require_reads(Source(str(tmp_path)), rows, "jumprelu", (f, scaled / 1.7))


@pytest.mark.parametrize("subtracts", [False, True])
def test_saelens_layer_norm(draw, tmp_path, subtracts):
    config = config_of("jumprelu", apply_b_dec_to_input=subtracts,
                       normalize_activations="layer_norm")  # fmt: skip
    weights, rows = weights_of(draw, "jumprelu"), rows_of(draw)
    mean = rows.mean(1, keepdims=True, dtype=np.float64)
    deviation = rows.std(1, ddof=1, keepdims=True, dtype=np.float64)
    f, inner = saelens_answer(config, weights, (rows - mean) / (deviation + 1e-5))
    source = save(tmp_path, config, weights, saelens.WEIGHTS)
    require_reads(source, rows, "jumprelu", (f, inner * deviation + mean))


def test_saelens_before_version_6(draw, tmp_path):
    """One level, TopK as an activation function, b_dec subtracted unless it says otherwise."""
    config = {
        "d_in": D, "d_sae": N, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
        "normalize_activations": "none", "hook_name": "blocks.3.hook_resid_post",
        "model_name": "m", "context_size": 64, "prepend_bos": False,
    }  # fmt: skip
    weights, rows = weights_of(draw, "topk"), rows_of(draw)
    now = config_of("topk", apply_b_dec_to_input=True)
    source = save(tmp_path, config, weights, saelens.WEIGHTS)
    require_reads(source, rows, "topk", saelens_answer(now, weights, rows))
    origin = find(source, ".").origin
    assert (origin.layer, origin.context_length, origin.prepends_bos) == (3, 64, False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "matching_pursuit"}, "'matching_pursuit' .*chooses each latent for what"),
        ({"architecture": "temporal"}, "'temporal' .*encodes a token by those before it"),
        ({"architecture": "transcoder"}, "'transcoder' .*one place's activations from another's"),
        ({"architecture": "crosscoder"}, "'crosscoder' .*several layers at once.* Take one of sta"),
        ({"architecture": "new"}, "'new' .*is not known here"),
        ({"architecture": ["topk"], "metadata": None}, "is not known here"),
        ({"normalize_activations": "constant_norm_rescale"}, "divided by its own norm.* Take"),
        ({"normalize_activations": "covariance_whitening"}, "whitens .* when the training ended"),
        ({"normalize_activations": "expected_average_only_in"}, "activation_scaler.json .*neither"),
        ({"normalize_activations": "odd"}, "one of none, layer_norm, .*; it is 'odd'"),
        ({"reshape_activations": "hook_z"}, "attention head's output"),
        ({"metadata": SAID | {"hook_head_index": 2}}, "attention head's output"),
        ({"metadata": SAID | {"hook_name": "blocks.3.hook_mlp_out"}}, "blocks.3.hook_mlp_out is"),
        ({"k": N + 1}, "k in cfg.json must be at most d_sae, 40"),
        ({"k": None}, "k in cfg.json must be a positive whole number; it is None"),
        ({"d_sae": "many"}, "d_sae in cfg.json must be a positive whole number; it is 'many'"),
        ({"d_sae": N + 1}, r"W_enc is \(12, 40\), not \(12, 41\)"),
    ],
)
def test_saelens_refuses(draw, tmp_path, change, says):
    config = config_of("topk", k=K) | change
    source = save(tmp_path, config, weights_of(draw, "topk"), saelens.WEIGHTS)
    with pytest.raises(InputError, match=says):
        find(source, None)


def test_saelens_refuses_a_whitened_checkpoint(draw, tmp_path):
    save(tmp_path, config_of("topk", k=K), weights_of(draw, "topk"), saelens.WEIGHTS)
    (tmp_path / saelens.WHITENING).write_bytes(b"")
    with pytest.raises(InputError, match="whitens activations"):
        find(Source(str(tmp_path)), None)


# -------------------------------------------------------------------------------------- sparsify


def sparsify_answer(w: Weights, rows: np.ndarray) -> Answer:
    w = {name: values.astype(np.float64) for name, values in w.items()}
    hidden = relu((rows - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    f = hidden * largest(hidden)
    return f, f @ w["W_dec"] + w["b_dec"]


def coder(draw: np.random.Generator) -> Weights:
    shapes = {"encoder.weight": (N, D), "encoder.bias": (N,), "W_dec": (N, D), "b_dec": (D,)}
    return drawn(draw, **shapes)


SPARSIFY = {"d_in": D, "k": K, "num_latents": N, "expansion_factor": 32, "activation": "topk"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparsify(draw, tmp_path, dtype):
    folders = ("layers.3", "layers.3.mlp", "layers.21")
    for name in folders:
        weights = coder(draw)
        save(tmp_path / name, SPARSIFY, weights, sparsify.WEIGHTS, dtype)
    run = {"model": "m", "ctx_len": 2048, "hookpoints": folders}
    (tmp_path / "config.json").write_text(json.dumps(run))
    source = Source(str(tmp_path))
    assert sparsify.hookpoints(source) == ["layers.21", "layers.3", "layers.3.mlp"]
    imported = sparsify.read(source, "layers.21")
    stored = {name: torch.from_numpy(w).to(dtype).float().numpy() for name, w in weights.items()}
    rows = rows_of(draw)
    expected, made = sparsify_answer(stored, rows), imported.build()
    np.testing.assert_allclose(array(made.encode(rows)), expected[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(array(made(rows)), expected[1], rtol=2e-5, atol=1e-4)
    origin = imported.origin
    assert (origin.model_name, origin.layer, origin.context_length) == ("m", 21, 2048)
    assert origin.dtype == str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=r"layers\.3\.mlp is not the output of a decoder block"):
        sparsify.read(source, "layers.3.mlp")


def test_sparsify_of_an_early_version_in_a_folder_by_itself(draw, tmp_path):
    """Latents by the expansion factor, and the folder's own name for the hook point."""
    config = {"d_in": 10, "k": K, "expansion_factor": 4, "normalize_decoder": True, "signed": False}
    shapes = {"encoder.weight": (N, 10), "encoder.bias": (N,), "W_dec": (N, 10), "b_dec": (10,)}
    weights, rows = drawn(draw, **shapes), draw.normal(size=(50, 10)).astype(np.float32)
    source = save(tmp_path / "layer_7", config, weights, sparsify.WEIGHTS)
    require_reads(source, rows, "topk", sparsify_answer(weights, rows))
    assert find(source, ".").origin.layer == 7


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation": "groupmax"}, "activation of .* is 'groupmax'.* Take one with topk"),
        ({"signed": True}, "has signed: it has latents below 0.* Take one without"),
        ({"transcode": True}, "has transcode: it computes a module's output"),
        ({"skip_connection": True}, "has skip_connection: it adds"),
        ({"d_in": 0}, "d_in in layers.3/cfg.json must be a positive whole number; it is 0"),
        ({"k": N + 1}, "k in layers.3/cfg.json must be at most its 40 latents; it is 41"),
    ],
)
def test_sparsify_refuses(draw, tmp_path, change, says):
    save(tmp_path / "layers.3", SPARSIFY | change, coder(draw), sparsify.WEIGHTS)
    with pytest.raises(InputError, match=says):
        find(Source(str(tmp_path)), None)


# ------------------------------------------------------------------------------------------ both


DAMAGE = {
    "W_dec is missing": lambda w: w.pop("W_dec"),
    "W_skip is not of this format": lambda w: w.update(W_skip=np.ones((D, D), np.float32)),
    r"b_dec is \(13,\), not \(12,\)": lambda w: w.update(b_dec=np.ones(D + 1, np.float32)),
    "W_dec holds NaN or infinity": lambda w: w["W_dec"].__setitem__((3, 3), np.nan),
}


@pytest.mark.parametrize("says", DAMAGE)
@pytest.mark.parametrize("tool", [saelens, sparsify])
def test_other_tensors_are_refused(draw, tmp_path, tool, says):
    weights = coder(draw) if tool is sparsify else weights_of(draw, "topk")
    config = SPARSIFY if tool is sparsify else config_of("topk", k=K)
    DAMAGE[says](weights)
    save(tmp_path / "layers.3", config, weights, tool.WEIGHTS)
    with pytest.raises(InputError, match=f"layers.3/{tool.WEIGHTS} does not hold .*{says}"):
        find(Source(str(tmp_path)), None)


def test_places_in_other_tools_names():
    for name, layer in {
        "blocks.0.hook_resid_post": 0, "model.layers.15": 15, "layers.3": 3, "layer_4": 4,
        "transformer.h.11": 11, "gpt_neox.layers.2": 2, "model.language_model.layers.30": 30,
    }.items():  # fmt: skip
        assert layer_of(name) == (layer, ()), name
    before = "blocks.4.hook_resid_pre is the output of block 3."
    assert layer_of("blocks.4.hook_resid_pre") == (3, (before,))
    for name in (
        "blocks.0.hook_resid_pre", "blocks.3.hook_resid_mid", "blocks.3.attn.hook_z",
        "layers.3.mlp", "embed_tokens", "layers.3.mlp.experts.0", "15", "",
    ):  # fmt: skip
        with pytest.raises(InputError, match="is not the output of a decoder block"):
            layer_of(name)
