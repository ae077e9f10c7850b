"""This project's own: a folder that train_autoencoder.py wrote, as ``PUSH_TO_HUB`` uploads it.

``autoencoder.keras`` holds the kind, its options and its weights; ``metrics.json`` the rest.
"""

import json
import zipfile

import numpy as np

from utils.artifacts import AUTOENCODER_FILE, METRICS_FILE, reading
from utils.autoencoder.formats.folded import as_array
from utils.autoencoder.formats.imported import Imported, Origin
from utils.autoencoder.formats.source import Source, entry
from utils.autoencoder.kinds import find_kind
from utils.settings import require

HOOKPOINT = "autoencoder.keras"  # the only one: a folder holds one autoencoder
COUNTERS = ("step", "idle_tokens")  # of its training, which an import leaves behind


def hookpoints(source: Source) -> list[str]:
    return [HOOKPOINT] if {AUTOENCODER_FILE, METRICS_FILE} <= set(source.files) else []


def read(source: Source, hookpoint: str) -> Imported:
    """The autoencoder of a folder or repository of ours.

    Only its kind and the kind's options are taken from its configuration: Keras, given the whole,
    would make whatever objects it names.

    Raises:
        InputError: A file is damaged, or not of this project.
    """
    metrics = source.json(METRICS_FILE)
    with reading(source.path(AUTOENCODER_FILE), f"Get it from {source.name} anew.") as path:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
        package, _, kind = str(config["registered_name"]).partition(">")
        require(
            package == "scaling_monosemanticity",
            f"{AUTOENCODER_FILE} of {source.name} must hold an autoencoder of this project; it "
            f"holds a {config['registered_name']}.",
        )
        cls = find_kind(kind)
        names = (*cls.options(), *cls.not_trained)
        options = {name: config["config"][name] for name in names if name in config["config"]}
        made = cls(**options)
        made.load_weights(path)
    weights = {w.name: as_array(w) for w in made.weights if w.name not in COUNTERS}
    require(
        all(np.isfinite(values).all() for values in weights.values()),
        f"{AUTOENCODER_FILE} of {source.name} must hold finite weights; some are not.",
    )
    origin = Origin(
        format="own",
        hookpoint=hookpoint,
        model_name=entry(metrics, METRICS_FILE, "model_name"),
        layer=entry(metrics, METRICS_FILE, "layer"),
        context_length=metrics.get("context_length"),
        prepends_bos=True,
        l0=entry(metrics, METRICS_FILE, "l0"),
        fvu=entry(metrics, METRICS_FILE, "fvu"),
        dead_fraction=metrics.get("dead_fraction"),
    )
    del options["d_model"], options["n_latents"]
    return Imported(kind, options, weights, origin)
