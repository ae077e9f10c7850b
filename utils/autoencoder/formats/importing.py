"""From another tool's autoencoder to the folder that a training writes, which all else reads."""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Protocol

from utils import embedded
from utils.activations.store import ActivationStore
from utils.artifacts import AUTOENCODER_FILE, METRICS_FILE, require_disk_space, write_json
from utils.autoencoder.formats import FORMATS, own
from utils.autoencoder.formats.imported import Imported
from utils.autoencoder.formats.source import Source
from utils.autoencoder.saved import metrics_of, save_autoencoder
from utils.autoencoder.training import measure
from utils.settings import require

N_NAMED = 40  # hook points that an error lists


class ImportSettings(Protocol):
    """The settings of train_autoencoder.py that an import reads."""

    import_from: str
    hookpoint: str | None
    accept_mismatch: bool
    held_out: float
    n_held_out_tokens: int | None
    batch_size: int


def import_autoencoder(
    settings: ImportSettings, store: ActivationStore, folder: Path, backend: str
) -> None:
    """Read an autoencoder, check it, measure it on tokens held out, write it and its metrics.

    Does nothing if the folder has them.

    Raises:
        InputError: It cannot be read, is of other activations, or fails the check.
    """
    if (folder / METRICS_FILE).exists():
        return
    # Imported here, because it takes seconds that a training does not need.
    from utils.autoencoder.formats.check import check

    source = Source(settings.import_from)
    imported = find(source, settings.hookpoint)
    require_fits(imported, store, settings.accept_mismatch)
    print(in_words(imported, source))
    autoencoder = imported.build()
    require_disk_space(folder, 9 * autoencoder.n_latents * autoencoder.d_model)  # 4 bytes, twice
    split = store.split(settings.held_out, settings.n_held_out_tokens)
    store.verify(folder)
    dead_fraction = check(imported, autoencoder, store, settings)
    fidelity = measure(autoencoder, store, split.held_out, settings.batch_size)
    save_autoencoder(autoencoder, folder / AUTOENCODER_FILE)
    metrics = metrics_of(autoencoder, fidelity, None, store, backend) | {"split": split.rule}
    origin = {"source": source.name, "revision": source.revision}
    origin |= dataclasses.asdict(imported.origin)
    metrics |= {"dead_fraction": dead_fraction, "kind": imported.kind, **imported.options}
    metrics["imported"] = origin
    write_json(folder / METRICS_FILE, metrics)


def find(source: Source, hookpoint: str | None) -> Imported:
    """Read the autoencoder of a hook point; None for the only one of a source.

    Raises:
        InputError: There is no autoencoder of a known format, or not at that hook point; several,
            and none is chosen; it is there in two formats; or it cannot be read.
    """
    # A repository of ours holds the same for other tools too, less exactly.
    some = (own,) if own.hookpoints(source) else FORMATS
    held: dict[str, list[ModuleType]] = {}
    for each in some:
        for name in each.hookpoints(source):
            held.setdefault(name, []).append(each)
    require(
        bool(held),
        f"IMPORT_FROM must hold an autoencoder in the files of one of {_names(FORMATS)}; "
        f"{source.name} holds {source.listed()}. Name the folder or repository that does.",
    )
    names = sorted(held, key=_by_number)
    listed = ", ".join(names[:N_NAMED]) + (" and more" if len(names) > N_NAMED else "")
    if hookpoint is None:
        require(
            len(held) == 1,
            f"HOOKPOINT must choose one of the {len(held)} that {source.name} holds: {listed}.",
        )
        (hookpoint,) = held
    near = difflib.get_close_matches(hookpoint, names, n=1, cutoff=0)
    require(
        hookpoint in held,
        f"HOOKPOINT must be one that {source.name} holds: {listed}. It is {hookpoint!r}. Did you "
        f"mean {near[0]!r}?",
    )
    require(
        len(held[hookpoint]) == 1,
        f"{hookpoint} of {source.name} must be in the files of one format; it is in those of "
        f"{_names(held[hookpoint])}. Name a folder that has one of them.",
    )
    imported = held[hookpoint][0].read(source, hookpoint)
    k, n_latents = imported.options.get("k", 0), len(imported.weights["W_enc"])
    require(
        k <= n_latents,
        f"{hookpoint} of {source.name} must have as many latents as are active for a token; it has "
        f"{n_latents}, and k is {k}.",
    )
    return imported


def _names(formats: Iterable[ModuleType]) -> str:
    return ", ".join(each.__name__.rpartition(".")[2] for each in formats)


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer2 before layer10."""
    return [(int(part or 0), part) if part.isdigit() else (0, part) for part in
            re.split(r"(\d+)", name)]  # fmt: skip


def require_fits(imported: Imported, store: ActivationStore, accept_mismatch: bool) -> None:
    """Refuse an autoencoder of another width, layer or model, as far as its source says which.

    Another model, such as an instruct version of the same, is accepted with ``accept_mismatch``.
    """
    origin, d_model = imported.origin, imported.weights["W_enc"].shape[1]
    require(
        d_model == store.d_model,
        f"The autoencoder must have the activations' width: it has {d_model}, those in "
        f"{store.folder} {store.d_model}. Name folders that belong together.",
    )
    require(
        origin.layer in (None, store.layer),
        f"The autoencoder must be of the activations' layer: {origin.hookpoint} is of layer "
        f"{origin.layer}, and {store.folder} of {store.layer}. Choose another HOOKPOINT, or save "
        f"activations with --layer {origin.layer}.",
    )
    require(
        accept_mismatch
        or origin.model_name is None
        or is_same_model(origin.model_name, store.model_name),
        f"The autoencoder must be of the activations' model: it is of {origin.model_name}, and "
        f"{store.folder} of {store.model_name}. Save activations of that model, or, if the two are "
        "alike enough, pass --accept-mismatch.",
    )


def is_same_model(one: str, other: str) -> bool:
    """Whether two names are of one model, as far as names tell."""
    return _plain(one) == _plain(other)


def _plain(model_name: str) -> str:
    """A model's name without its owner, in lower case: hub names and folders' have many forms."""
    is_embedded = model_name in ("embedded", str(embedded.FOLDER / "model"))
    name = embedded.TITLES["model_name"] if is_embedded else model_name
    return Path(name).name.lower().removeprefix("meta-")


def in_words(imported: Imported, source: Source) -> str:
    """What is imported, and what its source leaves open."""
    origin = imported.origin
    n_latents, d_model = imported.weights["W_enc"].shape
    said = {"model": origin.model_name, "layer": origin.layer}
    unsaid = " and ".join(name for name, value in said.items() if value is None)
    lines = [
        f"Importing {origin.hookpoint} of {source.name} ({origin.format}): {imported.kind} with "
        f"{n_latents:,} latents of width {d_model}, stored in {origin.dtype}.",
        *origin.notes,
    ]
    if unsaid:
        lines.append(f"It does not say of which {unsaid} it is: that is taken to be right.")
    return "\n".join(lines)
