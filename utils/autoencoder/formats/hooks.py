"""Places in a language model, as other tools name them."""

import re

from utils.settings import InputError

TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
# The path of a block in a model of transformers or in its base model, as model.layers.15, without
# another number: layers.15.experts.0 is no block. Early versions of sparsify wrote layer_15.
BLOCK = re.compile(r"(?:[A-Za-z_]\w*\.)+(\d+)|layer_(\d+)")


def layer_of(name: str) -> tuple[int, tuple[str, ...]]:
    """The block whose output is at a place, counted from 0, and what should be known, in sentences.

    Raises:
        InputError: It is no block's output.
    """
    if match := TRANSFORMER_LENS.fullmatch(name):
        block, side = int(match[1]), match[2]
        if side == "post":
            return block, ()
        if block:
            return block - 1, (f"{name} is the output of block {block - 1}.",)
    elif match := BLOCK.fullmatch(name):
        return int(match[1] or match[2]), ()
    raise InputError(
        f"{name} is not the output of a decoder block, which is what this project reads. Take an "
        "autoencoder of blocks.N.hook_resid_post, model.layers.N or layers.N, with a number for N."
    )
