"""Products with few rows of a large matrix: the arithmetic of autoencoders with k active latents.

Shapes: queries (batch, d_model), values and indices (batch, k), rows (n_latents, d_model). The two
products are each other's gradient:

    gathered_dot   out[b, j] = queries[b] · rows[indices[b, j]]
    weighted_rows  out[b]    = Σ_j values[b, j] rows[indices[b, j]]

Everywhere they are gathers and sums that automatic differentiation sees through. On PyTorch, where
gathering (batch, k, d_model) costs more than all the rest of a step, they are embedding-bag kernels
that never store it, and the gradient of the rows is one product with a sparse CSR matrix.
"""

import warnings

import keras
from keras import ops

if keras.backend.backend() == "torch":
    import torch

    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")

    def gathered_dot(queries, rows, indices):
        """The dot product of each query with its rows, shape (batch, k)."""
        return _GatheredDot.apply(queries, ops.convert_to_tensor(rows), indices)

    def weighted_rows(values, rows, indices):
        """The sum of each query's rows, weighted, shape (batch, d_model)."""
        return _WeightedRows.apply(values, ops.convert_to_tensor(rows), indices)

    class _GatheredDot(torch.autograd.Function):
        @staticmethod
        def forward(ctx, queries, rows, indices):
            ctx.save_for_backward(queries, rows, indices)
            return _dot(queries, rows, indices)

        @staticmethod
        def backward(ctx, grad):
            queries, rows, indices = ctx.saved_tensors
            needs_queries, needs_rows, _ = ctx.needs_input_grad
            return (
                _sum(grad, rows, indices) if needs_queries else None,
                _scatter(grad, queries, indices, len(rows)) if needs_rows else None,
                None,
            )

    class _WeightedRows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values, rows, indices):
            ctx.save_for_backward(values, rows, indices)
            return _sum(values, rows, indices)

        @staticmethod
        def backward(ctx, grad):
            values, rows, indices = ctx.saved_tensors
            grad = grad.contiguous()
            return (
                _dot(grad, rows, indices),
                _scatter(values, grad, indices, len(rows)),
                None,
            )

    def _sum(values, rows, indices):
        return torch.nn.functional.embedding_bag(
            indices, rows, per_sample_weights=values, mode="sum"
        )

    def _dot(queries, rows, indices):
        # The gradient of an embedding bag's weights is just this product, without the gather.
        batch, k = indices.shape
        bags = torch.arange(batch, device=indices.device)
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            queries, rows, indices.reshape(-1), bags * k, bags.repeat_interleave(k), mode=0
        )
        return dots.reshape(batch, k)

    def _scatter(values, queries, indices, n_rows):
        """out[i] = Σ values[b, j] queries[b] over all (b, j) with indices[b, j] = i."""
        batch, k = indices.shape
        sorted_indices, order = indices.reshape(-1).sort()
        starts = torch.searchsorted(sorted_indices, torch.arange(n_rows + 1, device=indices.device))
        transposed = torch.sparse_csr_tensor(
            starts, order // k, values.reshape(-1)[order], (n_rows, batch), check_invariants=False
        )
        return transposed @ queries

else:

    def gathered_dot(queries, rows, indices):
        """The dot product of each query with its rows, shape (batch, k)."""
        return ops.einsum("bd,bkd->bk", queries, take_rows(rows, indices))

    def weighted_rows(values, rows, indices):
        """The sum of each query's rows, weighted, shape (batch, d_model)."""
        return ops.einsum("bk,bkd->bd", values, take_rows(rows, indices))


if keras.backend.backend() == "tensorflow":
    import tensorflow

    @tensorflow.custom_gradient
    def _with_dense_gradient(rows):
        return tensorflow.identity(rows), tensorflow.convert_to_tensor

    def take_rows(rows, indices):
        """Rows by number. A row's gradient is the sum over the places where it was taken.

        TensorFlow leaves it as one slice for each place, and Keras' optimizers square the slices
        one by one: gradient norms and Adam's second moments come out wrong.
        """
        rows = tensorflow.convert_to_tensor(rows)  # reads a variable, as `keras.ops` does not
        return ops.take(_with_dense_gradient(rows), indices, axis=0)

else:

    def take_rows(rows, indices):
        """Rows by number."""
        return ops.take(rows, indices, axis=0)
