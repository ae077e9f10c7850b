"""Published layouts with random weights: read, and compared with the layout's own equations.

n latents of width d. Weights are drawn in float32, the equations are NumPy's, in float64.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import Answer, D, K, N, Weights, drawn, relu, rows_of
from hand_set import array
from safetensors.torch import save_file

from utils.autoencoder.formats.importing import find
from utils.autoencoder.formats.source import Source
from utils.settings import InputError


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)


def save(path: Path, weights: Weights, dtype: torch.dtype = torch.float32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, values in weights.items():
        tensor = torch.from_numpy(np.array(values))
        tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)


def save_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def largest(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Of each row the K entries that are largest ``by`` these, 0 elsewhere."""
    edge = np.sort(by, axis=1)[:, -K, None]
    return np.where(by >= edge, values, 0)


def compare(source: Path, hookpoint: str | None, rows: np.ndarray, expected: Answer):
    """Read an autoencoder, and compare what it gives with what its equation gives."""
    imported = find(Source(str(source)), hookpoint)
    made = imported.build()
    latents, reconstruction = expected
    assert (latents > 0).any() and (latents == 0).any()
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(array(made.encode(rows)), latents, **close)
    np.testing.assert_allclose(array(made(rows)), reconstruction, **close)
    np.testing.assert_allclose(array(made.decode(latents, rows)), reconstruction, **close)
    return imported


# ------------------------------------------------------------------------- dictionary_learning


def linear(draw: np.random.Generator, *biases: str) -> Weights:
    """An encoder and a decoder of `torch.nn.Linear`, and further vectors of latents, all small."""
    weights = drawn(draw, **{"encoder.weight": (N, D), "decoder.weight": (D, N)})
    return weights | drawn(draw, **{name: (N,) for name in biases})


def trainer(folder: Path, name: str, **more: object) -> None:
    config = {"dict_class": name, "activation_dim": D, "dict_size": N, "layer": 3}
    config |= {"lm_name": "meta-llama/Llama-3.1-8B-Instruct", "k": K, **more}
    buffer = {"ctx_len": 1024, "io": "out", "d_submodule": D}
    save_json(folder / "config.json", {"trainer": config, "buffer": buffer})


def dl_topk(folder: Path, draw: np.random.Generator, rows: np.ndarray) -> Answer:
    w = linear(draw, "encoder.bias") | drawn(draw, b_dec=(D,))
    save(folder / "ae.pt", w | {"k": np.int32(K), "threshold": np.float32(0.7)})
    trainer(folder, "AutoEncoderTopK", submodule_name="resid_post_layer_3")
    pre = relu((rows - w["b_dec"]) @ w["encoder.weight"].T.astype(float) + w["encoder.bias"])
    f = largest(pre, pre)
    return f, f @ w["decoder.weight"].T + w["b_dec"]


def dl_batch_topk(folder: Path, draw: np.random.Generator, rows: np.ndarray) -> Answer:
    w = linear(draw, "encoder.bias") | drawn(draw, b_dec=(D,))
    save(folder / "ae.pt", w | {"k": np.int32(K), "threshold": np.float32(2.5)})
    trainer(folder, "BatchTopKSAE")
    pre = relu((rows - w["b_dec"]) @ w["encoder.weight"].T.astype(float) + w["encoder.bias"])
    f = pre * (pre > 2.5)
    return f, f @ w["decoder.weight"].T + w["b_dec"]


def dl_matryoshka(folder: Path, draw: np.random.Generator, rows: np.ndarray) -> Answer:
    w = drawn(draw, W_enc=(D, N), b_enc=(N,), W_dec=(N, D), b_dec=(D,))
    more = {"k": np.int32(K), "threshold": np.float32(2.5), "group_sizes": np.array([5, 11, 24])}
    save(folder / "ae.pt", w | more)
    trainer(folder, "MatryoshkaBatchTopKSAE")
    pre = relu((rows - w["b_dec"]) @ w["W_enc"].astype(float) + w["b_enc"])
    f = pre * (pre > 2.5)
    return f, f @ w["W_dec"] + w["b_dec"]


def dl_jumprelu(folder: Path, draw: np.random.Generator, rows: np.ndarray) -> Answer:
    w = drawn(draw, W_enc=(D, N), b_enc=(N,), W_dec=(N, D), b_dec=(D,), threshold=(N,))
    w["threshold"][0] = 0
    save(folder / "ae.pt", w)
    trainer(folder, "JumpReluAutoEncoder")
    pre = rows @ w["W_enc"].astype(float) + w["b_enc"]  # b_dec is not subtracted
    f = relu(pre * (pre > w["threshold"]))
    return f, f @ w["W_dec"] + w["b_dec"]


