"""Starting from a trained run: its parameters where they fit, new ones elsewhere."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tinyvgg_jax.errors import UserError
from tinyvgg_jax.paths import local_path, status_of
from tinyvgg_jax.runs.folder import read_dataset
from tinyvgg_jax.runs.restore import restore, single_run_config


class Trained(NamedTuple):
    """A trained network.

    Attributes:
        params: tree of its arrays.
        class_names: names of its classes, in the order of their labels.
    """

    params: Any
    class_names: tuple[str, ...]


def trained_network(source: str) -> Trained:
    """Restores the network that a run starts from.

    Args:
        source: a run's folder, or `FOLDER:STEP` with a step as in `restore`; without one, the best
            by validation accuracy.

    Returns:
        The network.

    Raises:
        UserError: if there is no such run or checkpoint, or it is damaged.
    """
    with _naming_the_field():
        folder, step = _folder_and_step(source)
        params = restore(folder, int(step) if step.isdecimal() else step)[1]
        return Trained(params, read_dataset(folder).class_names)


def require_run(source: str) -> None:
    """Checks that there is a run to start from, without asking other processes.

    Raises:
        UserError: if there is none.
    """
    with _naming_the_field():
        folder, _ = _folder_and_step(source)
        single_run_config(folder)
        if status_of(folder / "checkpoints") is None:
            raise UserError(f"{folder} holds no checkpoint yet.")


def _folder_and_step(source: str) -> tuple[Path, str]:
    found = re.fullmatch(r"(.+):(\w+)", source)
    # A folder's own name may end like that.
    if found and status_of(local_path(source)) is None:
        return local_path(found[1]), found[2]
    return local_path(source), "best"


@contextlib.contextmanager
def _naming_the_field() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"config.init_from: {error}") from error


def fitting_layers(params: Any, source: Any, name: str) -> list[str]:
    """Lists the layers that a run takes from a trained network.

    Args:
        params: tree of the run's arrays, or of their shapes.
        source: tree of the trained network's arrays.
        name: names the trained network, for the message.

    Returns:
        The layers whose arrays all have the same paths and shapes.

    Raises:
        UserError: if there is none.
    """
    shapes, theirs = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (params, source))
    taken = [layer for layer in params if shapes[layer] == theirs.get(layer)]
    if not taken:
        raise UserError(
            f"config.init_from: {name} is another network in every layer, so nothing of it fits."
        )
    return taken


def frozen_layers(params: Any, names: tuple[str, ...]) -> set[str]:
    """Finds the layers that are to stay as they are.

    Args:
        params: tree of parameters, whose first keys are the layers' names.
        names: layers, like "conv1_2" or "dense", or blocks of them, like "conv1".

    Raises:
        UserError: if a name is unknown, or no layer is left to be trained.
    """
    frozen: set[str] = set()
    for name in names:
        found = {layer for layer in params if layer == name or layer.startswith(f"{name}_")}
        if not found:
            raise UserError(
                f"config.freeze names {name!r}; the layers are {', '.join(sorted(params))}."
            )
        frozen |= found
    if frozen == set(params):
        raise UserError("config.freeze leaves no layer to be trained.")
    return frozen
