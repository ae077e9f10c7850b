"""The paper's studies of features, a file each, in the paper's order.

places           always: tokens that directions promote, their neighbours, a map of them
cross_entropy    always: the model's loss with the reconstruction
specificity      does a feature's concept fit the text where the feature is active?
completeness     which words have a feature, and how frequent are they?
neurons          is a feature merely a neuron?
explanations     does a phrase tell what a feature fires on, better than a neuron's does?
outputs          does a feature write what it reads, and so is good to steer with?
splitting        what does a feature of a small dictionary become in larger ones?
directions       does changing a feature change the predictions more than other changes?

A study is a module with its equation in the docstring, ``study(analysis)``, which returns its
`Findings`, and ``draw(catalogue)``, which draws the finished study and returns the files of its
pictures by caption. To add one, write its file and add its name to `CHOICES`.
"""

import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Literal

# By study, the settings that it depends on besides those of the pass over the activations.
ALWAYS = {"places": ("map_features",), "cross_entropy": ("n_loss_tokens",)}
CHOICES = {
    "specificity": ("n_studied", "judge"),
    "completeness": ("other_autoencoders",),
    "neurons": ("n_studied", "n_neuron_tokens"),
    "explanations": ("n_explained", "n_neuron_tokens", "judge"),
    "outputs": (),
    "splitting": ("other_autoencoders", "map_features"),
    "directions": (),
}
SETTINGS = ALWAYS | CHOICES
NAMES = tuple(CHOICES)
Name = Literal[*NAMES]


def in_order(chosen: Iterable[str]) -> list[str]:
    """The studies that are made always and the chosen ones, in the paper's order."""
    chosen = set(chosen)
    return [*ALWAYS, *(name for name in NAMES if name in chosen)]


def load(name: str) -> ModuleType:
    """The module of a study, imported when it is needed: some load a framework."""
    return importlib.import_module(f"{__name__}.{name}")
