"""Arithmetic with the few latents a row uses: choosing them, and products with their rows alone.

Shapes: queries (batch, d_model), rows (n_latents, d_model), indices (batch, m). `ChosenLatents`
holds which latents each row of a batch uses, with a value for each of these choices. Its two
products are each other's gradient:

    dot   out[p] = queries[b] · rows[i]        for each choice p of latent i for row b
    sum   out[b] = Σ values[p] rows[i]         over the choices for row b

so that three primitives (dot, sum, and sum over the choices of a latent, which is the gradient of
the rows) make both products and all their gradients. On PyTorch they are sparse products and
embedding-bag kernels that never store a gathered (batch, m, d_model); elsewhere they gather at most
``GATHERED`` numbers at a time. No tensor of shape (batch, n_latents) is kept for the gradient.
"""

import warnings

import keras
from keras import ops

from utils.autoencoder.devices import (
    add_up,
    first_local_latent,
    join_columns,
    local_places,
    per_device,
)
from utils.backend import cpu_computes_bfloat16

CHUNK_ROWS = 512  # rows whose pre-activations are held at once on a CPU: they stay in its cache
CHUNK_VALUES = 2**27  # and on an accelerator: as many rows as have so many pre-activations,
LEAST_ROWS = 1_024  # or so many, for W_enc is read anew for each chunk
GATHERED = 2**26  # numbers gathered at once where a backend has no kernel that avoids it
GROUP = 8  # latents whose maximum stands for them while the largest are sought
CANDIDATES = 2  # that bfloat16 finds for each latent sought; it saves time where there are so many
SCARCE, MANY_ROWS = 128, 256  # latents for each that is sought, and rows, for which W_enc is cast
FEW = 2  # latents for each choice of a batch, from which on only the chosen rows have a gradient


def pre_activations(x, rows, biases, dtype="float32"):
    """x · rowsᵀ + biases, shape (batch, n_latents), computed in ``dtype``."""
    product = ops.matmul(ops.cast(x, dtype), ops.transpose(ops.cast(rows, dtype)))
    return product + ops.cast(biases, dtype)


def constant(value, dtype="float32"):
    """A scalar made on the device; the host would wait while one of its own is brought there."""
    return ops.ones((), dtype) * value


