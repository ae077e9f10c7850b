"""Steering vectors as files, read back."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open

from utils.autoencoder.kinds import KINDS
from utils.autoencoder.saved import load_autoencoder
from utils.influence.export import require_exportable, save_vector, steering_vector
from utils.language_model import load_language_model
from utils.settings import InputError
from utils.steering.clamps import Clamp, changed, steered
from utils.steering.feature_model import FeatureEncoder, FeatureModel

CLAMPS = [Clamp(3, 2.0, 4.0), Clamp(1, -1.0, 6.0)]


@pytest.fixture
def encoder():
    made = KINDS["l1"](d_model=8, n_latents=4)
    rng = np.random.default_rng(0)
    made.initialize(0.1, rng.random(8), rng.random(8), decoder_norm=0.5, seed=0)
    made.W_dec.assign(rng.standard_normal((4, 8)))
    return FeatureEncoder(made)


def test_known_answer():
    made = KINDS["l1"](d_model=2, n_latents=2)
    made.W_dec.assign([[2.0, 0.0], [0.0, 5.0]])
    made.scale.assign(0.1)
    # 3 × a maximum of 8 along a unit direction is 24 in normalised units, 240 in raw ones.
    assert steering_vector(FeatureEncoder(made), [Clamp(1, 3.0, maximum=8.0)]).tolist() == [
        0.0,
        240.0,
    ]


def test_norm_of_one_feature(encoder):
    vector = steering_vector(encoder, CLAMPS[:1])
    torch.testing.assert_close(vector.norm(), torch.tensor(2.0 * 4.0 / 0.1))
    row = torch.from_numpy(encoder.autoencoder.directions()[3])
    torch.testing.assert_close(vector @ row, vector.norm() * row.norm())


def test_control_vector_is_read_by_the_format_s_own_reader(encoder, tmp_path):
    vector = steering_vector(encoder, CLAMPS)
    save_vector(tmp_path / "v.gguf", vector, CLAMPS, "a model", "llama", 15)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 1
    assert fields["controlvector.strengths"] == "[2.0, -1.0]"
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type) == ("direction.15", gguf.GGMLQuantizationType.F32)
    assert tensor.shape.tolist() == [8]
    assert np.array_equal(tensor.data, vector.numpy())


def test_json_is_what_np_vector_takes(encoder, tmp_path):
    """NPVector.new of neuronpedia 1.2.1, and the limits of api/vector/new/route.tsx."""
    vector = steering_vector(encoder, CLAMPS)
    save_vector(tmp_path / "v.json", vector, CLAMPS, "meta-llama/Llama-3.2-3B", "llama", 15)
    arguments = json.loads((tmp_path / "v.json").read_text())
    assert arguments.pop("vector") == vector.tolist()
    assert arguments == {
        "label": "feature 3 at 2, feature 1 at -1",
        "model_id": "llama-3.2-3b",
        "layer_num": 15,
        "hook_type": "hook_resid_post",
        "default_steer_strength": 1.0,
    }


def test_the_script_s_safetensors_added_is_the_intervention_add(tiny_run, run_here, tmp_path):
    paths = [tmp_path / "v.safetensors", tmp_path / "v.gguf"]
    flags = [*tiny_run.flags.influence_llm, "--influence-dir", tmp_path, "--max-new-tokens", 2]
    printed = run_here("influence_llm", *flags, "--strength", 3, "--save-vector", *paths).stdout
    with safe_open(paths[0], "pt") as file:
        vector, settings = file.get_tensor("steering_vector"), file.metadata()
    assert np.array_equal(gguf.GGUFReader(paths[1]).tensors[0].data, vector.numpy())
    assert f"norm {vector.norm():.4g}" in printed
    (feature,), (maximum,) = (
        [float(word) for word in settings[name].strip("[]").split(", ")]
        for name in ("features", "maxima")
    )
    assert settings["strengths"] == "[3.0]"

    layer = int(settings["layer"])
    language_model = load_language_model(settings["model_name"], layer, "float32")
    autoencoder = load_autoencoder(tiny_run.folder / "autoencoder" / "autoencoder.keras")
    tokens = torch.tensor([[0, 5, 9, 70, 40]])
    untouched = FeatureModel(language_model, layer, autoencoder, 0.0).residual(tokens)
    norms = untouched.norm(dim=-1)
    outlier_norm = float(norms.sort().values[0, -2])  # the largest alone is above it
    model = FeatureModel(language_model, layer, autoencoder, outlier_norm)
    with steered(model, [Clamp(int(feature), 3.0, maximum, how="add")]):
        expected = model.residual(tokens)
    with changed(model, lambda x: vector.expand(x.shape)):
        moved = model.residual(tokens)
    assert torch.equal(moved, expected)
    assert not torch.equal(moved, untouched)


def test_what_cannot_be_saved_is_refused(tmp_path, tiny_run, run_here):
    for path, rule in [("v.bin", "must end in"), (tmp_path / "no" / "v.gguf", "folder that exi")]:
        with pytest.raises(InputError, match=rule):
            require_exportable([path], 3)
    with pytest.raises(InputError, match="no control vector for layer 0"):
        require_exportable([tmp_path / "v.gguf"], 0)
    require_exportable([tmp_path / "v.safetensors"], 0)
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(InputError, match=r"must be a file; .*d\.gguf is a folder"):
        require_exportable([tmp_path / "d.gguf"], 3)
    flags = [*tiny_run.flags.influence_llm, "--save-vector", tmp_path / "v.gguf"]
    ended = run_here("influence_llm", *flags, check=False)
    assert "SAVE_VECTOR needs one STRENGTH other than 0" in ended.message
