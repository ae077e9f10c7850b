"""Training on several devices, which Keras can do on JAX only.

The devices form a mesh of two axes, "batch" and "latents". DISTRIBUTION ``data`` has all of them
along the first: each holds all weights and takes a share of each batch. ``model`` has all of them
along the second: each holds a share of the latents, their moments too, and sees whole batches; this
is for dictionaries too large for one. Either trains what one device would, but for rounding.

A weight is split by its shape: where the first axis is the latents, each device has a share.
"""

from collections.abc import Iterable

import keras
from keras import ops

from utils.backend import Tensor
from utils.settings import require

if keras.backend.backend() == "jax":
    import jax


class SplitByLatents(keras.distribution.ModelParallel):
    """Splits the weights whose first axis is the latents; all others are on every device.

    Moments lie as their weight does. A width that happens to be a number of latents is split too,
    which changes nothing but where it lies.

    Args:
        mesh: Of axes "batch" and "latents".
        n_latents: Sizes of the dictionaries to be trained.
    """

    def __init__(self, mesh: keras.distribution.DeviceMesh, n_latents: Iterable[int]):
        super().__init__(layout_map=keras.distribution.LayoutMap(mesh))
        self.n_latents = tuple(n_latents)

    def get_variable_layout(self, variable: keras.Variable) -> keras.distribution.TensorLayout:
        shape = variable.shape
        if not shape or shape[0] not in self.n_latents:
            return super().get_variable_layout(variable)
        axes = ("latents", *(None for _ in shape[1:]))
        return keras.distribution.TensorLayout(axes, self.device_mesh)


def use_devices(distribution: str | None, batch_size: int, n_latents: Iterable[int]) -> None:
    """Make Keras split what is built and trained from now on over all devices.

    Args:
        distribution: ``"data"``, ``"model"``, or None: one device.
        batch_size: Rows a batch.
        n_latents: Sizes of the dictionaries to be trained.

    Raises:
        InputError: The backend has no distribution, there is one device, or the batch or the
            dictionary cannot be split evenly.
    """
    if distribution is None:
        return
    backend = keras.backend.backend()
    require(
        backend == "jax",
        f"DISTRIBUTION needs BACKEND jax, the only one on which Keras has it; it is {backend}.",
    )
    devices = keras.distribution.list_devices()
    n = len(devices)
    require(n > 1, "DISTRIBUTION needs several devices, and JAX sees one. Leave it out.")
    sizes = {"data": ("BATCH_SIZE", (batch_size,)), "model": ("N_LATENTS", n_latents)}
    name, shared = sizes[distribution]
    for size in shared:
        require(
            size % n == 0,
            f"{name} must be a multiple of the {n} devices that share it; it is {size:,}.",
        )
    shape = (n, 1) if distribution == "data" else (1, n)
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "latents"), devices)
    keras.distribution.set_distribution(SplitByLatents(mesh, n_latents))


def n_shares() -> int:
    """Parts that a batch is split into; 1 where each device sees all of it."""
    distribution = keras.distribution.distribution()
    return distribution.num_model_replicas if distribution else 1


# XLA by itself would bring all pre-activations to each device to choose the largest, and sum
# gathered rows over devices before multiplying them. So each works on its share, as follows.


def per_device(function, axes: tuple[str, ...], *arguments):
    """Call a function with each device's share of its arguments; on one device, just call it.

    Args:
        function: What it returns has rows of the batch; it may use the functions below.
        axes: What the first axis of each argument is, "batch" or "latents".
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return function(*arguments)
    batch = arguments[axes.index("batch")].shape[0]
    even = batch % distribution.num_model_replicas == 0  # else each device takes all of it
    specs = {"batch": jax.P("batch" if even else None), "latents": jax.P("latents")}
    return jax.shard_map(
        function,
        mesh=distribution.device_mesh.backend_mesh,
        in_specs=tuple(specs[axis] for axis in axes),
        out_specs=specs["batch"],
        check_vma=False,
    )(*arguments)


def first_local_latent(n_local: int) -> Tensor:
    """Number of the first of the ``n_local`` latents that a device holds."""
    return jax.lax.axis_index("latents") * n_local if keras.distribution.distribution() else 0


def local_places(latent: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
    """Where latents are among the ``n_local`` that a device holds; 1 where it does, 0 elsewhere."""
    if keras.distribution.distribution() is None:
        return latent, 1.0
    place = latent - first_local_latent(n_local)
    is_local = (place >= 0) & (place < n_local)
    return ops.where(is_local, place, 0), ops.cast(is_local, "float32")


def join_columns(values):
    """The columns of all devices side by side, (batch, columns each) to (batch, columns)."""
    if keras.distribution.distribution() is None:
        return values
    return jax.lax.all_gather(values, "latents", axis=1, tiled=True)


def add_up(values):
    """The sum over the devices that share the latents."""
    return jax.lax.psum(values, "latents") if keras.distribution.distribution() else values