def dl_gated(folder: Path, draw: np.random.Generator, rows: np.ndarray) -> Answer:
    w = linear(draw, "r_mag", "gate_bias", "mag_bias") | drawn(draw, decoder_bias=(D,))
    save(folder / "ae.pt", w)
    trainer(folder, "GatedAutoEncoder")
    encoded = (rows - w["decoder_bias"]) @ w["encoder.weight"].T.astype(float)
    f = (encoded + w["gate_bias"] > 0) * relu(np.exp(w["r_mag"]) * encoded + w["mag_bias"])
    return f, f @ w["decoder.weight"].T + w["decoder_bias"]


def dl_standard(folder: Path, draw: np.random.Generator, rows: np.ndarray) -> Answer:
    w = linear(draw, "encoder.bias") | drawn(draw, bias=(D,))
    save(folder / "ae.pt", w)
    trainer(folder, "AutoEncoder")
    f = relu((rows - w["bias"]) @ w["encoder.weight"].T.astype(float) + w["encoder.bias"])
    return f, f @ w["decoder.weight"].T + w["bias"]


def dl_new(folder: Path, draw: np.random.Generator, rows: np.ndarray) -> Answer:
    w = linear(draw, "encoder.bias") | drawn(draw, **{"decoder.bias": (D,)})
    save(folder / "ae.pt", w)
    trainer(folder, "AutoEncoderNew")
    f = relu(rows @ w["encoder.weight"].T.astype(float) + w["encoder.bias"])
    return f, f @ w["decoder.weight"].T + w["decoder.bias"]


DICTIONARY_LEARNING: dict[Callable, tuple[str, dict]] = {
    dl_topk: ("topk", {"k": K}),
    dl_batch_topk: ("batch_topk", {"k": K}),
    dl_matryoshka: ("matryoshka", {"k": K, "prefixes": (5 / N, 16 / N, 1.0)}),
    dl_jumprelu: ("jumprelu", {}),
    dl_gated: ("gated", {}),
    dl_standard: ("l1", {}),
    dl_new: ("l1", {}),
}


@pytest.mark.parametrize("make", DICTIONARY_LEARNING, ids=lambda make: make.__name__)
def test_dictionary_learning(make, draw, tmp_path):
    rows = rows_of(draw)
    expected = make(tmp_path / "resid_post_layer_3" / "trainer_1", draw, rows)
    imported = compare(tmp_path, "resid_post_layer_3/trainer_1", rows, expected)
    kind, options = DICTIONARY_LEARNING[make]
    assert imported.kind == kind
    assert {name: imported.options[name] for name in options} == options
    origin = imported.origin
    assert (origin.format, origin.layer, origin.context_length) == ("dictionary_learning", 3, 1024)
    assert origin.model_name == "meta-llama/Llama-3.1-8B-Instruct"


def test_dictionary_learning_before_it_stored_k_and_at_the_root(draw, tmp_path):
    rows = rows_of(draw)
    expected = dl_topk(tmp_path, draw, rows)
    tensors = torch.load(tmp_path / "ae.pt", weights_only=True)
    del tensors["k"], tensors["threshold"]
    torch.save(tensors, tmp_path / "ae.pt", _use_new_zipfile_serialization=False)
    assert compare(tmp_path, None, rows, expected).origin.hookpoint == "."


