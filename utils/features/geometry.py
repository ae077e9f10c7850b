"""Geometry of directions: the nearest by cosine, and a map."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from utils.language_model import pick_device

PAIRS_TOGETHER = 2**26  # cosines in memory on a card: 256 MiB
PAIRS_IN_CACHE = 2**20  # on a CPU, which takes three times as long from its memory
COLUMNS_IN_CACHE = 2**15  # of these, directions
GROUP = 64  # cosines of which only the maximum is looked at first
MOST_MAPPED = 65_536  # features on a map; a larger one takes an hour and shows no more


def nearest(directions: np.ndarray, queries: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``n`` directions of highest cosine to each query, a block of pairs at a time.

    Args:
        directions: Shape (n_directions, d_model), of any dictionary.
        queries: Shape (n_queries, d_model), of the same model and layer.
        n: Neighbours of each; all directions if there are fewer.

    Returns:
        Indices into ``directions`` and cosines, both (n_queries, n), the nearest first.
    """
    device = pick_device()
    rows, queries = (
        torch.nn.functional.normalize(torch.from_numpy(np.array(values, np.float32)))
        for values in (directions, queries)
    )
    rows, shape = rows.to(device), (len(queries), min(n, len(rows)))
    indices, cosines = np.empty(shape, np.int64), np.empty(shape, np.float32)
    on_cpu = device.type == "cpu"
    tiles = rows.split(COLUMNS_IN_CACHE) if on_cpu else (rows,)
    per_block = (PAIRS_IN_CACHE if on_cpu else PAIRS_TOGETHER) // max(1, len(tiles[0]))
    blocks = [slice(i, i + max(1, per_block)) for i in range(0, len(queries), max(1, per_block))]

    def find(block: slice) -> int:
        found = [_largest(queries[block].to(device) @ tile.T, n) for tile in tiles]
        at = torch.cat([at + i * len(tiles[0]) for i, (_, at) in enumerate(found)], 1)
        best = torch.cat([values for values, _ in found], 1).topk(shape[1])
        indices[block], cosines[block] = at.gather(1, best.indices).cpu(), best.values.cpu()
        return len(at)

    with tqdm(total=len(queries), desc="neighbours", unit="feature", unit_scale=True) as progress:
        for n_found in _one_core_each(find, blocks) if on_cpu else map(find, blocks):
            progress.update(n_found)
    return indices, cosines


def _one_core_each(work: Callable[[slice], int], blocks: list[slice]) -> Iterator[int]:
    """Results of pieces of work, each done by one thread of several.

    PyTorch's own threads wait for one another at each of many small steps, which takes twenty times
    as long where a core is busy with something else.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            yield from pool.map(work, blocks)
    finally:
        torch.set_num_threads(n_threads)


def _largest(values: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``n`` largest of each row and their columns; all if there are fewer.

    No more than n groups can hold the n largest: those with the n largest maxima.
    """
    n_groups = values.shape[1] // GROUP
    if n_groups < 4 * n:
        return values.topk(min(n, values.shape[1]))
    grouped = values[:, : GROUP * n_groups].unflatten(1, (GROUP, n_groups))
    groups = grouped.amax(1).topk(n).indices
    columns = groups[:, None] + n_groups * torch.arange(GROUP, device=values.device)[:, None]
    rest = torch.arange(GROUP * n_groups, values.shape[1], device=values.device)
    columns = torch.cat([columns.flatten(1), rest.expand(len(values), -1)], 1)
    largest = values.gather(1, columns).topk(n)
    return largest.values, columns.gather(1, largest.indices)


def map_directions(
    directions: np.ndarray, alive: np.ndarray, seed: int, wanted: bool = True
) -> np.ndarray:
    """UMAP of the decoder rows of living features, by cosine, shape (n_latents, 2).

    NaN for dead features, for those that are left out where more than `MOST_MAPPED` are alive, and
    for all if no map is ``wanted`` or too few are alive.
    """
    places = np.full((len(directions), 2), np.nan)
    mapped = np.flatnonzero(alive)
    if wanted and len(mapped) > 3:
        import umap  # compiles for seconds when imported

        sample = ""
        if len(mapped) > MOST_MAPPED:
            sample = f" of {len(mapped):,}, drawn at random,"
            mapped = np.sort(np.random.default_rng(seed).permutation(mapped)[:MOST_MAPPED])
        print(f"Mapping {len(mapped):,} features{sample} with UMAP.")
        settings = {"metric": "cosine", "min_dist": 0.05, "random_state": seed, "n_jobs": 1}
        reducer = umap.UMAP(n_neighbors=min(15, len(mapped) - 1), **settings)
        places[mapped] = reducer.fit_transform(directions[mapped])
    return places
