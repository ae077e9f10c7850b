"""A finished analysis for other tools: files that they read, and its features on Neuronpedia."""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from utils.artifacts import RunRecord, fingerprint, open_stage, require_disk_space
from utils.embedded import public_name
from utils.features import neuronpedia, saedashboard, upload
from utils.features.catalogue import EXAMPLES_FILE, FEATURES_FILE, TOKEN_TEXTS_FILE, Catalogue
from utils.features.dashboards import Source, default_set, model_id, parse_source
from utils.settings import require

if TYPE_CHECKING:
    from utils.activations.store import ActivationStore

Tool = Literal["neuronpedia", "saedashboard"]
OUTPUTS = {"neuronpedia": neuronpedia.OUTPUTS, "saedashboard": saedashboard.OUTPUTS, "upload": ()}
BYTES_PER_FEATURE = {"neuronpedia": 8_000, "saedashboard": 30_000, "upload": 10}


class ShareSettings(Protocol):
    """The settings of analyze_features.py for other tools."""

    script: str
    n_tokens: int | None
    export: tuple[Tool, ...]
    export_dir: str
    neuronpedia_source: str | None
    upload: Literal["preview", "send"] | None
    overwrite: bool


def check(settings: ShareSettings) -> None:
    """Refuse a source or an address that is none, and to upload without a key."""
    if settings.neuronpedia_source is not None:
        parse_source(settings.neuronpedia_source)
    if settings.upload:
        upload.read_address()
    if settings.upload == "send":
        upload.read_key()


def choose_source(
    settings: ShareSettings, store: "ActivationStore", kind: str, n_latents: int
) -> Source | None:
    """Where the features belong on Neuronpedia, by the settings or made up; None: nothing is asked.

    Raises:
        InputError: The layer in NEURONPEDIA_SOURCE is another one, or no name can be made up.
    """
    if not (settings.export or settings.upload):
        return None
    made_up = f"{model_id(store.model_name)}/{store.layer}-{default_set(kind, n_latents)}"
    name = settings.neuronpedia_source or made_up
    model, layer, set_name = parse_source(name)
    require(
        layer == store.layer,
        f"NEURONPEDIA_SOURCE must be of layer {store.layer}, as the features are; it is {name}.",
    )
    return Source(
        model, layer, set_name, public_name(store.model_name, "model_name"),
        public_name(store.dataset, "dataset"),
        len(store.sample(settings.n_tokens)), store.context_length,
    )  # fmt: skip


def share(settings: ShareSettings, folder: Path, source: Source | None) -> None:
    """Write and send what the settings ask for of the finished analysis in ``folder``."""
    if source is None:
        return
    catalogue = Catalogue(folder)
    if "promoted_values" not in catalogue.features:
        print(
            "Promoted tokens are left out, for this analysis is of an earlier version, which kept "
            "no values of theirs. To add them, delete study-places.json and browser/index.html in "
            f"{folder}, and run the same command."
        )
    files = (folder / name for name in (FEATURES_FILE, EXAMPLES_FILE, TOKEN_TEXTS_FILE))
    analysis = fingerprint(*files)
    if settings.upload == "preview":
        place = _place(settings, "upload", source)
        upload.preview(catalogue, source, place, upload.read_address())
    asked = (*dict.fromkeys(settings.export), *(["upload"] if settings.upload == "send" else []))
    for what in asked:
        facts = {"script": settings.script, "for": what, "source": f"{source.model}/{source.id}"}
        record = RunRecord(facts if what == "upload" else {**facts, "analysis": analysis})
        place = _place(settings, what, source)
        with open_stage(place, record, OUTPUTS[what], settings.overwrite):
            n_bytes = BYTES_PER_FEATURE[what] * len(catalogue.features)
            require_disk_space(place, n_bytes, OUTPUTS[what])
            if what == "neuronpedia":
                changed = (folder / FEATURES_FILE).stat().st_mtime
                made = datetime.datetime.fromtimestamp(changed, datetime.UTC)
                made = made.isoformat(timespec="milliseconds").replace("+00:00", "Z")
                neuronpedia.write(place, catalogue, source, _count_layers(catalogue), made)
            elif what == "saedashboard":
                saedashboard.write(place, catalogue, source)
            else:
                _send(catalogue, source, place, analysis)
        if what != "upload":
            print(f"Exported: {place}")


def _place(settings: ShareSettings, what: str, source: Source) -> Path:
    return Path(settings.export_dir) / what / source.model / source.id


def _send(catalogue: Catalogue, source: Source, folder: Path, analysis: str) -> None:
    client = upload.Client(upload.read_address(), upload.read_key())
    summary = catalogue.summary
    description = f"{summary['kind']}, {summary['n_latents']:,} latents, output of the block"
    client.make_source(source, description, lambda: _count_layers(catalogue))
    upload.upload(catalogue, source, folder, analysis, client)
    print(f"Sent: {client.address}/{source.model}/{source.id}")


def _count_layers(catalogue: Catalogue) -> int:
    """How many blocks the model of an analysis has."""
    from utils.language_model import read_config

    config = read_config(catalogue.summary["model_name"], catalogue.summary["layer"])
    return config.get_text_config().num_hidden_layers
