"""Export to ONNX: a graph of Conv, Relu, MaxPool and Gemm, in float32 or quantized to int8."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinyvgg_jax.export import card as cards
from tinyvgg_jax.export.card import Card
from tinyvgg_jax.export.layers import Convolution, Dense, channels_first, layers_of
from tinyvgg_jax.model import TinyVGG

# The opset of ONNX 1.14, which ONNX Runtime reads since 1.15.
_OPSET = 19
_IR_VERSION = 9
# Images that calibrate the ranges of the activations at a time.
_CALIBRATION_BATCH = 64


def to_onnx(model: TinyVGG, params: Any, image_shape: tuple[int, int, int]) -> bytes:
    """Exports a network to ONNX in float32.

    The graph's input is `images`, uint8 `[B, H, W, C]`, channels last as everywhere in this
    package, for any B. Its outputs are `logits` and `probabilities`, float32 `[B, num_classes]`.

    Args:
        model: the network; whatever its dtype, the graph computes in float32.
        params: its parameters.
        image_shape: `(H, W, C)` of its images.

    Returns:
        The bytes of an `.onnx` file.

    Raises:
        ValueError: if the parameters are not those of the network for such images.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    layers = channels_first(layers_of(model, params, image_shape), image_shape)
    constants = [helper.make_tensor("scale", TensorProto.FLOAT, [], [1 / 255])]
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
        # ONNX's convolutions take the channels before the pixels.
        helper.make_node("Transpose", ["scaled"], ["input"], perm=[0, 3, 1, 2]),
    ]
    x = "input"
    for layer in layers:
        for part, array in (("weight", layer.kernel), ("bias", layer.bias)):
            constants.append(numpy_helper.from_array(array, f"{layer.name}.{part}"))
        added, x = _nodes(layer, x)
        nodes += added
    nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1))
    classes = len(layers[-1].bias)
    graph = helper.make_graph(
        nodes,
        "tiny_vgg",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", *image_shape])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", classes])
            for name in ("logits", "probabilities")
        ],
        constants,
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
    )
    proto.producer_name = cards.KEY
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString())


def _nodes(layer: Convolution | Dense, x: str) -> tuple[list[Any], str]:
    """Makes the nodes of a layer; returns them and the name of their output."""
    from onnx import helper

    name = layer.name
    parameters = [f"{name}.weight", f"{name}.bias"]
    if isinstance(layer, Dense):
        nodes, flat = [], x
        if not x.startswith("dense"):
            flat = "flat"
            nodes.append(helper.make_node("Flatten", [x], [flat], axis=1))
        output = f"{name}.sum" if layer.relu else name
        nodes.append(helper.make_node("Gemm", [flat, *parameters], [output], name=name, transB=1))
        if layer.relu:
            nodes.append(helper.make_node("Relu", [output], [name]))
        return nodes, name
    sum_, relu = f"{name}.sum", f"{name}.relu"
    nodes = [
        helper.make_node(
            "Conv", [x, *parameters], [sum_], name=name, kernel_shape=[3, 3], pads=[1, 1, 1, 1]
        ),
        helper.make_node("Relu", [sum_], [relu]),
    ]
    if not layer.pool:
        return nodes, relu
    nodes.append(
        helper.make_node("MaxPool", [relu], [f"{name}.pool"], kernel_shape=[2, 2], strides=[2, 2])
    )
    return nodes, f"{name}.pool"


def with_card(artifact: bytes, card: Card) -> bytes:
    """Adds a network's card to the metadata of an ONNX model.

    Args:
        artifact: the bytes of an `.onnx` file.
        card: as from `card.make_card`.

    Returns:
        The bytes of the file with the card under the key "tinyvgg_jax".
    """
    import onnx
    from onnx import helper

    proto = onnx.load_from_string(artifact)
    helper.set_model_props(proto, {cards.KEY: cards.to_text(card, _without_card(proto))})
    return bytes(proto.SerializeToString())


def read_card(proto: Any) -> Card:
    """Reads the card of an ONNX model, and checks it and the model.

    Raises:
        ValueError: if there is none, or it or the model is damaged.
    """
    found = {prop.key: prop.value for prop in proto.metadata_props}
    if cards.KEY not in found:
        raise ValueError("it has no card of a network")
    return cards.from_text(found[cards.KEY], _without_card(proto))


def _without_card(proto: Any) -> bytes:
    """Serialises a model without its metadata, always in the same way."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    del copy.metadata_props[:]
    return bytes(copy.SerializeToString(deterministic=True))


def quantized(artifact: bytes, images: np.ndarray) -> bytes:
    """Quantizes an exported network to int8 for ONNX Runtime.

    Weights are quantized for each output channel, activations for each tensor, by the range that
    they have on the given images (static quantization). The graph has pairs of QuantizeLinear and
    DequantizeLinear, which ONNX Runtime fuses into int8 operators.

    Args:
        artifact: as from `to_onnx`.
        images: `[N, H, W, C]` uint8 images of the train split, some hundreds, for calibration.

    Returns:
        The bytes of an `.onnx` file.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization import shape_inference

    class Batches(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = _batches(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._batches, None)

    with tempfile.TemporaryDirectory() as folder:
        given, prepared, made = (Path(folder) / f"{name}.onnx" for name in ("a", "b", "c"))
        given.write_bytes(artifact)
        shape_inference.quant_pre_process(given, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            made,
            Batches(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Relu", "MaxPool", "Gemm"],
            per_channel=True,
            # Processors without AVX-512 VNNI add two products in 16 bits, which 8-bit weights
            # would overflow; so weights take 7 bits.
            reduce_range=True,
        )
        proto = onnx.load(made)
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString())


def _batches(images: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(images), _CALIBRATION_BATCH):
        yield {"images": images[start : start + _CALIBRATION_BATCH]}
