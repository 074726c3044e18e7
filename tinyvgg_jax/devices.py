"""Devices that share each batch of a run: their mesh, and the part that each of them holds.

A run is data parallel. The state is replicated, which means that every device holds all of it, and
a batch is split, so that each device computes the gradients of its own examples. In a step devices
exchange the sums of gradients, losses and correct predictions, and nothing else but for mixup,
which needs the images of the whole batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tinyvgg_jax.errors import UserError

# Name of the mesh's only axis. Along it lie the examples of a batch, or several runs.
AXIS = "data"
REPLICATED, SPLIT = PartitionSpec(), PartitionSpec(AXIS)

Function = TypeVar("Function", bound=Callable[..., Any])


class Share(NamedTuple):
    """The part of a batch that a device holds.

    Random numbers are drawn for the whole batch on every device, and each takes those of its own
    examples. So an example has the same augmentation on any number of devices.

    Attributes:
        first: number of examples before this part.
        size: number of examples in this part.
        total: number of examples in the batch.
    """

    first: Array
    size: int
    total: int

    @classmethod
    def of_device(cls, size: int) -> "Share":
        """Returns the share of the device that calls this, within `on_each`."""
        return cls(lax.axis_index(AXIS) * size, size, lax.axis_size(AXIS) * size)

    def of(self, draws: Array) -> Array:
        """Takes this part of the batch's draws, `[total, ...]`: `[size, ...]`."""
        return lax.dynamic_slice_in_dim(draws, self.first, self.size)


def find_mesh(num_devices: int | None = None) -> Mesh | None:
    """Makes the mesh of the devices that share a run.

    Args:
        num_devices: number of devices, over all processes; None for all that there are.

    Returns:
        The mesh, with the devices of a process beside each other; None for a single device, on
        which nothing has to be shared.

    Raises:
        UserError: if there are fewer devices, or the processes cannot share them evenly.
    """
    devices, processes = jax.devices(), jax.process_count()
    count = len(devices) if num_devices is None else num_devices
    if count > len(devices):
        raise UserError(
            f"config.num_devices is {count}, and JAX finds {len(devices)} "
            f"device{'s' if len(devices) > 1 else ''} here."
        )
    if count % processes:
        raise UserError(
            f"config.num_devices is {count}, which {processes} processes cannot share evenly."
        )
    if count == 1:
        return None
    chosen = []
    for process in range(processes):
        own = [device for device in devices if device.process_index == process]
        if len(own) < count // processes:
            raise UserError(
                f"process {process} has {len(own)} devices, and needs {count // processes} of the "
                f"{count}. Pass --config.num_devices={processes * len(own)}."
            )
        chosen += own[: count // processes]
    return Mesh(np.asarray(chosen), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def num_devices(mesh: Mesh | None) -> int:
    """Counts the devices of a mesh; None stands for a single device."""
    return 1 if mesh is None else int(mesh.size)


def require_even_batches(batch_size: int, mesh: Mesh | None) -> None:
    """Checks that the devices can share a batch evenly.

    Raises:
        UserError: if they cannot.
    """
    count = num_devices(mesh)
    if batch_size % count:
        # Processes must have the same number of devices.
        numbers = range(jax.process_count(), count, jax.process_count())
        fitting = max((n for n in numbers if batch_size % n == 0), default=None)
        fewer = "" if fitting is None else f"--config.num_devices={fitting}, or "
        raise UserError(
            f"config.batch_size is {batch_size}, which {count} devices cannot share evenly. Pass "
            f"{fewer}--config.batch_size={max(1, round(batch_size / count)) * count}."
        )


def put(tree: Any, mesh: Mesh | None, spec: PartitionSpec = REPLICATED) -> Any:
    """Moves a tree of host arrays to the devices.

    Args:
        tree: NumPy arrays; with `SPLIT`, this process's rows of them.
        mesh: the devices; None for the default one.
        spec: `REPLICATED` or `SPLIT`.

    Returns:
        The same tree of JAX arrays.
    """
    if mesh is None:
        return jax.device_put(tree)
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, np.asarray(array)), tree
    )


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Copies a tree of JAX arrays, PRNG keys among them, to every device of a mesh.

    Args:
        tree: arrays; each process must have the same ones.
        mesh: the devices; None leaves the arrays where they are.
    """
    if mesh is None:
        return tree

    def one(array: Array) -> Array:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            data = put(np.asarray(jax.random.key_data(array)), mesh)
            return jax.random.wrap_key_data(data, impl=str(jax.random.key_impl(array)))
        if array.sharding == NamedSharding(mesh, REPLICATED):
            return array
        return put(np.asarray(array), mesh)

    return jax.tree.map(one, tree)


def own_rows(batch_size: int, mesh: Mesh | None) -> slice:
    """Returns the rows of a batch that the devices of this process hold."""
    if mesh is None:
        return slice(0, batch_size)
    size = batch_size // jax.process_count()
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def on_each(
    function: Function, mesh: Mesh | None, in_specs: tuple[Any, ...], out_specs: Any = REPLICATED
) -> Function:
    """Makes a function run on every device, each with its part of the arguments.

    Args:
        function: the function of one device; with a mesh, it may use `Share.of_device`.
        mesh: the devices; None leaves the function as it is.
        in_specs: `REPLICATED` or `SPLIT` for each argument.
        out_specs: the same for its results.
    """
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