if keras.backend.backend() == "torch":
    import torch

    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
    torch.sparse.check_sparse_tensor_invariants.disable()  # they would be read from the device

    def card_lacks_bfloat16() -> bool:
        """Whether there is a graphics card that does not compute in bfloat16."""
        return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(
            including_emulation=False
        )

    def fastest_dtype() -> str:
        """The precision in which this machine multiplies matrices fastest, of float32, bfloat16."""
        fast = not card_lacks_bfloat16() if torch.cuda.is_available() else cpu_computes_bfloat16()
        return "bfloat16" if fast else "float32"

    def _is_on_cpu(tensor):
        return tensor.device.type == "cpu"

    def chunk_rows(n_latents: int) -> int:
        """Rows whose pre-activations are held at once while the largest are sought."""
        if _is_on_cpu(ops.zeros(())):
            return CHUNK_ROWS
        return max(LEAST_ROWS, CHUNK_VALUES // n_latents)

    @torch.no_grad()
    def top_latents(x, rows, biases, k, dtype="float32"):
        """The k largest pre-activations of each row of x, in any order, and whose they are.

        Rows are taken in chunks, so that no (batch, n_latents) exists. Nothing is differentiated.

        Returns:
            Values float32 and latent numbers int32, both (batch, k).
        """
        dtype = getattr(torch, dtype)
        x, biases = x.to(dtype), ops.convert_to_tensor(biases).to(dtype)
        columns = ops.convert_to_tensor(rows).to(dtype).T
        chunks = x.split(chunk_rows(len(biases)))
        chunks = [_largest(torch.addmm(biases, chunk, columns), k) for chunk in chunks]
        values, indices = zip(*chunks, strict=True)
        return torch.cat(values).float(), torch.cat(indices).int()

    @torch.no_grad()
    def exact_top_latents(x, rows, biases, k):
        """`top_latents` in float32; by way of bfloat16 where that is faster.

        That finds `CANDIDATES` times as many, among which float32 chooses. Those not found were
        less than all that were, by bfloat16. Where that was wrong by up to e among those found, and
        the k-th value is not above the least of them by 2 e, the row is done in float32 alone.
        """
        is_slower = fastest_dtype() == "float32" or len(x) < MANY_ROWS
        if is_slower or SCARCE * k > biases.shape[0]:
            return top_latents(x, rows, biases, k)
        found, indices = top_latents(x, rows, biases, CANDIDATES * k, "bfloat16")
        exact = exact_values(x, indices, rows, biases)
        values, places = exact.topk(k, sorted=False)
        indices = indices.gather(1, places)
        wrong = (exact - found).abs().amax(1)
        unsure = ~(values.amin(1) > found.amin(1) + 2 * wrong)  # of NaN too
        if unsure.any():
            values[unsure], indices[unsure] = top_latents(x[unsure], rows, biases, k)
        return values, indices

    def _largest(values, k):
        """`torch.topk` along rows, exactly, but looking first at the maxima of groups.

        No more than k groups can hold the k largest: those with the k largest maxima.
        """
        n = values.shape[1]
        if n % GROUP or n < 4 * GROUP * k:
            return _topk(values, k)
        grouped = values.view(len(values), GROUP, n // GROUP)
        groups = _largest(grouped.amax(1), k)[1]
        candidates = grouped.gather(2, groups[:, None].expand(-1, GROUP, -1))
        largest, at = _topk(candidates.flatten(1), k)
        return largest, groups.gather(1, at % k) + at // k * (n // GROUP)

    def _topk(values, k):
        """`torch.topk` along rows, in any order; on a CPU by integers, which compare faster."""
        if not _is_on_cpu(values):
            return values.topk(k, sorted=False)
        keys = values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32)
        limits = torch.iinfo(keys.dtype)
        # Of negative numbers the larger bits are the smaller number.
        ordered = keys ^ ((keys >> (limits.bits - 1)) & limits.max)
        indices = ordered.topk(k, sorted=False).indices
        return values.gather(1, indices), indices

    class ChosenLatents:
        """Latents chosen for the rows of a batch; their values have shape (number of choices,).

        Args:
            indices: Latent numbers, int32, shape (batch, m).
            n_latents: Size of the dictionary.
            kept: Which of them are chosen, bool (batch, m); all of them if None.
            n_kept: The most that are; their number is then known without asking the device, and
                where they are fewer, some that are not kept count as chosen.
        """

        def __init__(self, indices, n_latents, kept=None, n_kept=None):
            batch, m = indices.shape
            self.n_latents, self.batch = n_latents, batch
            options = {"dtype": torch.int32, "device": indices.device}
            if kept is None:
                self.places = None
                self.starts = torch.arange(0, batch * m + 1, m, **options)
                self.row = torch.arange(batch, **options).repeat_interleave(m)
            else:
                self.places = _places(kept.reshape(-1), n_kept)
                self.row = (self.places // m).int()
                edges = torch.arange(batch + 1, **options)
                self.starts = torch.searchsorted(self.row, edges, out_int32=True)
            self.latent = self.of(indices)
            # Where there are many more latents than choices, most rows' gradients are zero.
            self.is_few = FEW * len(self.latent) <= n_latents
            self._by_latent = None

        def take(self, biases):
            """The bias of each choice."""
            return ops.convert_to_tensor(biases).index_select(0, self.latent)

        def of(self, values):
            """Of values (batch, m), those that are chosen."""
            values = values.reshape(-1)
            return values if self.places is None else values[self.places]

        def dot(self, queries, rows, known=None):
            """The product of each choice's query and row; not computed again where it is known."""
            return _Dot.apply(queries, ops.convert_to_tensor(rows), self, known)

        def sum(self, values, rows):
            """The weighted sum of the rows chosen for each query, shape (batch, d_model)."""
            return _Sum.apply(values, ops.convert_to_tensor(rows), self)

        def is_active(self, values):
            """Whether a latent has a positive value in some row, bool (n_latents,)."""
            counts = torch.zeros(self.n_latents, dtype=torch.int32, device=values.device)
            return counts.index_add_(0, self.latent, (values > 0).int()) > 0

        def dense(self, values):
            """The values in a (batch, n_latents) of zeros."""
            dense = values.new_zeros(self.batch, self.n_latents)
            dense[self.row, self.latent] = values
            return dense

        def positive(self, values):
            """Row, latent and value where the value is positive, as tensors."""
            positive = values > 0
            return self.row[positive], self.latent[positive], values[positive]

        def by_latent(self):
            """Choices in order of latent, their rows, where each latent's begin; made once.

            Where they are few, only of latents that are chosen, whose numbers come last: as many
            as there may be, so that the device need not be asked. Latents that fill up have no
            choices here; their numbers are any.
            """
            if self._by_latent is None:
                latent, order = self.latent.sort()
                numbers, slot, n_slots = None, latent, self.n_latents
                if self.is_few:
                    n_slots = min(len(latent), self.n_latents)
                    is_new = torch.ones_like(latent)
                    is_new[1:] = latent[1:] != latent[:-1]
                    slot = is_new.cumsum(0) - 1
                    numbers = torch.arange(n_slots, device=latent.device)
                    numbers.scatter_(0, slot, latent.long())
                edges = torch.arange(n_slots + 1, dtype=slot.dtype, device=slot.device)
                starts = torch.searchsorted(slot, edges, out_int32=True)
                self._by_latent = order, self.row[order], starts, numbers
            return self._by_latent

    def _places(kept, n_kept):
        """Where a flat mask is true; on an accelerator ``n_kept`` places, without asking it."""
        if n_kept is None or _is_on_cpu(kept):
            return kept.nonzero().squeeze(1)
        return (~kept).byte().sort(stable=True).indices[:n_kept].sort().values

    def _dot(queries, rows, chosen):
        # The gradient of an embedding bag's weights is just this product, without the gather.
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            queries, rows, chosen.latent, chosen.starts[:-1], chosen.row, mode=0
        )

    def _sum(values, rows, chosen):
        return _weighted_sums(values, chosen.latent, chosen.starts, rows)

    def _sum_by_latent(values, queries, chosen):
        """The gradient of the rows; a sparse tensor where the choices are few."""
        order, row, starts, numbers = chosen.by_latent()
        sums = _weighted_sums(values[order], row, starts, queries)
        if numbers is None:
            return sums
        shape = (chosen.n_latents, queries.shape[1])
        return torch.sparse_coo_tensor(numbers[None], sums, shape, check_invariants=False)

    def _weighted_sums(weights, numbers, starts, rows):
        """For each of ``starts``, the sum of the rows that are numbered from there to the next."""
        if not _is_on_cpu(rows):  # a third of the time on an H100; on a CPU two to three times it
            shape = (len(starts) - 1, len(rows))
            return torch.sparse_csr_tensor(starts, numbers, weights, shape) @ rows
        return torch.nn.functional.embedding_bag(
            numbers, rows, starts, mode="sum",
            per_sample_weights=weights, include_last_offset=True,
        )  # fmt: skip

    class _Dot(torch.autograd.Function):
        @staticmethod
        def forward(ctx, queries, rows, chosen, known):
            ctx.save_for_backward(queries, rows)
            ctx.chosen = chosen
            return _dot(queries, rows, chosen) if known is None else known.clone()

        @staticmethod
        def backward(ctx, grad):
            queries, rows = ctx.saved_tensors
            needs_queries, needs_rows, *_ = ctx.needs_input_grad
            return (
                _sum(grad, rows, ctx.chosen) if needs_queries else None,
                _sum_by_latent(grad, queries, ctx.chosen) if needs_rows else None,
                None,
                None,
            )

    class _Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values, rows, chosen):
            ctx.save_for_backward(values, rows)
            ctx.chosen = chosen
            return _sum(values, rows, chosen)

        @staticmethod
        def backward(ctx, grad):
            values, rows = ctx.saved_tensors
            needs_values, needs_rows, _ = ctx.needs_input_grad
            grad = grad.contiguous()
            return (
                _dot(grad, rows, ctx.chosen) if needs_values else None,
                _sum_by_latent(values, grad, ctx.chosen) if needs_rows else None,
                None,
            )

