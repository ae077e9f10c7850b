"""The making of the catalogue's tables (`catalogue` says what they hold)."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import torch

from utils.activations.store import ActivationStore
from utils.artifacts import replacing, write_json
from utils.features.feature_pass import WINDOW, FeaturePass, window_start
from utils.language_model import LanguageModel

N_PROMOTED = 10  # tokens listed as promoted, and as suppressed
ROWS_PER_GROUP = 4_096  # of examples.parquet, whose row groups are read one at a time


def vocabulary(tokenizer) -> list[str]:
    """The text of each token within a text, by its number.

    Decoded behind another token, for some tokenizers strip the space before a first one.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    clean = {"clean_up_tokenization_spaces": False}
    texts = tokenizer.batch_decode([[anchor, token] for token in range(len(tokenizer))], **clean)
    return [text[len(tokenizer.decode([anchor], **clean)) :] for text in texts]


@torch.inference_mode()
def promoted_tokens(
    language_model: LanguageModel, directions: np.ndarray, pieces: list[str], batch: int = 512
) -> pd.DataFrame:
    """The tokens whose logits a feature raises and lowers most when it alone speaks.

    A decoder row passes the final norm's weights and the unembedding; the norm's division is the
    same for all tokens and left out. A token's logit is counted in standard deviations of that
    token over all features, for otherwise rare tokens of long unembedding rows lead every list.

    Args:
        directions: Decoder rows, shape (n_latents, d_model).
        pieces: The text of each token.

    Returns:
        Columns ``promoted_tokens`` and ``suppressed_tokens``, each a list of texts.
    """
    # Some models pad their unembedding beyond the tokens there are.
    unembedding = language_model.model.get_output_embeddings().weight[: len(pieces)].float()
    unembedding = unembedding * language_model.model.get_decoder().norm.weight.float()
    rows = torch.from_numpy(directions.copy()).to(unembedding.device)
    rows = rows - rows.mean(dim=0)
    covariance = rows.T @ rows / len(rows)
    deviation = (unembedding @ covariance).mul(unembedding).sum(dim=1).sqrt()
    unembedding = unembedding / deviation.clamp_min(1e-9)[:, None]
    text = np.array(pieces, dtype=object)
    promoted, suppressed = [], []
    for some in rows.split(batch):
        scores = some @ unembedding.T
        promoted += text[scores.topk(N_PROMOTED).indices.cpu()].tolist()
        suppressed += text[(-scores).topk(N_PROMOTED).indices.cpu()].tolist()
    return pd.DataFrame({"promoted_tokens": promoted, "suppressed_tokens": suppressed})


def map_directions(
    directions: np.ndarray, alive: np.ndarray, seed: int, wanted: bool = True
) -> np.ndarray:
    """UMAP of the decoder rows of living features, by cosine.

    Returns:
        Shape (n_latents, 2); NaN for dead features, and for all if no map is ``wanted`` or there
        are too few features to have neighbours.
    """
    places = np.full((len(directions), 2), np.nan)
    n_alive = int(alive.sum())
    if wanted and n_alive > 3:
        import umap  # compiles for seconds when imported

        print(f"Mapping {n_alive:,} features with UMAP.")
        reducer = umap.UMAP(
            metric="cosine",
            n_neighbors=min(15, n_alive - 1),
            min_dist=0.05,
            random_state=seed,
            n_jobs=1,
        )
        places[alive] = reducer.fit_transform(directions[alive])
    return places


def example_table(found: FeaturePass, store: ActivationStore) -> pyarrow.Table:
    """The examples of a pass, with the tokens and sources of their windows."""
    examples = found.examples()
    starts = window_start(examples["position"], store.context_length)
    width = examples["window"].shape[1]
    n = len(starts)
    tokens = np.full((n, width), -1, np.int32)
    documents = np.empty(n, np.int32)
    subsets = np.empty(n, np.int16)
    names = {name: i for i, name in enumerate(found.subsets)}
    by_context = np.argsort(examples["context"], kind="stable")
    for i in by_context:
        shard, row = store.locate(examples["context"][i])
        window = shard["tokens"][row, starts[i] : starts[i] + width]
        tokens[i, : len(window)] = window
        peak = examples["position"][i]
        documents[i] = shard["documents"][row, peak]
        subsets[i] = names[shard.subset_names[shard["subsets"][row, peak]]]
    subset_names = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(subsets), pyarrow.array(found.subsets)
    )
    return pyarrow.table(
        {
            "feature": examples["feature"].astype(np.int32),
            "bucket": examples["bucket"].astype(np.int8),
            "rank": examples["rank"].astype(np.int16),
            "activation": examples["activation"],
            "context": examples["context"],
            "peak": (examples["position"] - starts).astype(np.int16),
            "document": documents,
            "subset": subset_names,
            "tokens": _lists(tokens),
            "activations": _lists(examples["window"].astype(np.float32)),
        }
    )


