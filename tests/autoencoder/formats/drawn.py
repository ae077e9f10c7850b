"""What the tests of layouts draw: weights, and activations to run them on."""

import numpy as np

N, D, K = 40, 12, 5  # latents, width, and latents active for a row
Weights = dict[str, np.ndarray]
Answer = tuple[np.ndarray, np.ndarray]  # latents (rows, N) and reconstruction (rows, D)


def rows_of(draw: np.random.Generator) -> np.ndarray:
    """Raw activations, not centred, tokens of very different size."""
    return (draw.normal(size=(50, D)) * draw.uniform(0.5, 3, (50, 1)) + 0.5).astype(np.float32)


def drawn(draw: np.random.Generator, **shapes: tuple[int, ...]) -> Weights:
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def relu(values: np.ndarray) -> np.ndarray:
    return np.maximum(values, 0)
