"""The layers of a trained network as plain arrays, from which every exported format is made."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tinyvgg_jax.model import TinyVGG
from tinyvgg_jax.runs.restore import abstract_params


class Convolution(NamedTuple):
    """A 3x3 SAME convolution with bias and ReLU, and perhaps 2x2 max pooling behind it.

    Attributes:
        name: the layer's name, like "conv1_2".
        kernel: `[3, 3, C_in, C_out]` float32.
        bias: `[C_out]` float32.
        pool: whether 2x2 max pooling follows; an odd last row or column is left out.
    """

    name: str
    kernel: np.ndarray
    bias: np.ndarray
    pool: bool


class Dense(NamedTuple):
    """A dense layer with bias, and perhaps ReLU behind it.

    Attributes:
        name: the layer's name, "dense" or "logits".
        kernel: `[inputs, outputs]` float32.
        bias: `[outputs]` float32.
        relu: whether ReLU follows.
    """

    name: str
    kernel: np.ndarray
    bias: np.ndarray
    relu: bool


Layer = Convolution | Dense


def layers_of(model: TinyVGG, params: Any, image_shape: tuple[int, int, int]) -> list[Layer]:
    """Lists the layers of a network in the order of their computation.

    The output of the last convolution is flattened in the order (height, width, channel).

    Args:
        model: the network.
        params: its parameters.
        image_shape: `(H, W, C)` of its images.

    Returns:
        The convolutions, then the two dense layers; all arrays are float32 on the host.

    Raises:
        ValueError: if the parameters are not those of the network for such images.
    """
    check_shapes(model, params, image_shape)

    def arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
        layer = params[name]
        return np.asarray(layer["kernel"], np.float32), np.asarray(layer["bias"], np.float32)

    result: list[Layer] = []
    for block in range(1, len(model.widths) + 1):
        for number in range(1, model.convs_per_block + 1):
            name = f"conv{block}_{number}"
            result.append(Convolution(name, *arrays(name), pool=number == model.convs_per_block))
    result.append(Dense("dense", *arrays("dense"), relu=True))
    result.append(Dense("logits", *arrays("logits"), relu=False))
    return result


def check_shapes(model: TinyVGG, params: Any, image_shape: tuple[int, int, int]) -> None:
    """Checks that parameters have the shapes that a network needs.

    Args:
        model: the network.
        params: for each layer, "kernel" and "bias".
        image_shape: `(H, W, C)` of its images.

    Raises:
        ValueError: if a layer is missing, or has another shape.
    """
    for name, layer in abstract_params(model, image_shape).items():
        if name not in params:
            raise ValueError(f"there is no layer {name} in the parameters")
        for part, array in layer.items():
            found = params[name][part].shape
            if found != array.shape:
                raise ValueError(
                    f"{name}'s {part} is {list(found)}, not {list(array.shape)} as for images of "
                    f"{list(image_shape)}"
                )


def image_size_after(layers: list[Layer], image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Computes the height and width of the last convolution's output, pooled."""
    poolings = sum(layer.pool for layer in layers if isinstance(layer, Convolution))
    return image_shape[0] >> poolings, image_shape[1] >> poolings


def channels_first(layers: list[Layer], image_shape: tuple[int, int, int]) -> list[Layer]:
    """Reorders the layers' arrays for frameworks that keep the channels before the pixels.

    Args:
        layers: as from `layers_of`.
        image_shape: `(H, W, C)`.

    Returns:
        The same layers; kernels of convolutions are `[C_out, C_in, 3, 3]`, those of dense layers
        `[outputs, inputs]`, and the inputs of the first dense layer are in the order (channel,
        height, width).
    """
    h, w = image_size_after(layers, image_shape)
    result: list[Layer] = []
    for layer in layers:
        if isinstance(layer, Convolution):
            result.append(layer._replace(kernel=layer.kernel.transpose(3, 2, 0, 1)))
            continue
        kernel = layer.kernel.T
        if isinstance(result[-1], Convolution):
            outputs = len(kernel)
            kernel = kernel.reshape(outputs, h, w, -1).transpose(0, 3, 1, 2).reshape(outputs, -1)
        result.append(layer._replace(kernel=kernel))
    return [layer._replace(kernel=np.ascontiguousarray(layer.kernel)) for layer in result]


def forward(layers: list[Layer]) -> Callable[[Array], Array]:
    """Makes the network's function of images with operations that every converter knows.

    Unlike `TinyVGG`, it pools by `lax.reduce_window`, which converters recognise as max pooling.

    Args:
        layers: as from `layers_of`.

    Returns:
        A function from `[B, H, W, C]` float32 images in [0, 1] to `[B, num_classes]` logits.
    """

    def logits(x: Array) -> Array:
        for layer in layers:
            if isinstance(layer, Convolution):
                x = lax.conv_general_dilated(
                    x,
                    jnp.asarray(layer.kernel),
                    (1, 1),
                    "SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
                x = jax.nn.relu(x + layer.bias)
                if layer.pool:
                    square = (1, 2, 2, 1)
                    x = lax.reduce_window(x, -jnp.inf, lax.max, square, square, "VALID")
            else:
                x = x.reshape(x.shape[0], math.prod(x.shape[1:])) @ layer.kernel + layer.bias
                x = jax.nn.relu(x) if layer.relu else x
        return x

    return logits
