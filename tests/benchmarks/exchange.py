"""SAELens' own evaluation of exported autoencoders beside ours, of the same weights and positions.

    python train_autoencoder.py --kind gated --autoencoder-dir A --export saelens --export-dir E ...
    python -m tests.benchmarks.exchange ACTIVATIONS_DIR N_CONTEXTS A=E ...

For each autoencoder, how far latents and reconstructions of 10,000 activations lie apart; then L0,
variance explained and loss recovered, by SAELens and by us. Needs sae-lens (the test group of
pyproject.toml). Both run the model in float32. Contexts with outliers of norm are left out, for
SAELens knows none; what it counts and ablates is what we do here, too.
"""

import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

from utils.backend import use_backend

use_backend("torch")

from utils import embedded  # noqa: E402
from utils.activations.store import ActivationStore, Contexts, spread  # noqa: E402
from utils.artifacts import AUTOENCODER_FILE  # noqa: E402
from utils.autoencoder.autoencoder import SparseAutoencoder  # noqa: E402
from utils.autoencoder.fidelity import Fidelity, loss_recovered  # noqa: E402
from utils.autoencoder.saved import load_autoencoder  # noqa: E402
from utils.features.studies.cross_entropy import logits_of, losses_of  # noqa: E402
from utils.language_model import LanguageModel, load_language_model  # noqa: E402
from utils.steering.feature_model import FeatureModel  # noqa: E402

BATCH = 8  # contexts
N_ROWS = 10_000


class Evaluation(NamedTuple):
    """Means over positions that are no special token."""

    l0: float
    variance_explained: float
    loss_recovered: float


def contexts_without_outliers(
    store: ActivationStore, language_model: LanguageModel, n: int
) -> np.ndarray:
    """Tokens of ``n`` contexts in which special tokens alone are not kept, (n, context_length)."""
    special = special_tokens(language_model)
    contexts: Contexts = np.arange(store.n_contexts)
    tokens, kept = store.read("tokens", contexts), store.read("kept", contexts)
    plain = (kept == ~np.isin(tokens, special)).all(axis=1)
    return tokens[spread(np.flatnonzero(plain), n)]


def special_tokens(language_model: LanguageModel) -> list[int]:
    """Those that SAELens leaves out: BOS, EOS and padding."""
    tokenizer = language_model.tokenizer
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return [token for token in tokens if token is not None]


@torch.inference_mode()
def evaluate_here(
    autoencoder: SparseAutoencoder, language_model: LanguageModel, layer: int, tokens: np.ndarray
) -> Evaluation:
    """Our evaluation of contexts (n, context_length), with what SAELens replaces and counts.

    With the reconstruction, special tokens stay as they are; with zeros none does.
    """
    model = FeatureModel(language_model, layer, autoencoder, outlier_norm=np.inf)
    fidelity, losses = Fidelity(autoencoder.d_model), []
    for batch in np.array_split(tokens, -(-len(tokens) // BATCH)):
        is_text = torch.from_numpy(~np.isin(batch, special_tokens(language_model)))
        batch = torch.from_numpy(batch)
        rows = model.residual(batch)[is_text].float()
        fidelity.add(rows, *autoencoder.reconstruct_and_count(rows))
        replaced = {
            "untouched": (is_text, lambda residual: residual),
            "reconstruction": (is_text, model.reconstruct),
            "zero_ablated": (torch.ones_like(is_text), torch.zeros_like),
        }
        found = {
            name: losses_of(logits_of(model, batch, kept, replace), batch, None)[0]
            for name, (kept, replace) in replaced.items()
        }
        losses.append({name: loss[is_text[:, :-1].numpy()] for name, loss in found.items()})
    means = {name: np.concatenate([loss[name] for loss in losses]).mean() for name in losses[0]}
    return Evaluation(fidelity.l0, 1 - fidelity.fvu, loss_recovered(means))


def evaluate_in_saelens(exported: Path, model_folder: str, tokens: np.ndarray) -> Evaluation:
    """SAELens' evaluation of what was exported, on contexts (n, context_length).

    The model's class and the place in it are those that the export names.
    """
    from datasets import Dataset
    from sae_lens import SAE, ActivationsStore
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.load_model import load_model
    from sae_lens.training.activation_scaler import ActivationScaler

    sae = SAE.load_from_disk(exported)
    said = sae.cfg.metadata
    kwargs = {**said.model_from_pretrained_kwargs, "dtype": torch.float32}
    model = load_model(said.model_class_name, model_folder, "cpu", kwargs, [said.hook_name])
    dataset = Dataset.from_dict({"tokens": tokens.tolist()})
    store = ActivationsStore.from_sae(
        model, sae, dataset, context_size=tokens.shape[1], total_tokens=len(tokens)
    )
    n_batches, rest = divmod(len(tokens), BATCH)
    assert not rest, f"SAELens evaluates whole batches of {BATCH} contexts"
    config = EvalConfig(
        batch_size_prompts=BATCH,
        n_eval_reconstruction_batches=n_batches,
        compute_ce_loss=True,
        n_eval_sparsity_variance_batches=n_batches,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    with mock.patch.dict(sys.modules):
        # `use_backend` bars it, and einops would use whatever module is listed.
        sys.modules.pop("tensorflow", None)
        found, _ = run_evals(sae, store, model, ActivationScaler(), config)
    return Evaluation(
        found["sparsity"]["l0"],
        found["reconstruction_quality"]["explained_variance"],
        found["model_performance_preservation"]["ce_loss_score"],
    )


@torch.inference_mode()
def differences(autoencoder: SparseAutoencoder, exported: Path, rows: np.ndarray) -> str:
    """The largest of a row's latents and of its reconstruction, relative; rows of other latents."""
    from sae_lens import SAE

    sae, rows = SAE.load_from_disk(exported), torch.from_numpy(rows)
    ours, theirs = autoencoder.encode(rows), sae.encode(rows)
    same = ((ours > 0) == (theirs > 0)).all(dim=1)
    pairs = {"latents": (ours, theirs), "reconstructions": (autoencoder(rows), sae.decode(theirs))}
    words = [f"{int((~same).sum())} of {len(rows):,} rows have other latents"]
    for name, (one, other) in pairs.items():
        error = (one - other)[same].norm(dim=1) / one[same].norm(dim=1)
        words.append(f"{name} differ by {float(error.max()):.1e} at most")
    return ", ".join(words)


def main(activations: str, n_contexts: str, *pairs: str) -> None:
    store = ActivationStore(activations)
    language_model = load_language_model(store.model_name, store.layer, "float32")
    name = store.model_name
    folder = str(embedded.model_folder()) if name == "embedded" else name
    tokens = contexts_without_outliers(store, language_model, int(n_contexts))
    print(f"{tokens.size:,} tokens", *Evaluation._fields, sep=" | ")
    for pair in pairs:
        trained, exported = pair.split("=")
        autoencoder = load_autoencoder(Path(trained) / AUTOENCODER_FILE)
        rows = store.kept_rows(range(store.n_contexts))[:N_ROWS].astype(np.float32)
        print(f"{trained}: {differences(autoencoder, Path(exported) / 'saelens', rows)}")
        ours = evaluate_here(autoencoder, language_model, store.layer, tokens)
        theirs = evaluate_in_saelens(Path(exported) / "saelens", folder, tokens)
        for who, found in (("SAELens", theirs), ("here", ours)):
            print(f"{trained}, {who}", *(f"{value:.6f}" for value in found), sep=" | ", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
