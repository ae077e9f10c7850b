"""What a training will hold in memory on PyTorch, computed before it starts, and what would fit.

The numbers of arrays of a batch are those that were counted (tests/autoencoder/test_memory.py).
Allocators keep a few per cent more.
"""

import bisect
import dataclasses
import math

from utils.autoencoder import sparse
from utils.autoencoder.kinds import TopKAutoencoder, find_kind
from utils.autoencoder.sparse import fastest_dtype
from utils.backend import free_memory, torch_device
from utils.settings import InputError

BYTES = {"float32": 4, "bfloat16": 2}
CHOICE_BYTES = 20  # numbers, order and values of one
JAX_ARRAYS = 8  # as large as W_enc: both weights, their two moments, and gradients
CHUNK = 2**20  # latents of a row that are compared at once
H100_SECONDS = 0.048 / (65_536 * 4_096 * 3_072)  # JAX, a TopK's step at commit d597169
BLOCK_BYTES = 48  # of a number of a block: its copies, and random bits


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training: what is there throughout, and of what comes and goes the most.

    ``choosing``: a copy of W_enc, and pre-activations of some rows; ``reviving``: AuxK's, of dead
    latents; ``updating``: gradients. Each with what is there of the batch then. On a graphics card
    recordings of steps (`utils.autoencoder.recorded`) keep as much again as comes and goes, once
    without AuxK and once with it, where that is free.
    """

    weights: int
    moments: int
    pool: int
    choosing: int
    reviving: int
    updating: int

    @property
    def passing(self) -> int:
        """The most of what comes and goes."""
        return max(self.choosing, self.reviving, self.updating)

    @property
    def total(self) -> int:
        return self.weights + self.moments + self.pool + self.passing

    def __str__(self) -> str:
        sizes = {name: f"{size / 1e9:.2f}" for name, size in dataclasses.asdict(self).items()}
        return (
            f"{self.total / 1e9:.2f} GB: weights {sizes['weights']}, moments {sizes['moments']}, "
            f"pool {sizes['pool']}; and the most of choosing latents {sizes['choosing']}, reviving "
            f"dead ones {sizes['reviving']}, gradients and a batch {sizes['updating']}"
        )


def plan_memory(settings, d_model: int, pool_bytes: int = 0) -> MemoryPlan:
    """What the training that settings ask for (`training.TrainingSettings`) holds on PyTorch.

    Args:
        settings: Of train_autoencoder.py.
        d_model: Width of the residual stream.
        pool_bytes: Activations that are held on the device to be shuffled.
    """
    from utils.autoencoder.kernels import BLOCK_NUMBERS  # which needs PyTorch

    cls, n, batch = find_kind(settings.kind), settings.n_latents, settings.batch_size
    chooses = issubclass(cls, TopKAutoencoder)
    n_choices = batch * settings.k if chooses else 0
    is_few = chooses and sparse.FEW * n_choices <= n
    # Gradients of W_enc and W_dec, and a third: a sum with AuxK's, which are sparse, or on a card
    # the zeros that its product of sparse matrices begins with.
    n_rows, n_copies = min(n_choices, n) if is_few else n, 3 if chooses else 2
    # What plain PyTorch's own kernel does not take is worked on in blocks.
    per_number = BLOCK_BYTES if settings.moments_dtype != "float32" else 4 * is_few
    gradients = n_copies * 4 * n_rows * d_model + per_number * min(n * d_model, BLOCK_NUMBERS)
    prefixes = len(settings.prefixes) if settings.kind == "matryoshka" else 0
    of_batch = (cls.arrays_of_width + 2 * prefixes) * d_model + cls.arrays_of_latents * n
    of_batch = int(4 * batch * of_batch) + CHOICE_BYTES * n_choices
    # Four arrays of a batch and AuxK's candidates, of which there are 2 d_model.
    of_dead = 4 * 4 * batch * min(2 * d_model, n) if chooses and settings.auxk_coefficient else 0
    return MemoryPlan(
        weights=2 * 4 * n * d_model,
        moments=2 * 2 * BYTES[settings.moments_dtype] * n * d_model,
        pool=pool_bytes,
        choosing=_choosing(settings, d_model) if chooses else 0,
        reviving=of_dead + of_batch if of_dead else 0,
        updating=gradients + of_batch,
    )


def _choosing(settings, d_model: int) -> int:
    dtype = fastest_dtype() if settings.selection_dtype == "auto" else settings.selection_dtype
    n, size = settings.n_latents, BYTES[dtype]
    copy = size * n * d_model if dtype != "float32" else 0
    rows = min(settings.batch_size, sparse.chunk_rows(n))
    scores = size * rows * n * (sparse.GROUP + 1) // sparse.GROUP  # and maxima of groups
    return copy + scores + 2 * 4 * settings.batch_size * d_model  # raw and normalised


def require_memory(settings, d_model: int, pool_bytes: int = 0) -> str:
    """What a training will hold, in words; refused where the device has less to spare.

    Raises:
        InputError: It does not fit; names what would.
    """
    if torch_device() is None:
        return ""
    plan, free = plan_memory(settings, d_model, pool_bytes), free_memory(torch_device())
    if free is None or plan.total <= free:
        more = f" Recorded steps keep up to {2 * plan.passing / 1e9:.2f} GB more, if that is free."
        return f"\nMemory: {plan}.{more if torch_device() == 'cuda' else ''}"

    def fits(name: str, value: object) -> bool:
        changed = dataclasses.replace(settings, **{name: value})
        return plan_memory(changed, d_model, pool_bytes).total <= free

    def largest(name: str, step: int) -> int:
        multiples = range(step, getattr(settings, name), step)
        return step * bisect.bisect(multiples, False, key=lambda value: not fits(name, value))

    sizes = {"BATCH_SIZE": largest("batch_size", 64), "N_LATENTS": largest("n_latents", 1_024)}
    remedies = [f"{name} {size:,}" for name, size in sizes.items() if size]
    if settings.moments_dtype == "float32" and fits("moments_dtype", "bfloat16"):
        remedies.append("MOMENTS_DTYPE bfloat16")
    others = plan.total - plan.pool
    if plan.pool and others < free:  # the pool is there twice
        remedies.append(f"POOL_GIB {math.floor((free - others) / 2**31 * 100) / 100:g}")
    found = f"What would fit: {', or '.join(remedies)}." if remedies else "Nothing like it would."
    raise InputError(
        f"Training must fit into the {free / 1e9:.2f} GB that are free; it takes {plan}. {found} "
        f"{plan_devices(settings, d_model, free)}"
    )


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """A training whose latents are split over devices, which only JAX does.

    Attributes:
        n_devices: A power of 2.
        bytes_each: Weights, moments, gradients, and what there is of a batch, on each.
        bytes_moved: That each device sends in a step: sums of the reconstruction and of the
            gradient with respect to it, and candidates for the latents of each row.
        seconds: Of a step, without moving; as an H100's for its share of the latents.
    """

    n_devices: int
    bytes_each: int
    bytes_moved: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"Split by latents (BACKEND jax, DISTRIBUTION model) it would take {self.n_devices:,} "
            f"such devices, {self.bytes_each / 1e9:.1f} GB of each, and move "
            f"{self.bytes_moved / 1e6:,.0f} MB a step; H100s would need about "
            f"{self.seconds:.2g} s a step, computed and not run."
        )


def plan_devices(settings, d_model: int, free: int) -> DevicePlan | str:
    """The fewest devices, a power of 2, with ``free`` bytes each, that hold a dictionary.

    The step's time is `H100_SECONDS` for a latent, row and number of it, at which it was measured.
    """
    n, batch = settings.n_latents, settings.batch_size
    chosen = getattr(settings, "k", 0) or 0
    of_batch = 4 * batch * 8 * d_model
    for n_devices in (2**i for i in range(1, 16)):
        share = -(-n // n_devices)
        each = JAX_ARRAYS * 4 * share * d_model + 2 * batch * min(share, CHUNK) + of_batch
        if each <= free:
            moved = 2 * 2 * 4 * batch * d_model + 8 * batch * chosen * n_devices
            return DevicePlan(n_devices, each, moved, H100_SECONDS * share * batch * d_model)
    return "No number of such devices holds it: the batch alone does not fit."
