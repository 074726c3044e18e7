"""Muon's directions with a cheaper orthogonalization than Optax's.

Optax multiplies the whole matrix X in each iteration of Newton and Schulz. All of these products
are polynomials of the small square matrix X X^T, so here the iterations are of that matrix, and X
is multiplied twice, at the beginning and at the end ("Gram Newton-Schulz", 2026,
https://tridao.me/blog/2026/gram-newton-schulz). For a kernel of 2304 x 256 that is 37 % of the
arithmetic.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax import contrib

# Jordan's coefficients, and the number of iterations that he and Optax take by default.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# Added to norms before a division, as in Optax.
_SMALLEST_NORM = 1e-8


def muon_directions(
    momentum: float,
    *,
    nesterov: bool,
    adam_learning_rate: float,
    matrix_axes: Callable[[optax.Params], optax.Params],
) -> optax.GradientTransformation:
    """Makes the transformation of gradients into Muon's updates at a learning rate of 1.

    Optax's Muon with no iteration gives the averaged gradient, divided by its norm and multiplied
    by the factor for the matrix's shape; the iterations follow here. So the state is that of
    `optax.contrib.muon`.

    Args:
        momentum: decay of the average of the gradients, in [0, 1).
        nesterov: whether the momentum is Nesterov's.
        adam_learning_rate: learning rate for all that is no matrix.
        matrix_axes: from a tree of parameters to one of `optax.contrib.MuonDimensionNumbers`, with
            None where Adam is to be used.
    """
    averages = contrib.muon(
        1.0,
        ns_steps=0,
        beta=momentum,
        nesterov=nesterov,
        adam_learning_rate=adam_learning_rate,
        muon_weight_dimension_numbers=matrix_axes,
    )

    def update(
        gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = averages.update(gradients, state, params)

        def direction(update: Array, axes: object) -> Array:
            if axes is None:
                return update
            matrix = update.reshape(-1, update.shape[-1])
            return orthogonalize(matrix).reshape(update.shape)

        return jax.tree.map(direction, updates, matrix_axes(updates)), state

    return optax.GradientTransformation(averages.init, update)


def orthogonalize(matrix: Array) -> Array:
    """Brings the singular values of a matrix near one another, by five Newton-Schulz iterations.

    With X the matrix divided by its Frobenius norm, an iteration is

        X <- (a + b A + c A A) X,   A = X X^T

    and the result is X times the norm. It is computed as Q X with the first X and

        P <- a + b A + c A A,   Q <- P Q,   A <- P A P

    in float32's full precision, since errors of A grow by up to a * a in each iteration. Beside
    float64 the result is off by up to 0.2 % of its largest singular value, measured on matrices of
    low rank and with singular values down to 1e-8 of the largest.

    Args:
        matrix: `[M, N]`, floating; computed as its transpose if M > N.

    Returns:
        `[M, N]`, of the same dtype: for the matrix U diag(s) V^T about |s| U V^T.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    with jax.default_matmul_precision("highest"):
        norm = jnp.linalg.norm(matrix)
        x = matrix / (norm + _SMALLEST_NORM)
        gram = x @ x.T
        linear, cubic, quintic = _COEFFICIENTS
        product = None
        for iteration in range(_ITERATIONS):
            factor = linear * jnp.eye(len(x), dtype=x.dtype) + cubic * gram + quintic * gram @ gram
            product = factor if product is None else factor @ product
            if iteration < _ITERATIONS - 1:
                gram = factor @ gram @ factor
        return norm * (product @ x)