def _lists(values: np.ndarray) -> pyarrow.Array:
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), values.shape[1])


def feature_table(found: FeaturePass, examples: pyarrow.Table, pieces: list[str]) -> pd.DataFrame:
    """What the pass found, one row a feature."""
    features = pd.DataFrame(found.statistics())
    features.insert(0, "feature", np.arange(len(features)))
    features["peak_tokens"], features["peak_shares"] = _peak_tokens(examples, len(features), pieces)
    features["label"] = features["peak_tokens"].map(make_label)
    return features


def _peak_tokens(
    examples: pyarrow.Table, n_features: int, pieces: list[str]
) -> tuple[list[list[str]], list[list[float]]]:
    """The tokens at the peaks of each feature's highest examples, commonest first, and shares."""
    top = examples.filter(pyarrow.compute.equal(examples["bucket"], 0))
    feature, peak = top["feature"].to_numpy(), top["peak"].to_numpy()
    tokens = top["tokens"].combine_chunks().flatten().to_numpy()
    at_peak = tokens.reshape(-1, WINDOW)[np.arange(len(feature)), peak]
    counts = [Counter() for _ in range(n_features)]
    for number, token in zip(feature, at_peak, strict=True):
        counts[number][pieces[token]] += 1
    commonest = [count.most_common(N_PROMOTED) for count in counts]
    return (
        [[token for token, _ in pairs] for pairs in commonest],
        [
            [n / count.total() for _, n in pairs]
            for pairs, count in zip(commonest, counts, strict=True)
        ],
    )


def make_label(peak_tokens: list[str], n_words: int = 3) -> str:
    """The commonest peak tokens in words: a name to know a feature by until it has a better one.

    A word in capitals and not is one.
    """
    names: dict[str, str] = {}
    for token in peak_tokens:
        name = token.strip() or ("↵" if "\n" in token else "␣")
        names.setdefault(name.lower(), name)
    return ", ".join(list(names.values())[:n_words])


def summarise(found: FeaturePass, store: ActivationStore, trained: dict) -> dict[str, Any]:
    """What the analysis found as a whole, and what it was made from.

    ``trained`` is the training's metrics, with its settings and the autoencoder's fingerprint.
    """
    alive = found.uses > 0
    return {
        "model_name": store.model_name,
        "revision": store.revision,
        "layer": store.layer,
        "dtype": store.dtype,
        "dataset": store.dataset,
        "outlier_norm": store.outlier_norm,
        "excluded": store.excluded,
        "autoencoder_fingerprint": trained["fingerprint"],
        "kind": trained["kind"],
        "n_latents": len(alive),
        "n_alive": int(alive.sum()),
        "dead_fraction": float(1 - alive.mean()),
        "n_tokens": found.fidelity.n_rows,
        "fvu": found.fidelity.fvu,
        "held_out_fvu": trained["fvu"],
        "cosine": found.fidelity.cosine,
        "l0": found.fidelity.l0,
        "l0_counts": found.fidelity.l0_counts.tolist(),
        "subset_shares": found.subset_shares(),
    }


def save_tables(folder: Path, examples: pyarrow.Table, pieces: list[str]) -> None:
    """Write the examples that a pass over the activations found, and the text of each token."""
    with replacing(folder / "examples.parquet") as partial:
        pyarrow.parquet.write_table(examples, partial, row_group_size=ROWS_PER_GROUP)
    write_json(folder / "vocabulary.json", pieces)


def save_features(path: Path, features: pd.DataFrame) -> None:
    """Write a table of features."""
    with replacing(path) as partial:
        features.to_parquet(partial, index=False)
