"""What ``EXPORT`` and ``PUSH_TO_HUB`` ask for: finished autoencoders as other tools' files."""

import dataclasses
from pathlib import Path
from typing import Protocol

from utils import embedded
from utils.activations.store import ActivationStore
from utils.artifacts import AUTOENCODER_FILE, METRICS_FILE, make_folder, read_json
from utils.autoencoder import hub
from utils.autoencoder.formats import saelens, sparsify
from utils.autoencoder.formats.folded import Facts
from utils.autoencoder.kinds import KINDS
from utils.autoencoder.saved import load_autoencoder
from utils.settings import require

WRITERS = {"saelens": saelens, "sparsify": sparsify}


class ExportSettings(Protocol):
    """The settings of train_autoencoder.py that an export depends on."""

    export: tuple[str, ...]
    export_dir: str
    kind: str
    sweep_latents: tuple[int, ...]
    push_to_hub: str | None
    dry_run: bool
    private: bool


def check(settings: ExportSettings, store: ActivationStore) -> None:
    """Refuse, before anything is trained, an export that would fail when it is.

    Raises:
        InputError: A tool lacks the kind, the folder cannot be written to, or the block of the
            model has no name.
    """
    hub.check(settings)
    if not settings.export and settings.push_to_hub is None:
        return
    require(
        not settings.sweep_latents,
        "EXPORT and PUSH_TO_HUB must be empty in a sweep, which saves no autoencoder. Train one of "
        "the sizes, and export that.",
    )
    if settings.export:
        require_expressible(settings, settings.kind, standardizes=False)
        make_folder(settings.export_dir, "--export-dir")
    block_of(store)


def require_expressible(settings: ExportSettings, kind: str, standardizes: bool) -> None:
    """Refuse to export a kind of autoencoder to a tool that lacks it."""
    if "sparsify" in settings.export:
        reason = sparsify.refusal(kind, standardizes)
        require(
            reason is None,
            f"EXPORT cannot be sparsify, which {reason}. Take saelens, which holds every kind.",
        )


def block_of(store: ActivationStore) -> str:
    """The module whose output the activations are, as ``"model.layers.15"``."""
    if store.block is not None:
        return store.block
    from utils.language_model import block_name

    return block_name(store.model_name, store.layer)


def export(settings: ExportSettings, store: ActivationStore, folder: Path) -> None:
    """Write the finished autoencoder of ``folder`` for the tools in ``EXPORT``, and for the hub."""
    if not settings.export and settings.push_to_hub is None:
        return
    autoencoder = load_autoencoder(folder / AUTOENCODER_FILE)
    kind = next(name for name, one in KINDS.items() if one is type(autoencoder))
    require_expressible(settings, kind, autoencoder.standardize_tokens)
    metrics = read_json(folder / METRICS_FILE)
    facts = Facts(
        model_name=_as_path(store.model_name, "model"),
        block=block_of(store),
        context_length=store.context_length,
        dataset=_as_path(store.dataset, "pile"),
        l0=metrics["l0"],
        fvu=metrics["fvu"],
        dead_fraction=metrics["dead_fraction"],
    )
    for name in settings.export:
        written = WRITERS[name].write(autoencoder, facts, Path(settings.export_dir) / name)
        print(f"Exported to {written}.")
    if settings.push_to_hub is not None:
        shown = {
            part: embedded.public_name(getattr(store, part), part)
            for part in ("model_name", "dataset")
        }
        hub.push(settings, autoencoder, dataclasses.replace(facts, **shown), folder)


def _as_path(name: str, part: str) -> str:
    """A model or a dataset as other tools find it."""
    return str(embedded.FOLDER / part) if name == "embedded" else name
