"""Bad input of an import: each an error that names what is wrong, and nothing is written or run."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_layouts import D, K, N, dl_batch_topk, dl_topk, save, save_json, scope_1, scope_config

from utils.autoencoder.formats.importing import find, require_fits
from utils.autoencoder.formats.source import Source
from utils.settings import InputError


@pytest.fixture
def folder(tmp_path) -> Path:
    """An autoencoder of dictionary_learning that is read."""
    draw = np.random.default_rng(0)
    dl_batch_topk(tmp_path / "it", draw, np.zeros((1, D), np.float32))
    return tmp_path / "it"


def refused(folder: Path | str, hookpoint: str | None = None) -> str:
    with pytest.raises(InputError) as raised:
        find(Source(str(folder)), hookpoint)
    return str(raised.value)


# --------------------------------------------------------------------------------- which one


def test_a_source_without_an_autoencoder_lists_what_it_has(tmp_path):
    for number in range(10):
        (tmp_path / f"notes{number}.txt").write_text("")
    says = refused(tmp_path)
    assert "in the files of one of dictionary_learning, goodfire, llama_scope, mlsae," in says
    assert "holds notes0.txt, notes1.txt," in says and "and 2 more" in says
    (tmp_path / "empty").mkdir()
    assert "holds no file" in refused(tmp_path / "empty")


def test_a_file_and_a_name_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "ae.pt").write_text("")
    assert "is a file. Name the folder that it is in" in refused(tmp_path / "ae.pt")
    for name in ("/no/such/folder", "a b/c", "owner/name/more"):
        assert f"there is no folder '{name}', and a repository cannot" in refused(name)


def test_one_autoencoder_in_two_formats_is_not_chosen_from(tmp_path):
    folder = tmp_path / "resid_post_layer_3"
    dl_topk(folder, np.random.default_rng(0), np.zeros((1, D), np.float32))
    for name in ("cfg.json", "sae_weights.safetensors"):
        (folder / name).write_text("{}")
    says = refused(tmp_path)
    assert "resid_post_layer_3 of" in says and "it is in those of dictionary_learning, " in says


def test_several_hook_points_must_be_chosen_from(tmp_path):
    draw = np.random.default_rng(0)
    for layer in (3, 11, 27):
        dl_topk(tmp_path / f"resid_post_layer_{layer}", draw, np.zeros((1, D), np.float32))
    scope_1(tmp_path / "Llama3_1-8B-Base-L15R-8x", draw, np.zeros((1, D), np.float32))
    says = refused(tmp_path)
    listed = "resid_post_layer_3, resid_post_layer_11, resid_post_layer_27."
    assert "HOOKPOINT must choose one of the 4 that" in says
    assert f"holds: Llama3_1-8B-Base-L15R-8x, {listed}" in says  # of two formats, by number
    says = refused(tmp_path, "resid_post_layer_1")
    assert "It is 'resid_post_layer_1'. Did you mean 'resid_post_layer_11'?" in says
    assert find(Source(str(tmp_path)), "resid_post_layer_27").kind == "topk"


# --------------------------------------------------------------------------------- what is in it


def change_tensors(folder: Path, change) -> None:
    tensors = torch.load(folder / "ae.pt", weights_only=True)
    change(tensors)
    torch.save(tensors, folder / "ae.pt")


def change_trainer(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["trainer"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop("b_dec"), "b_dec is missing"),
        (lambda tensors: tensors.update(gain=torch.ones(2)), "gain is not of this format"),
        (
            lambda tensors: tensors.update(b_dec=torch.ones(D + 1)),
            rf"b_dec is ({D + 1},), not ({D},)",
        ),
        (lambda tensors: tensors["decoder.weight"].fill_(torch.nan), "decoder.weight holds NaN"),
        (lambda tensors: tensors["encoder.bias"].fill_(torch.inf), "encoder.bias holds NaN or inf"),
        (lambda tensors: tensors.update(b_dec="code"), "it holds other things too"),
    ],
)
def test_tensors_that_are_wrong_are_named(folder, change, says):
    change_tensors(folder, change)
    message = refused(folder)
    assert says in message and "ae.pt" in message


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("with_zip", [True, False])
def test_code_in_a_pickle_is_not_run(folder, with_zip, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    content = {"encoder.weight": torch.zeros(N, D), "more": Evil()}
    torch.save(content, folder / "ae.pt", _use_new_zipfile_serialization=with_zip)
    says = refused(folder)
    assert "ae.pt of" in says and "asks for Python code, posix.mkdir, which is not run" in says
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["ae.pt", "model.safetensors"])
def test_damaged_files_are_named(folder, name):
    content = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n"
    if name == "model.safetensors":
        (folder / "ae.pt").unlink()
        save_json(folder / "config.json", {"n_inputs": D, "n_latents": N, "k": K})
    for damaged in (content, b""):
        (folder / name).write_bytes(damaged)
        says = refused(folder)
        assert name in says and "damaged" in says and "anew" in says


def test_a_configuration_that_is_missing_or_wrong_is_named(folder):
    change_trainer(folder, dict_class="CrossCoder")
    says = refused(folder)
    assert "BatchTopKSAE" in says and "it is CrossCoder, which has no counterpart here" in says
    change_trainer(folder, dict_class="BatchTopKSAE", submodule_name="mlp_out_layer_3")
    assert "its submodule_name is mlp_out_layer_3" in refused(folder)
    change_trainer(folder, submodule_name=None, dict_size=N + 1)
    assert f"encoder.weight is ({N}, {D}), not ({N + 1}, {D})" in refused(folder)
    change_trainer(folder, dict_size=N)
    change_tensors(folder, lambda tensors: tensors.update(k=torch.tensor(N + 1)))
    assert f"it has {N}, and k is {N + 1}" in refused(folder)
    save_json(folder / "config.json", {"trainer": {"dict_class": "BatchTopKSAE"}})
    assert "dict_size in config.json must be a positive whole number; it is None" in refused(folder)
    save_json(folder / "config.json", {"trainer": 3})
    assert "config.json must say trainer.dict_class" in refused(folder)
    (folder / "config.json").write_text("[1]")
    assert "config.json of" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "config.json is damaged" in refused(folder)
    (folder / "config.json").unlink()
    assert "config.json is missing" in refused(folder)


def test_a_reader_of_a_modules_input_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["buffer"]["io"] = "in_and_out"
    save_json(folder / "config.json", config)
    assert "its io is in_and_out, as of what reads an input, or of a transcoder" in refused(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"hook_point_out": "blocks.15.hook_mlp_out"},
            "it is a sae from blocks.15.hook_resid_post",
        ),
        ({"sae_type": "lorsa"}, "it is a lorsa from"),
        ({"act_fn": "batchtopk"}, "it is batchtopk. llamascopium itself turns batchtopk into jump"),
        ({"norm_activation": "token-wise"}, "token-wise, by which each token or batch"),
        ({"use_glu_encoder": True}, "a gated linear unit has no counterpart"),
        ({"dataset_average_activation_norm": None}, "must say one dataset_average_activation_norm"),
        (
            {"hook_point_in": "blocks.15.hook_mlp_out", "hook_point_out": "blocks.15.hook_mlp_out"},
            "blocks.15.hook_mlp_out is not the output of a decoder block",
        ),
    ],
)
def test_kinds_of_llama_scope_that_are_not_here_are_named(tmp_path, changes, says):
    draw = np.random.default_rng(0)
    scope_1(tmp_path, draw, np.zeros((1, D), np.float32))
    norms = {"in": 2.0, "out": 2.0}
    config = scope_config("jumprelu", jump_relu_threshold=4.0)
    save_json(
        tmp_path / "hyperparams.json", config | {"dataset_average_activation_norm": norms} | changes
    )
    assert says in refused(tmp_path)


def test_mlsae_with_a_lens_is_refused(tmp_path):
    config = {"n_inputs": D, "n_latents": N, "k": K, "layers": [0], "lens": True}
    save_json(tmp_path / "config.json", config)
    save(tmp_path / "model.safetensors", {"encoder.weight": np.zeros((N, D), np.float32)})
    assert "must have no lens, a matrix of its own for each layer" in refused(tmp_path)


# ---------------------------------------------------------------- does it fit the activations


def test_what_does_not_fit_the_activations_is_refused_by_both_names(folder):
    imported = find(Source(str(folder)), None)  # of layer 3 of meta-llama/Llama-3.1-8B-Instruct
    store = {"d_model": D, "layer": 3, "folder": Path("acts")}
    for model_name in (
        "meta-llama/Llama-3.1-8B-Instruct", "/models/meta-llama-3.1-8b-instruct",
        "unsloth/Meta-Llama-3.1-8B-Instruct",
    ):  # fmt: skip
        require_fits(imported, SimpleNamespace(**store, model_name=model_name), False)
    other = SimpleNamespace(**store, model_name="meta-llama/Llama-3.1-8B")
    with pytest.raises(InputError, match=r"it is of .*-Instruct, and acts of .*-8B\. Save activ"):
        require_fits(imported, other, False)
    require_fits(imported, other, True)
    for changed, rule in (
        ({"d_model": 576}, f"width: it has {D}, those in acts 576"),
        ({"layer": 4}, r"layer: \. is of layer 3, and acts of 4\. Choose .* --layer 3"),
    ):
        with pytest.raises(InputError, match=rule):
            require_fits(imported, SimpleNamespace(**{**vars(other), **changed}), True)


def test_the_embedded_model_goes_by_its_name(folder):
    change_trainer(folder, lm_name="HuggingFaceTB/SmolLM2-135M-Instruct")
    imported = find(Source(str(folder)), None)
    store = SimpleNamespace(d_model=D, layer=3, folder=Path("acts"), model_name="embedded")
    require_fits(imported, store, False)
