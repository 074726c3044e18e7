"""The layers of a network: output shapes, parameters and multiply-adds, from the network itself."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.extend.core import Jaxpr, jaxprs_in_params
from ml_collections import ConfigDict

from tinyvgg_jax.data import DatasetInfo, load_splits
from tinyvgg_jax.model import TinyVGG, apply, count_parameters
from tinyvgg_jax.report.tables import columns
from tinyvgg_jax.runs import seeds
from tinyvgg_jax.runs.folder import read_config, read_dataset
from tinyvgg_jax.runs.restore import abstract_params, build_model

_BYTES_OF_FLOAT32 = 4


class Layer(NamedTuple):
    """A layer of a network, for one image.

    Attributes:
        name: the layer's name in the tree of parameters.
        kernel: shape of its kernel.
        output: shape of its output, after ReLU and pooling where the layer includes them.
        parameters: number of its parameters.
        multiply_adds: number of multiplications, each with an addition, of its convolution or
            matrix product.
    """

    name: str
    kernel: tuple[int, ...]
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int


def describe_model(model: TinyVGG, image_shape: tuple[int, int, int]) -> list[Layer]:
    """Lists the layers of a network in the order of their computation.

    The network is traced, not run: Flax names each operation after the layer that it belongs to.

    Args:
        model: the network.
        image_shape: `(H, W, C)` of the images.

    Returns:
        The layers that have parameters.
    """
    params = abstract_params(model, image_shape)
    images = jax.ShapeDtypeStruct((1, *image_shape), "float32")

    def forward(params: Any, images: Array) -> Array:
        return apply(model.clone(native=False), params, images)

    multiply_adds: dict[str, int] = dict.fromkeys(params, 0)
    outputs: dict[str, tuple[int, ...]] = {}
    for scope, operation in _operations(jax.make_jaxpr(forward)(params, images).jaxpr):
        name = scope.rpartition("/")[2]
        if name in params:
            multiply_adds[name] += _multiply_adds(operation)
            # The last operation of a layer makes its output.
            outputs[name] = operation.outvars[0].aval.shape[1:]
    return [
        Layer(
            name,
            params[name]["kernel"].shape,
            outputs[name],
            count_parameters(params[name]),
            multiply_adds[name],
        )
        for name in outputs
    ]


def _operations(jaxpr: Jaxpr, scope: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the operations of a program in order, each with its scope, like `TinyVGG/conv1_1`."""
    for operation in jaxpr.eqns:
        own = str(operation.source_info.name_stack)
        path = "/".join(filter(None, (scope, own)))
        yield path, operation
        for inner in jaxprs_in_params(operation.params):
            yield from _operations(inner, path)


def _multiply_adds(operation: Any) -> int:
    """Counts the multiply-adds of an operation: each output is a sum of so many products."""
    kind, shapes = operation.primitive.name, [v.aval.shape for v in operation.invars]
    outputs = math.prod(operation.outvars[0].aval.shape)
    if kind == "conv_general_dilated":
        features = operation.params["dimension_numbers"].rhs_spec[0]
        return outputs * math.prod(shapes[1]) // shapes[1][features]
    if kind == "dot_general":
        (contracted, _), _ = operation.params["dimension_numbers"]
        return outputs * math.prod(shapes[0][axis] for axis in contracted)
    return 0


def model_of_config(config: ConfigDict) -> tuple[TinyVGG, tuple[int, int, int]]:
    """Builds the network of a config.

    Args:
        config: a validated config. Its dataset must be prepared, but for FashionMNIST, whose shape
            and classes are known.

    Returns:
        The network, and the shape `(H, W, C)` of its images.

    Raises:
        UserError: if the dataset is not prepared, or the network does not fit its images.
    """
    from tinyvgg_jax.data import prepare

    if config.data.name == prepare.NAME:
        info = DatasetInfo(prepare.IMAGE_SHAPE, prepare.CLASS_NAMES)
    else:
        info = load_splits(config.data.name, {}, config.data.data_dir, config.data.source_dir)[1]
    return build_model(config, info), info.image_shape


def model_of_run(workdir: Path) -> tuple[TinyVGG, tuple[int, int, int]]:
    """Builds the network of the run in a folder, as `model_of_config` does; no dataset is needed.

    Raises:
        UserError: if the folder holds no run.
    """
    config = read_config(workdir)
    # Runs of several seeds have the same network.
    info = read_dataset(seeds.folders(workdir, config)[0])
    return build_model(config, info), info.image_shape


def layers_table(layers: list[Layer], image_shape: tuple[int, int, int]) -> str:
    """Formats the layers of a network for the terminal.

    Args:
        layers: as from `describe_model`.
        image_shape: `(H, W, C)` of the images.
    """

    def joined(shape: tuple[int, ...]) -> str:
        return "x".join(map(str, shape))

    parameters = sum(layer.parameters for layer in layers)
    multiply_adds = sum(layer.multiply_adds for layer in layers)
    rows = [
        ["layer", "kernel", "output", "parameters", "multiply-adds"],
        ["image", "", joined(image_shape), "", ""],
        *(
            [
                layer.name,
                joined(layer.kernel),
                joined(layer.output),
                f"{layer.parameters:,}",
                f"{layer.multiply_adds:,}",
            ]
            for layer in layers
        ),
        ["total", "", "", f"{parameters:,}", f"{multiply_adds:,}"],
    ]
    last = (
        f"{_BYTES_OF_FLOAT32 * parameters / 1e6:.2f} MB of parameters in float32; multiply-adds "
        "are those of one image."
    )
    return "\n".join([*columns(rows), last])
