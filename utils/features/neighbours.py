"""Neighbours: the directions nearest to others by cosine, without the matrix of all pairs."""

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from utils.features.catalogue import N_NEIGHBOURS
from utils.language_model import pick_device

PAIRS_TOGETHER = 2**26  # cosines in memory: 256 MiB


@torch.inference_mode()
def nearest(directions: np.ndarray, queries: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``n`` directions of highest cosine to each query, a block of queries at a time.

    Args:
        directions: Shape (n_directions, d_model), of any dictionary.
        queries: Shape (n_queries, d_model), of the same model and layer.
        n: How many of each; all of them where there are fewer.

    Returns:
        Indices into ``directions`` and cosines, both (n_queries, n), the nearest first.
    """
    device = pick_device()
    rows, asked = (
        torch.nn.functional.normalize(torch.from_numpy(np.array(values, np.float32)))
        for values in (directions, queries)
    )
    rows = rows.to(device)
    n = min(n, len(rows))
    indices, cosines = np.empty((len(asked), n), np.int64), np.empty((len(asked), n), np.float32)
    per_block = max(1, PAIRS_TOGETHER // max(1, len(rows)))
    with tqdm(total=len(asked), desc="neighbours", unit="feature", unit_scale=True) as progress:
        for start in range(0, len(asked), per_block):
            block = slice(start, start + per_block)
            found = (asked[block].to(device) @ rows.T).topk(n)
            indices[block], cosines[block] = found.indices.cpu(), found.values.cpu()
            progress.update(len(found.indices))
    return indices, cosines


def neighbour_table(directions: np.ndarray, alive: np.ndarray) -> pd.DataFrame:
    """The `N_NEIGHBOURS` living features nearest to each living one, itself left out.

    Args:
        directions: Decoder rows, shape (n_latents, d_model).
        alive: Which features were active, shape (n_latents,).

    Returns:
        Columns ``neighbours``, lists of feature numbers, the nearest first, and
        ``neighbour_cosines``; empty lists for dead features.
    """
    numbers = np.flatnonzero(alive)
    indices, cosines = nearest(directions[numbers], directions[numbers], N_NEIGHBOURS + 1)
    table = pd.DataFrame(
        {name: [[] for _ in alive] for name in ("neighbours", "neighbour_cosines")}
    )
    for own, (found, values) in enumerate(zip(indices, cosines, strict=True)):
        others = np.flatnonzero(found != own)[:N_NEIGHBOURS]  # itself need not come first of equals
        table.at[numbers[own], "neighbours"] = numbers[found[others]].tolist()
        table.at[numbers[own], "neighbour_cosines"] = values[others].round(4).tolist()
    return table
