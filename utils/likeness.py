"""How alike contexts are: by the meaning of their sentences, or by their words.

A sentence model (a small encoder, the mean of its last states) compares by meaning. Without one,
TF-IDF compares by words.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from utils import embedded
from utils.language_model import pick_device
from utils.settings import InputError, hub_token

BATCH = 64  # texts embedded together
LONGEST = 64  # tokens of a text that a sentence model reads

Embedder = Callable[[Sequence[str]], Any]  # texts to a matrix of unit rows, dense or sparse


def open_embedder(name: str | None) -> Embedder:
    """The sentence model of that name (a hub name, a folder, ``"embedded"``); TF-IDF for None.

    Raises:
        InputError: There is no such model.
    """
    if name is None:
        return TfidfVectorizer(sublinear_tf=True).fit_transform
    source = str(embedded.sentence_folder()) if name == "embedded" else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, token=hub_token())
        model = AutoModel.from_pretrained(source, token=hub_token(), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"SENTENCE_MODEL {name} cannot be loaded: {error}") from None
    model = model.eval().to(pick_device())
    return lambda texts: embed(model, tokenizer, texts)


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors of texts, shape (texts, d): the mean of the last states over their tokens."""
    vectors = np.empty((len(texts), model.config.hidden_size), np.float32)
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in tqdm(range(0, len(texts), BATCH), "embedding contexts", unit="batch"):
        places = by_length[start : start + BATCH]
        inputs = tokenizer(
            [texts[i] for i in places],
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        ).to(model.device)
        states = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None]
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        vectors[places] = torch.nn.functional.normalize(means, dim=1).cpu().numpy()
    return vectors