else:

    def card_lacks_bfloat16() -> bool:
        """Whether PyTorch would be slow in bfloat16; other frameworks choose by themselves."""
        return False

    def fastest_dtype() -> str:
        """The precision in which this machine multiplies matrices fastest, of float32, bfloat16."""
        # XLA and TensorFlow are slower in bfloat16 on CPUs, even those that compute in it.
        on_cpu = keras.distribution.list_devices()[0].startswith("cpu")
        return "float32" if on_cpu else "bfloat16"

    def top_latents(x, rows, biases, k, dtype="float32"):
        """The k largest pre-activations of each row of x, in any order, and whose they are.

        Nothing is differentiated.

        Returns:
            Values float32 and latent numbers int32, both (batch, k).
        """
        x, rows, biases = (ops.stop_gradient(ops.convert_to_tensor(v)) for v in (x, rows, biases))

        def find(x, rows, biases):
            # Cast back, for XLA on a CPU seeks the largest of bfloat16 a hundred times slower.
            products = ops.cast(pre_activations(x, rows, biases, dtype), "float32")
            n_local = rows.shape[0]
            values, indices = ops.top_k(products, min(k, n_local), sorted=False)
            indices = join_columns(ops.cast(indices, "int32") + first_local_latent(n_local))
            values = join_columns(values)
            if values.shape[1] == k:
                return values, indices
            values, places = ops.top_k(values, k, sorted=False)
            return values, ops.take_along_axis(indices, places, axis=1)

        return per_device(find, ("batch", "latents", "latents"), x, rows, biases)

    exact_top_latents = top_latents

    class ChosenLatents:
        """Latents chosen for the rows of a batch; their values have shape (batch, m).

        Args:
            indices: Latent numbers, int32, shape (batch, m).
            n_latents: Size of the dictionary.
            kept: Which of them are chosen, bool (batch, m); all of them if None. The values of the
                others are zero.
            n_kept: Not needed here.
        """

        def __init__(self, indices, n_latents, kept=None, n_kept=None):
            self.latent, self.n_latents = indices, n_latents
            self.kept = None if kept is None else ops.cast(kept, "float32")

        def take(self, biases):
            """The bias of each choice."""
            return self._masked(take_rows(biases, self.latent))

        def of(self, values):
            """Of values (batch, m), those that are chosen."""
            return self._masked(values)

        def dot(self, queries, rows, known=None):
            """The product of each choice's query and row; not computed again where it is known."""

            @ops.custom_gradient
            def product(queries, rows):
                def gradient(*grads, upstream=None):
                    grad = grads[0] if upstream is None else upstream
                    return _sum(grad, rows, self), _sum_by_latent(grad, queries, self)

                return _dot(queries, rows, self) if known is None else known, gradient

            return self._masked(product(queries, _tensor(rows)))

        def sum(self, values, rows):
            """The weighted sum of the rows chosen for each query, shape (batch, d_model)."""

            @ops.custom_gradient
            def product(values, rows):
                def gradient(*grads, upstream=None):
                    grad = grads[0] if upstream is None else upstream
                    return _dot(grad, rows, self), _sum_by_latent(values, grad, self)

                return _sum(values, rows, self), gradient

            return product(self._masked(values), _tensor(rows))

        def is_active(self, values):
            """Whether a latent has a positive value in some row, bool (n_latents,)."""
            positive = ops.cast(ops.reshape(values, (-1,)) > 0, "int32")
            latent = ops.reshape(self.latent, (-1,))
            return ops.segment_sum(positive, latent, num_segments=self.n_latents) > 0

        def dense(self, values):
            """The values in a (batch, n_latents) of zeros."""
            batch = ops.shape(self.latent)[0]
            row = ops.broadcast_to(
                ops.arange(batch, dtype="int32")[:, None], ops.shape(self.latent)
            )
            places = ops.reshape(ops.stack([row, self.latent], axis=-1), (-1, 2))
            return ops.scatter(places, ops.reshape(values, (-1,)), (batch, self.n_latents))

        def positive(self, values):
            """Row, latent and value where the value is positive, as NumPy arrays."""
            values, latent = ops.convert_to_numpy(values), ops.convert_to_numpy(self.latent)
            row, place = (values > 0).nonzero()
            return row, latent[row, place], values[row, place]

        def _masked(self, values):
            return values if self.kept is None else values * self.kept

    def _parts(latent, d_model):
        """Slices of a row's choices, such that what is gathered for one has a bounded size."""
        batch, m = latent.shape
        width = m if batch is None else max(1, min(m, GATHERED // (batch * d_model)))
        return [slice(start, start + width) for start in range(0, m, width)]

    def _dot(queries, rows, chosen):
        def dot(queries, rows, latent):
            places, is_local = local_places(latent, rows.shape[0])
            parts = [
                ops.einsum("bd,bjd->bj", queries, ops.take(rows, places[:, part], axis=0))
                for part in _parts(latent, rows.shape[1])
            ]
            return add_up(ops.concatenate(parts, axis=1) * is_local)

        return per_device(dot, ("batch", "latents", "batch"), queries, rows, chosen.latent)

    def _sum(values, rows, chosen):
        def weighted_sum(values, rows, latent):
            places, is_local = local_places(latent, rows.shape[0])
            values = values * is_local
            parts = [
                ops.einsum("bj,bjd->bd", values[:, p], ops.take(rows, places[:, p], axis=0))
                for p in _parts(latent, rows.shape[1])
            ]
            return add_up(sum(parts))

        return per_device(weighted_sum, ("batch", "latents", "batch"), values, rows, chosen.latent)

    def _sum_by_latent(values, queries, chosen):
        d_model = queries.shape[1]
        return sum(
            ops.segment_sum(
                ops.reshape(values[:, part, None] * queries[:, None], (-1, d_model)),
                ops.reshape(chosen.latent[:, part], (-1,)),
                num_segments=chosen.n_latents,
            )
            for part in _parts(chosen.latent, d_model)
        )


if keras.backend.backend() == "tensorflow":
    import tensorflow

    _tensor = tensorflow.convert_to_tensor  # reads a variable, as `keras.ops` does not

    @tensorflow.custom_gradient
    def _with_dense_gradient(rows):
        return tensorflow.identity(rows), tensorflow.convert_to_tensor

    def take_rows(rows, indices):
        """Rows by number. A row's gradient is the sum over the places where it was taken.

        TensorFlow leaves it as one slice for each place, and Keras' optimizers square the slices
        one by one: gradient norms and Adam's second moments come out wrong.
        """
        return ops.take(_with_dense_gradient(_tensor(rows)), indices, axis=0)

    def values_at(array, places):
        """Entries of an array at places (one index array for each axis, as of `ops.nonzero`)."""
        return tensorflow.gather_nd(array, tensorflow.stack(places, axis=-1))

else:
    _tensor = ops.convert_to_tensor

    def take_rows(rows, indices):
        """Rows by number."""
        if keras.backend.backend() == "torch" and len(rows.shape) == 2:
            # Their gradient is of these rows alone, and is added to that of all in place.
            return torch.nn.functional.embedding(indices, _tensor(rows), sparse=True)
        return ops.take(rows, indices, axis=0)

    def values_at(array, places):
        """Entries of an array at places (one index array for each axis, as of `ops.nonzero`)."""
        return array[tuple(places)]


def exact_values(x, indices, rows, biases):
    """Pre-activations of some latents of each row in float32, (batch, m), not differentiated."""
    x, rows, biases = map(ops.stop_gradient, map(ops.convert_to_tensor, (x, rows, biases)))
    chosen = ChosenLatents(indices, ops.shape(biases)[0])
    return ops.reshape(chosen.dot(x, rows) + chosen.take(biases), ops.shape(indices))
