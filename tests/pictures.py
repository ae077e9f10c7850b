"""What a picture shows, as far as its pixels tell."""

import matplotlib.image
import numpy as np


def drawn(path):
    """The picture, uint8 of shape (height, width, 3), after a check that it shows something."""
    picture = (255 * matplotlib.image.imread(path)[..., :3]).round().astype(np.uint8)
    assert min(picture.shape[:2]) >= 3 * 150
    assert (picture != 255).any(axis=-1).mean() > 0.005
    assert list(path.parent.iterdir()) == [path]  # nothing half-written stays behind
    return picture


def share_of(picture, colour):
    """The share of a picture's pixels that have a colour, "#rrggbb"."""
    return (picture == list(bytes.fromhex(colour[1:]))).all(axis=-1).mean()
