"""The card of an autoencoder on the hub: what it is, how good it is, how it is loaded."""

from huggingface_hub import ModelCardData

from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.formats.folded import Facts
from utils.settings import Json

CURVES = "training_curves.png"


def model_card(
    name: str,
    kind: str,
    autoencoder: SparseAutoencoder,
    facts: Facts,
    metrics: dict[str, Json],
    files: list[str],
) -> str:
    """README.md of a repository, made from the run; its license is left to the user.

    Args:
        name: Of the repository, owner/name.
        kind: Of the autoencoder.
        facts: What other tools are told of it too.
        metrics: Of metrics.json.
        files: The repository's other files.
    """
    is_on_hub = facts.model_name.count("/") == 1
    data = ModelCardData(
        library_name="saelens",
        base_model=facts.model_name if is_on_hub else None,
        tags=["sparse-autoencoder", "mechanistic-interpretability", kind],
    )
    rows = [f"| {what} | {value} |" for what, value in _facts(kind, autoencoder, facts, metrics)]
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# Sparse autoencoder of {facts.model_name}, {facts.block}",
        f"Its {autoencoder.n_latents:,} latents are sparse features of the residual stream after "
        f'block {metrics["layer"]} (counted from 0, `{facts.block}`), as in "Scaling '
        'Monosemanticity" (Templeton et al. 2024).',
        "\n".join(["| | |", "|---|---|", *rows]),
        *([f"![The training]({CURVES})"] if CURVES in files else []),
        _loading(name, files),
    ]
    return "\n\n".join(sections) + "\n"


def _facts(
    kind: str, autoencoder: SparseAutoencoder, facts: Facts, metrics: dict[str, Json]
) -> list[tuple[str, str]]:
    """What a run says of its autoencoder, in words by what it is."""
    chosen = f", k = {autoencoder.k}" if "k" in autoencoder.options() else ""
    told = [
        ("kind", f"{kind}{chosen}"),
        ("size", f"{autoencoder.n_latents:,} latents, d_model {autoencoder.d_model:,}"),
    ]
    if imported := metrics.get("imported"):
        source = f"{imported['source']}, {imported['hookpoint']}"
        told.append(("imported from", f"{source} ({imported['format']})"))
    else:
        told.append(("trained on", f"{metrics['n_tokens']:,} tokens, {facts.dataset}"))
    told += [
        ("contexts", f"{facts.context_length:,} tokens, of which the first, BOS, is left out"),
        ("variance explained", f"{1 - metrics['fvu']:.3f} (FVU {metrics['fvu']:.3f})"),
        ("L0", f"{metrics['l0']:.1f}"),
    ]
    if (dead := metrics.get("dead_fraction")) is not None:
        told.append(("dead latents", f"{dead:.2%}"))
    measured = f"{metrics['n_held_out_tokens']:,} tokens of {facts.dataset}"
    return [*told, ("measured on", f"{measured}, held out")]


def _loading(name: str, files: list[str]) -> str:
    """Commands that load a repository in each of the tools that it has files for."""
    lines = [
        "## How to load it",
        "",
        "In the project that made it, to analyse, steer and attribute by its features:",
        "```bash",
        f"python save_activations.py --for-autoencoder {name}",
        f"python train_autoencoder.py --import-from {name}",
        "```",
        "",
        "In SAELens:",
        "```python",
        "from sae_lens import SAE",
        f'sae = SAE.from_pretrained("{name}", "saelens")',
        "```",
    ]
    for file in files:
        if file.endswith("/sae.safetensors"):
            lines += [
                "",
                "In sparsify:",
                "```python",
                "from sparsify import SparseCoder",
                f'coder = SparseCoder.load_from_hub("{name}", "{file.rpartition("/")[0]}")',
                "```",
            ]
    return "\n".join(lines)
