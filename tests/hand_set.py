"""An autoencoder of two latents whose every weight is set, so that answers are known."""

import numpy as np
from keras import ops

from utils.autoencoder.autoencoder import SparseAutoencoder
from utils.autoencoder.kinds import KINDS

# Of `hand_set`: x = [[2, 3], [-1, 4]], and the pre-activations are [[2, 2.5], [-1, 3.5]].
ACTIVATIONS = np.array([[4.0, 6.0], [-2.0, 8.0]], np.float32)


def hand_set(kind: str, **options) -> SparseAutoencoder:
    """Two latents of width two, with every weight and the scale in its place."""
    made = KINDS[kind](d_model=2, n_latents=2, **options)
    made.W_enc.assign([[1.0, 0.0], [0.0, 1.0]])
    made.b_enc.assign([0.0, -0.5])
    made.W_dec.assign([[2.0, 0.0], [0.0, 0.5]])
    made.b_dec.assign([0.5, 0.0])
    made.scale.assign(0.5)
    if kind == "gated":
        made.r_mag.assign([np.log(2.0), 0.0])
        made.b_mag.assign([3.0, -3.0])
    if kind == "jumprelu":
        made.log_threshold.assign(np.log([1.1, 3.4]))
    return made


def array(values) -> np.ndarray:
    return ops.convert_to_numpy(values)