def test_a_threshold_that_was_never_set_keeps_all_that_is_positive(draw, tmp_path):
    rows = rows_of(draw)
    dl_batch_topk(tmp_path, draw, rows)
    w = torch.load(tmp_path / "ae.pt", weights_only=True)
    w["threshold"] = torch.tensor(-1.0)
    torch.save(w, tmp_path / "ae.pt")
    w = {name: values.numpy().astype(float) for name, values in w.items()}
    f = relu((rows - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    compare(tmp_path, None, rows, (f, f @ w["decoder.weight"].T + w["b_dec"]))


# -------------------------------------------------------------------------------- Llama Scope

HOOK = "blocks.15.hook_resid_post"
NORM = 10.8125  # of activations, on average


def scope_config(act_fn: str, **more: object) -> dict:
    config = {"hook_point_in": HOOK, "hook_point_out": HOOK, "d_model": D, "act_fn": act_fn}
    config |= {"expansion_factor": N / D, "norm_activation": "dataset-wise", "top_k": K}
    return config | {"sparsity_include_decoder_norm": True, "use_decoder_bias": True} | more


def scope_1(folder: Path, draw: np.random.Generator, rows: np.ndarray) -> Answer:
    """As the first version loads it: the norm folded in, rows of norm 1, then the threshold."""
    w = linear(draw, "encoder.bias") | drawn(draw, **{"decoder.bias": (D,)})
    save(folder / "checkpoints" / "final.safetensors", w)
    norms = {"in": NORM, "out": NORM}
    config = scope_config(
        "jumprelu", jump_relu_threshold=4.0, dataset_average_activation_norm=norms
    )
    save_json(folder / "hyperparams.json", config | {"apply_decoder_bias_to_pre_encoder": False})
    factor = np.sqrt(D) / NORM
    row_norms = np.linalg.norm(w["decoder.weight"].astype(float), axis=0)
    hidden = (rows @ w["encoder.weight"].T.astype(float) + w["encoder.bias"] / factor) * row_norms
    unit_f = np.where(hidden > 4.0, hidden, 0)
    reconstruction = unit_f @ (w["decoder.weight"] / row_norms).T + w["decoder.bias"] / factor
    return unit_f / row_norms * factor, reconstruction  # of the stored weights' own units


def scope_2(folder: Path, draw: np.random.Generator, rows: np.ndarray) -> Answer:
    w = drawn(draw, W_E=(D, N), b_E=(N,), W_D=(N, D), b_D=(D,))
    theta = "activation_function.log_jumprelu_threshold"
    w |= drawn(draw, **{theta: (N,)})
    norm = {f"dataset_average_activation_norm.{HOOK}": np.float32(NORM)}
    save(folder / "sae_weights.safetensors", w | norm)
    save_json(folder / "config.json", scope_config("jumprelu", sae_type="sae"))
    pre = rows * np.sqrt(D) / NORM @ w["W_E"].astype(float) + w["b_E"]
    f = np.where(pre * np.linalg.norm(w["W_D"], axis=1) > np.exp(w[theta]), pre, 0)
    return f, (f @ w["W_D"] + w["b_D"]) * NORM / np.sqrt(D)


def scope_r1(folder: Path, draw: np.random.Generator, rows: np.ndarray) -> Answer:
    w = linear(draw, "encoder.bias", "log_jumprelu_threshold")
    w |= drawn(draw, **{"decoder.bias": (D,)})
    norm = {f"dataset_average_activation_norm.{HOOK}": np.float32(NORM)}
    save(folder / "sae_weights.safetensors", w | norm)
    config = scope_config("jumprelu", sparsity_include_decoder_norm=False)
    save_json(folder / "config.json", config)
    pre = rows * np.sqrt(D) / NORM @ w["encoder.weight"].T.astype(float) + w["encoder.bias"]
    f = np.where(pre > np.exp(w["log_jumprelu_threshold"]), pre, 0)
    return f, (f @ w["decoder.weight"].T + w["decoder.bias"]) * NORM / np.sqrt(D)


def scope_relu(folder: Path, draw: np.random.Generator, rows: np.ndarray) -> Answer:
    """Folded already, without a decoder's bias."""
    w = drawn(draw, W_E=(D, N), b_E=(N,), W_D=(N, D))
    save(folder / "sae_weights.safetensors", w)
    config = scope_config("relu", norm_activation="inference", use_decoder_bias=False)
    save_json(folder / "config.json", config)
    f = relu(rows @ w["W_E"].astype(float) + w["b_E"])
    return f, f @ w["W_D"]


LLAMA_SCOPE = {scope_1: "jumprelu", scope_2: "jumprelu", scope_r1: "jumprelu", scope_relu: "l1"}


@pytest.mark.parametrize("make", LLAMA_SCOPE, ids=lambda make: make.__name__)
def test_llama_scope(make, draw, tmp_path):
    rows = rows_of(draw)
    folder = "Llama3_1-8B-Base-L15R-8x"
    imported = compare(tmp_path, None, rows, make(tmp_path / folder, draw, rows))
    origin = imported.origin
    assert (origin.format, origin.layer, origin.hookpoint) == ("llama_scope", 15, folder)
    assert origin.model_name == "meta-llama/Llama-3.1-8B" and imported.kind == LLAMA_SCOPE[make]


def test_llama_scope_topk_chooses_with_the_norms_of_rows(draw, tmp_path):
    rows = rows_of(draw)
    w = drawn(draw, W_E=(D, N), b_E=(N,), W_D=(N, D), b_D=(D,))
    save(tmp_path / "sae_weights.safetensors", w)
    norms = {"in": NORM, "out": NORM}
    save_json(tmp_path / "config.json", scope_config("topk", dataset_average_activation_norm=norms))
    pre = relu(rows * np.sqrt(D) / NORM @ w["W_E"].astype(float) + w["b_E"])
    row_norms = np.linalg.norm(w["W_D"], axis=1)
    f = largest(pre, pre * row_norms)
    assert (f != largest(pre, pre)).any()
    made = find(Source(str(tmp_path)), None).build()
    # Ours are in units of rows of norm 1, as feature activations are.
    np.testing.assert_allclose(array(made.encode(rows)), f * row_norms, rtol=1e-5, atol=1e-5)
    expected = (f @ w["W_D"] + w["b_D"]) * NORM / np.sqrt(D)
    np.testing.assert_allclose(array(made(rows)), expected, rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------------------------- others


@pytest.mark.parametrize("standardize", [True, False])
def test_mlsae(standardize, draw, tmp_path):
    rows = rows_of(draw)
    w = drawn(
        draw, **{"encoder.weight": (N, D), "decoder.weight": (D, N), "pre_encoder_bias": (D,)}
    )
    save(tmp_path / "model.safetensors", w | {"last_nonzero": np.arange(N)})
    config = {"n_inputs": D, "n_latents": N, "k": K, "layers": [0, 2, 15, 27], "lens": False}
    save_json(tmp_path / "config.json", config | {"standardize": standardize, "auxk": 256})
    x, mean, std = rows.astype(float), 0.0, 1.0
    if standardize:
        mean, std = x.mean(axis=1, keepdims=True), x.std(axis=1, keepdims=True, ddof=1)
        x = (x - mean) / (std + 1e-5)
    pre = (x - w["pre_encoder_bias"]) @ w["encoder.weight"].T
    f = relu(largest(pre, pre))
    reconstruction = (f @ w["decoder.weight"].T + w["pre_encoder_bias"]) * std + mean
    imported = compare(tmp_path, "layers.15", rows, (f, reconstruction))
    assert imported.origin.layer == 15 and imported.options["standardize_tokens"] == standardize
    with pytest.raises(InputError, match=r"of the 4 that .*: layers\.0, layers\.2, layers\.15, la"):
        find(Source(str(tmp_path)), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_goodfire(dtype, draw, tmp_path):
    rows = rows_of(draw)
    w = drawn(draw, **{"encoder_linear.weight": (N, D), "encoder_linear.bias": (N,)})
    w |= drawn(draw, **{"decoder_linear.weight": (D, N), "decoder_linear.bias": (D,)})
    w = {name: torch.from_numpy(values).to(dtype).float().numpy() for name, values in w.items()}
    save(tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth", w, dtype)
    f = relu(rows @ w["encoder_linear.weight"].T.astype(float) + w["encoder_linear.bias"])
    reconstruction = f @ w["decoder_linear.weight"].T + w["decoder_linear.bias"]
    origin = compare(tmp_path, None, rows, (f, reconstruction)).origin
    assert (origin.model_name, origin.layer) == ("meta-llama/Llama-3.1-8B-Instruct", 19)
    assert origin.dtype == str(dtype).removeprefix("torch.")


def test_qwen_scope(draw, tmp_path):
    rows = rows_of(draw)
    folder = tmp_path / f"SAE-Res-Qwen3-8B-Base-W64K-L0_{K}"
    w = drawn(draw, W_enc=(N, D), W_dec=(D, N), b_enc=(N,), b_dec=(D,))
    for layer in (2, 10):
        save(folder / f"layer{layer}.sae.pt", w)
    pre = rows @ w["W_enc"].T.astype(float) + w["b_enc"]
    f = largest(pre, pre)
    assert (f >= 0).all()
    origin = compare(folder, "layer10.sae.pt", rows, (f, f @ w["W_dec"].T + w["b_dec"])).origin
    assert (origin.model_name, origin.layer) == ("Qwen/Qwen3-8B-Base", 10)
    with pytest.raises(InputError, match=r"HOOKPOINT .*: layer2\.sae\.pt, layer10\.sae\.pt\."):
        find(Source(str(folder)), None)
    folder.rename(tmp_path / "renamed")
    with pytest.raises(InputError, match="must have its repository's name, such as"):
        find(Source(str(tmp_path / "renamed")), "layer2.sae.pt")
