"""From an example in the browser back to its text, and from the text to its activation."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LAYER, make_texts, write_activations
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.activations.store import ActivationStore
from utils.autoencoder.saved import open_autoencoder
from utils.steering.feature_model import FeatureEncoder


def test_places_in_documents_known_answer(tmp_path):
    # BOS is 300. Document 0 goes over three contexts, 1 over two, 2 begins anew in a context.
    tokens = np.array([[300, 1, 2, 3], [300, 4, 5, 6], [300, 7, 300, 1], [300, 2, 300, 1]])
    documents = np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 2, 2]])
    arrays = {name: np.zeros((4, 4), np.int16) for name in ("subsets",)}
    arrays |= {"tokens": tokens, "documents": documents, "norms": np.ones((4, 4), np.float32)}
    arrays["activations"] = np.ones((4, 4, 2), np.float16)
    write_activations(tmp_path, arrays)
    every = np.divmod(np.arange(16), 4)
    expected = [[-1, 0, 1, 2], [2, 3, 4, 5], [5, 6, -1, 0], [0, 1, -1, 0]]
    assert ActivationStore(tmp_path).places.of(*every).reshape(4, 4).tolist() == expected


def test_two_processes(tmp_path):
    """Each has every second document, and every second shard."""
    tokens = np.array([[300, 1, 2], [300, 1, 2], [300, 3, 4], [300, 3, 300]])
    documents = np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 3]])
    arrays = {"tokens": tokens, "documents": documents, "subsets": np.zeros((4, 3), np.int16)}
    arrays |= {"norms": np.ones((4, 3), np.float32), "activations": np.ones((4, 3, 2), np.float16)}
    write_activations(tmp_path, arrays, per_shard=1)
    places = ActivationStore(tmp_path).places.of(*np.divmod(np.arange(12), 3))
    assert places.reshape(4, 3)[:, 1:].tolist() == [[0, 1], [0, 1], [2, 3], [2, -1]]


@pytest.fixture(scope="module")
def examples(tiny_run) -> pd.DataFrame:
    return pd.read_parquet(tiny_run.folder / "analysis" / "examples.parquet")


def test_every_example_can_be_found_in_its_document(examples, tiny_model):
    tokenizer, texts = AutoTokenizer.from_pretrained(tiny_model), make_texts()
    tokens_of = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in texts]
    for row in examples.itertuples():
        assert tokens_of[row.document][row.place] == row.tokens[row.peak]
        assert texts[row.document][1] == row.subset
    assert examples["place"].max() > 32  # beyond a context


def test_the_browser_tells_the_place(examples, tiny_run):
    folder = tiny_run.folder / "analysis" / "browser" / "data"
    page = (folder / "00000.js").read_text()
    details = json.loads(page[page.index(",") + 1 : page.rindex(")")])
    for feature in range(32):
        rows = examples[examples["feature"] == feature]
        columns = (rows[name] for name in ("subset", "document", "place"))
        expected = ["{} · document {}, token {}".format(*of) for of in zip(*columns, strict=True)]
        assert [example["source"] for example in details[feature]["examples"]] == expected
    assert re.search(r"Garden · document \d+, token \d+", json.dumps(details, ensure_ascii=False))


@torch.no_grad()
def test_transformers_alone_gives_the_same_activation(examples, tiny_run, tiny_model):
    store = ActivationStore(tiny_run.folder / "activations")
    autoencoder, _ = open_autoencoder(tiny_run.folder / "autoencoder", store)
    features = pd.read_parquet(tiny_run.folder / "analysis" / "features.parquet")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    contexts, place = np.unique(examples["context"], return_inverse=True)
    tokens = torch.from_numpy(store.read("tokens", contexts)).long()
    states = model(tokens, output_hidden_states=True).hidden_states[LAYER + 1]
    documents = store.read("documents", contexts)
    places = store.places.of(contexts[:, None], np.arange(32))
    is_peak = (documents[place] == examples["document"].to_numpy()[:, None]) & (
        places[place] == examples["place"].to_numpy()[:, None]
    )
    assert (is_peak.sum(axis=1) == 1).all()
    at = is_peak.argmax(axis=1)
    rows = states[place, at].numpy()
    found = FeatureEncoder(autoencoder).active(rows)
    dense = np.zeros((len(rows), autoencoder.n_latents), np.float32)
    dense[found.row, found.feature] = found.activation
    computed = dense[np.arange(len(rows)), examples["feature"]]
    off = np.abs(computed - examples["activation"])
    off /= features["max_activation"].to_numpy()[examples["feature"]]
    assert (off <= 1e-2).mean() > 0.99  # where two latents are all but equal, either is chosen
    assert (off[examples["bucket"] == 0] <= 1e-2).mean() > 0.995
