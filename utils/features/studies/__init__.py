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
pictures by caption. To add one, write its file and add its name to `NAMES`.
"""

import importlib
from types import ModuleType
from typing import Literal

ALWAYS = ("places", "cross_entropy")
NAMES = (
    "specificity",
    "completeness",
    "neurons",
    "explanations",
    "outputs",
    "splitting",
    "directions",
)
Name = Literal[*NAMES]


def load(name: str) -> ModuleType:
    """The module of a study, imported when it is needed: some load a framework."""
    return importlib.import_module(f"{__name__}.{name}")
