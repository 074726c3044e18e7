"""Reading a run's folder: its config, its dataset's info, and its trained network."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tinyvgg_jax.data import DatasetInfo
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.model import TinyVGG
from tinyvgg_jax.paths import local_path
from tinyvgg_jax.runs.checkpoint import Checkpoints, Restored
from tinyvgg_jax.runs.folder import read_config, read_dataset


def build_model(config: ConfigDict, info: DatasetInfo) -> TinyVGG:
    """Builds the network of a config.

    Args:
        config: the run's config.
        info: the dataset's image shape and class names.

    Returns:
        The module, without parameters.

    Raises:
        UserError: if the images are too small for the number of blocks.
    """
    smallest = 2 ** len(config.model.widths)
    if min(info.image_shape[:2]) < smallest:
        raise UserError(
            f"config.model.widths has {len(config.model.widths)} blocks, which need images of at "
            f"least {smallest}x{smallest} pixels; {config.data.name} has "
            f"{info.image_shape[0]}x{info.image_shape[1]}."
        )
    return TinyVGG(
        widths=tuple(config.model.widths),
        convs_per_block=config.model.convs_per_block,
        hidden=config.model.hidden,
        num_classes=len(info.class_names),
        dtype=jnp.dtype(config.dtype),
        dropout=config.model.dropout,
        kernel_init=config.model.kernel_init,
    )


def abstract_params(model: TinyVGG, image_shape: tuple[int, int, int]) -> Any:
    """Lists the shapes and dtypes of a network's parameters without computing them.

    Returns:
        Tree of `jax.ShapeDtypeStruct`.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def restore(workdir: str | Path, step: int | str = "best") -> tuple[TinyVGG, Any]:
    """Restores a trained network from a run's folder; no dataset is needed.

    Args:
        workdir: the folder that `train_and_evaluate` wrote.
        step: the number of optimizer steps of a checkpoint, "best" (by validation accuracy), or
            "latest".

    Returns:
        `(model, params)`, ready for `model.apply({"params": params}, images)` with images
        `[B, H, W, C]` in [0, 1].

    Raises:
        UserError: if the folder holds no run or no such checkpoint, or the checkpoint is damaged.
    """
    workdir = local_path(workdir)
    config = single_run_config(workdir)
    model, restored = restore_checkpoint(workdir, config, read_dataset(workdir), step)
    return model, restored.params


def single_run_config(workdir: Path) -> ConfigDict:
    """Reads the config of the run in a folder.

    Raises:
        UserError: if the folder holds runs of several seeds, or no run.
    """
    config = read_config(workdir)
    if config.num_seeds > 1:
        raise UserError(
            f"{workdir} holds runs of {config.num_seeds} seeds; name one of them, like "
            f"{workdir / f'seed_{config.seed}'}."
        )
    return config


def restore_checkpoint(
    workdir: Path, config: ConfigDict, info: DatasetInfo, step: int | str
) -> tuple[TinyVGG, Restored]:
    """Builds the network of a run and restores its parameters.

    Args:
        workdir: the run's folder.
        config: the run's config.
        info: the dataset's image shape and class names.
        step: as in `restore`.

    Returns:
        The network, and the checkpoint without optimizer state.

    Raises:
        UserError: if there is no such checkpoint, or it is damaged.
    """
    model = build_model(config, info)
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{workdir} holds no checkpoint yet.")
    with Checkpoints(folder, read_only=True) as checkpoints:
        return model, checkpoints.restore_params(step, abstract_params(model, info.image_shape))
