"""The activations that another tool's autoencoder is for, as save_activations.py's settings."""

import dataclasses

from utils.autoencoder.formats.importing import find, is_same_model
from utils.autoencoder.formats.source import Source
from utils.settings import InputError, Settings, require

TAKEN = ("model_name", "layer", "context_length")


def for_autoencoder(settings: Settings) -> Settings:
    """The settings with what ``FOR_AUTOENCODER`` says of its model, layer and context length.

    What it does not say stays as it is set. Contexts begin with BOS in any case, which is left out.

    Raises:
        InputError: It cannot be read, or a setting was given that contradicts it.
    """
    try:
        origin = find(Source(settings.for_autoencoder), settings.hookpoint).origin
    except InputError as error:
        raise InputError(str(error).replace("IMPORT_FROM", "FOR_AUTOENCODER")) from None
    defaults, taken = type(settings)(), {}
    for name in TAKEN:
        said, given = getattr(origin, name), getattr(settings, name)
        is_same = is_same_model(said, given) if said and name == "model_name" else said == given
        if said is None or is_same:
            continue
        require(
            given == getattr(defaults, name),
            f"{name.upper()} must be that of the autoencoder {origin.hookpoint} of "
            f"{settings.for_autoencoder}, {said}; it is {given}. Leave out one of the two.",
        )
        taken[name] = said
    settings = dataclasses.replace(settings, **taken)
    words = ", ".join(f"{name.upper()} {getattr(settings, name)}" for name in TAKEN)
    print(f"For {origin.hookpoint} of {settings.for_autoencoder}: {words}.")
    if origin.prepends_bos is False:
        print("It was trained on contexts without BOS; here they begin with it, as all do.")
    return settings
