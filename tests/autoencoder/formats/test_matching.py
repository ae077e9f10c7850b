"""FOR_AUTOENCODER: activations for an autoencoder that there is already."""

import json

import pytest

from utils.activations.store import ActivationStore


@pytest.fixture
def save(tiny_run, tiny_text, run_here, tmp_path):
    """Save a few activations for the autoencoder of a folder, by default the tiny run's."""

    def save(*flags: object, folder=tiny_run.folder / "autoencoder", check: bool = True):
        return run_here(
            "save_activations", "--for-autoencoder", folder, "--dataset", tiny_text, "--n-tokens",
            2_048, "--activations-dir", tmp_path / "activations", *flags, check=check,
        )  # fmt: skip

    return save


def test_model_layer_and_context_length_are_the_autoencoders(save, tiny_model, tmp_path):
    printed = save().stdout
    words = f"MODEL_NAME {tiny_model}, LAYER 1, CONTEXT_LENGTH 32."
    assert words in printed
    store = ActivationStore(tmp_path / "activations")
    assert (store.model_name, store.layer, store.context_length) == (str(tiny_model), 1, 32)
    recorded = json.loads((tmp_path / "activations" / "settings.json").read_text())
    assert recorded["layer"] == 1 and "for_autoencoder" not in recorded
    assert words in save("--layer", 1).stdout  # said twice; the same run goes on


def test_a_setting_that_contradicts_is_refused(save, tmp_path):
    message = save("--layer", 2, check=False).message
    assert "LAYER must be that of the autoencoder autoencoder.keras of " in message
    assert ", 1; it is 2. Leave out one of the two." in message
    message = save("--model-name", "meta-llama/Llama-3.2-1B", check=False).message
    assert "MODEL_NAME must be that of the autoencoder" in message
    assert not (tmp_path / "activations").exists()


def test_what_it_does_not_say_stays_as_it_is_set(save, tiny_run, tiny_model, tmp_path):
    """As an earlier version's, which did not write the context length."""
    earlier = tmp_path / "autoencoder"
    earlier.mkdir()
    own = tiny_run.folder / "autoencoder"
    (earlier / "autoencoder.keras").write_bytes((own / "autoencoder.keras").read_bytes())
    metrics = json.loads((own / "metrics.json").read_text())
    del metrics["context_length"]
    (earlier / "metrics.json").write_text(json.dumps(metrics))
    printed = save("--context-length", 16, folder=earlier).stdout
    assert f"MODEL_NAME {tiny_model}, LAYER 1, CONTEXT_LENGTH 16." in printed


def test_an_autoencoder_that_is_not_there(save, tmp_path, run_here):
    (tmp_path / "empty").mkdir()
    message = save(folder=tmp_path / "empty", check=False).message
    assert "FOR_AUTOENCODER must hold an autoencoder" in message
    message = run_here("save_activations", "--hookpoint", "layers.1", check=False).message
    assert "HOOKPOINT is for FOR_AUTOENCODER, which is not given" in message
