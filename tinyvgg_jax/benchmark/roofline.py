"""The roofline of a training step: its operations and memory traffic, by formula.

A step of W operations that moves Q bytes cannot be faster than max(W / P, Q / B), where P is the
highest rate of operations and B that of the memory (Williams, Waterman & Patterson, 2009,
"Roofline: an insightful visual performance model for multicore architectures"). P and B are
measured here: P on a product of large matrices, B on copies of a large array.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

# Reads and writes of each parameter in a step: the forward pass and the backward pass read it; the
# gradient is written and read; the optimizer reads and writes the parameter and its momentum.
_PARAMETER_PASSES = 8


class Layer(NamedTuple):
    """A layer of the network, for one image.

    Attributes:
        multiply_adds: multiplications with an addition in the forward pass.
        inputs: number of input values.
        outputs: number of output values.
        parameters: number of parameters.
    """

    multiply_adds: int
    inputs: int
    outputs: int
    parameters: int


def layers(
    widths: Sequence[int] = (64, 128, 256), convs_per_block: int = 2, hidden: int = 256
) -> tuple[list[Layer], list[Layer]]:
    """Lists the layers of `TinyVGG` on images of 28x28x1 with ten classes.

    Returns:
        The layers with parameters, in their order, and the poolings.
    """
    found, poolings, side, channels = [], [], 28, 1
    for width in widths:
        for _ in range(convs_per_block):
            kernel, area = 9 * channels * width, side**2
            found.append(Layer(area * kernel, area * channels, area * width, kernel + width))
            channels = width
        poolings.append(Layer(0, side**2 * width, (side // 2) ** 2 * width, 0))
        side //= 2
    for inputs, outputs in ((side**2 * channels, hidden), (hidden, 10)):
        found.append(Layer(inputs * outputs, inputs, outputs, (inputs + 1) * outputs))
    return found, poolings


def step_flops(batch_size: int, network: dict[str, Any] | None = None) -> int:
    """Counts the floating-point operations of a training step.

    A convolution with C input channels and F filters on an output of H x W takes
    2 * H * W * 9 * C * F operations for each image (multiplications and additions), a dense layer
    from n to m features 2 * n * m. The gradients take twice as many as the forward pass, except for
    the first layer, since no gradient with respect to the images is needed.

    Args:
        batch_size: number of images.
        network: fields of `TinyVGG` that differ from the defaults, as in `layers`.
    """
    found, _ = layers(**network or {})
    operations = [2 * layer.multiply_adds for layer in found]
    return batch_size * (3 * sum(operations) - operations[0])


def step_bytes(batch_size: int, value_bytes: int, network: dict[str, Any] | None = None) -> int:
    """Counts the bytes that a training step reads and writes, if no cache holds any map.

    Each layer, with its bias and ReLU, is taken as one operation. The forward pass reads the inputs
    and writes the outputs. The gradient with respect to the parameters reads the inputs and the
    outputs' gradient; that with respect to the inputs reads the outputs' gradient and writes the
    inputs'; one of them reads the outputs too, which tell where ReLU was 0. Poolings have no
    parameters. Parameters are float32. A program that joins layers can move less.

    Args:
        batch_size: number of images.
        value_bytes: bytes of a value of the maps.
        network: fields of `TinyVGG` that differ from the defaults, as in `layers`.
    """
    found, poolings = layers(**network or {})
    values = sum(3 * layer.inputs + 4 * layer.outputs for layer in found)
    # No gradient with respect to the images is needed.
    values -= found[0].inputs + found[0].outputs
    values += sum(3 * pooling.inputs + 2 * pooling.outputs for pooling in poolings)
    parameters = sum(layer.parameters for layer in found)
    return batch_size * values * value_bytes + 4 * _PARAMETER_PASSES * parameters


def roofline(case: dict[str, Any], flop_rate: float, byte_rate: float | None) -> dict[str, Any]:
    """Computes the shortest time of a training step by the measured rates.

    Args:
        case: the case of a contestant, with its batch size, dtype and network.
        flop_rate: operations/s of a large matrix product in the same dtype.
        byte_rate: bytes/s of a large copy, reading and writing; None if it was not measured.

    Returns:
        `step_flops`, `step_bytes`, both rates, `roof_seconds`, and `bound`, which is "compute" or
        "memory", the roof that is reached first.
    """
    network, value_bytes = case.get("network"), 2 if case["dtype"] == "bfloat16" else 4
    flops = step_flops(case["batch_size"], network)
    traffic = step_bytes(case["batch_size"], value_bytes, network)
    compute, memory = flops / flop_rate, traffic / (byte_rate or math.inf)
    return {
        "step_flops": flops,
        "step_bytes": traffic,
        "matmul_flops_per_second": flop_rate,
        "copy_bytes_per_second": byte_rate,
        "roof_seconds": max(compute, memory),
        "bound": "compute" if compute >= memory else "memory",
    }
