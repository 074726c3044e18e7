"""Arrays of `jax.shard_map`: the mesh axes along which they may differ."""

import jax
from jax import Array, lax


def vary_alike(*arrays: Array) -> tuple[Array, ...]:
    """Lets arrays vary over the same mesh axes, those over which any of them does.

    `jax.shard_map` knows which values are equal on all devices. JAX's own operations make their
    operands alike by themselves; a call of C code and the start of a loop do not. The derivative
    of this is the sum over the devices, so the gradient of a kernel that all devices share is
    the sum of theirs.

    Args:
        arrays: operands of one operation, inside or outside `jax.shard_map`.

    Returns:
        The same values.
    """
    axes = frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))

    def widened(array: Array) -> Array:
        missing = axes - jax.typeof(array).manual_axis_type.varying
        return lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array

    return tuple(widened(array) for array in arrays)
