"""Export for microcontrollers: a C++ header and source for TensorFlow Lite Micro."""

import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyvgg_jax.errors import UserError
from tinyvgg_jax.export.card import Card
from tinyvgg_jax.export.loaded import litert_input

# The method of a MicroMutableOpResolver that adds each operator of the network.
_OPERATORS = {
    "CONV_2D": "AddConv2D",
    "DEPTHWISE_CONV_2D": "AddDepthwiseConv2D",
    "MAX_POOL_2D": "AddMaxPool2D",
    "RESHAPE": "AddReshape",
    "FULLY_CONNECTED": "AddFullyConnected",
    "SOFTMAX": "AddSoftmax",
}
# Images with their expected outputs, for a test on the board.
TESTS = 10
# It is run by its path. -P keeps its folder out of Python's search, because that has a `torch.py`.
_WORKER = ("-P", os.fspath(Path(__file__).with_name("micro_worker.py")))
# Outputs of optimised kernels differ by this much from those of the reference kernels.
_TOLERANCE = 1


class MicroTest(NamedTuple):
    """Images with the outputs that the network gives on any board.

    Attributes:
        images: `[N, H, W, C]` int8, pixels minus 128.
        outputs: `[N, num_classes]` int8.
    """

    images: np.ndarray
    outputs: np.ndarray


class Graph(NamedTuple):
    """Graph of a `.tflite` file.

    Attributes:
        operators: the names of its operators, in the order of their execution.
        scales: `(scale, zero_point)` of its input and of its output.
        test: images with the expected outputs.
    """

    operators: list[str]
    scales: tuple[tuple[float, int], tuple[float, int]]
    test: MicroTest


def inspect(artifact: bytes, images: np.ndarray) -> Graph:
    """Lists the operators of an int8 network, and computes the outputs of images.

    Args:
        artifact: as from `litert.quantized`.
        images: `[N, H, W, C]` uint8.

    Returns:
        The graph. Its outputs are those of LiteRT's reference kernels, which are those of
        TensorFlow Lite Micro.
    """
    from ai_edge_litert import interpreter as litert

    interpreter = litert.Interpreter(
        model_content=artifact,
        experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF,
        num_threads=1,
    )
    interpreter.allocate_tensors()
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()
    inputs, outputs = litert_input(images, np.int8), []
    for image in inputs:
        interpreter.set_tensor(given["index"], image[None])
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(made["index"])[0])
    operators = [operator["op_name"] for operator in interpreter._get_ops_details()]
    return Graph(
        operators,
        (given["quantization"], made["quantization"]),
        MicroTest(inputs, np.stack(outputs)),
    )


def measure_arena(artifact: bytes, test: MicroTest) -> int | None:
    """Measures the smallest arena in which TensorFlow Lite Micro runs a network, and what it gives.

    Args:
        artifact: as from `litert.quantized`.
        test: as from `inspect`.

    Returns:
        The size in bytes, a multiple of 1,024, on a machine of 64 bits, where it is larger than on
        a microcontroller of 32; None if the package `tflite-micro` is not installed.

    Raises:
        UserError: if TensorFlow Lite Micro cannot run the network, or gives other outputs than the
            test expects.
    """
    if importlib.util.find_spec("tflite_micro") is None:
        return None
    given = io.BytesIO()
    np.savez(given, model=np.frombuffer(artifact, np.uint8), images=test.images)
    done = subprocess.run(
        [sys.executable, *_WORKER], input=given.getvalue(), capture_output=True, check=False
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it crashed"]
        raise UserError(f"TensorFlow Lite Micro cannot run this network: {said[-1]}.")
    made = np.load(io.BytesIO(done.stdout))
    difference = np.abs(made["outputs"].astype(int) - test.outputs).max()
    if difference > _TOLERANCE:
        raise UserError(
            f"TensorFlow Lite Micro computes other outputs than LiteRT, by up to {difference} of "
            "255, so the files for microcontrollers would not be right."
        )
    return int(made["arena"])


def to_micro(
    artifact: bytes, images: np.ndarray, labels: np.ndarray, card: Card, name: str
) -> dict[str, str]:
    """Writes a network as C++ for TensorFlow Lite Micro.

    Args:
        artifact: as from `litert.quantized`.
        images: `[N, H, W, C]` uint8 images for a test on the board; ten are enough.
        labels: `[N]` int, their classes.
        card: as from `card.make_card`.
        name: the name of the files, without a suffix.

    Returns:
        The text of the files `NAME.h` and `NAME.cc`.

    Raises:
        UserError: if the network has other operators than the paper's, or TensorFlow Lite Micro,
            where it is installed, cannot run it or gives other outputs than LiteRT.
    """
    graph = inspect(artifact, images)
    others = set(graph.operators) - _OPERATORS.keys()
    if others:
        raise UserError(
            f"this network needs {', '.join(sorted(others))} in int8, which are not among the "
            f"operators for microcontrollers ({', '.join(_OPERATORS)})."
        )
    arena = measure_arena(artifact, graph.test)
    return {
        f"{name}.h": _header(graph, card, arena, len(artifact), name),
        f"{name}.cc": _source(graph, card, artifact, labels, name),
    }


def _header(graph: Graph, card: Card, arena: int | None, size: int, name: str) -> str:
    (in_scale, in_zero), (out_scale, out_zero) = graph.scales
    H, W, C = card["image_shape"]
    added = sorted({_OPERATORS[operator] for operator in graph.operators})
    adds = "\n".join(f"  resolver.{method}();" for method in added)
    measured = (
        f"// Measured on a machine of 64 bits with the reference kernels. One of 32 bits needs a\n"
        f"// little less, and optimised kernels, such as CMSIS-NN's, some KiB more.\n"
        f"constexpr size_t kArenaSize = {arena};"
        if arena
        else "// How large an arena it needs is not known: tflite-micro was not installed here.\n"
        "// Begin with a large one and lower it until AllocateTensors fails."
    )
    sized = ", and tiny_vgg::kArenaSize bytes are enough" if arena else ""
    return f"""\
// Tiny VGG in int8 for TensorFlow Lite Micro: {size} bytes, by {card["package"]}.
//
//   tflite::MicroMutableOpResolver<tiny_vgg::kNumOperators> resolver;
//   tiny_vgg::AddOperators(resolver);
//   tflite::MicroInterpreter interpreter(
//       tflite::GetModel(tiny_vgg::kModel), resolver, arena, sizeof(arena));
//   interpreter.AllocateTensors();
//
// The arena, an array of uint8_t, is to be aligned to 16 bytes{sized}.
// Versions of TensorFlow Lite Micro before September 2024 do not know that a dense layer can have a
// scale for each output, as here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tiny_vgg {{

extern const uint8_t kModel[];
constexpr size_t kModelSize = {size};
{measured}

// The input is {H}x{W}x{C}, row by row{", the channels of a pixel side by side" if C > 1 else ""}.
// A pixel from 0 to 255 enters as pixel - 128.
constexpr int kHeight = {H}, kWidth = {W}, kChannels = {C};
constexpr int kInputSize = kHeight * kWidth * kChannels;
constexpr float kInputScale = {_float(in_scale)};
constexpr int kInputZeroPoint = {in_zero};

// The probability of a class is kOutputScale * (output - kOutputZeroPoint).
constexpr int kNumClasses = {len(card["class_names"])};
constexpr float kOutputScale = {_float(out_scale)};
constexpr int kOutputZeroPoint = {out_zero};
extern const char* const kClassNames[kNumClasses];

constexpr int kNumOperators = {len(added)};

// Adds the operators that the network needs to a tflite::MicroMutableOpResolver.
template <typename Resolver>
void AddOperators(Resolver& resolver) {{
{adds}
}}

// Images with the outputs that the board must give, for a test: set the input to kTestImages[i],
// invoke, and compare the output with kTestOutputs[i]. Another order of rows or channels, or
// pixels that are scaled otherwise, show here. Optimised kernels may differ by 1.
constexpr int kNumTests = {len(graph.test.images)};
extern const int8_t kTestImages[kNumTests][kInputSize];
extern const int8_t kTestOutputs[kNumTests][kNumClasses];
extern const int kTestLabels[kNumTests];

}}  // namespace tiny_vgg
"""


def _source(graph: Graph, card: Card, artifact: bytes, labels: np.ndarray, name: str) -> str:
    names = "\n".join(f"    {_string(class_name)}," for class_name in card["class_names"])
    return f"""\
// By {card["package"]}; see {name}.h.
#include "{name}.h"

namespace tiny_vgg {{

alignas(16) const uint8_t kModel[] = {{
{_numbers(artifact)}
}};
static_assert(sizeof(kModel) == kModelSize, "the header belongs to another model");

const char* const kClassNames[kNumClasses] = {{
{names}
}};

const int8_t kTestImages[kNumTests][kInputSize] = {{
{_rows(graph.test.images)}
}};

const int8_t kTestOutputs[kNumTests][kNumClasses] = {{
{_rows(graph.test.outputs)}
}};

const int kTestLabels[kNumTests] = {{{", ".join(map(str, labels.tolist()))}}};

}}  // namespace tiny_vgg
"""


def _float(value: Any) -> str:
    return f"{float(value)!r}f"


def _string(text: str) -> str:
    """Writes a C string; bytes that are not plain ASCII become octal numbers."""
    safe = "".join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}"
        for byte in text.encode(errors="replace")
    )
    return f'"{safe}"'


def _rows(arrays: np.ndarray) -> str:
    return "\n".join(f"{{\n{_numbers(array.reshape(-1).tolist())}\n}}," for array in arrays)


def _numbers(values: Iterable[int], a_line: int = 20) -> str:
    """Writes numbers in lines of C."""
    texts = [str(value) for value in values]
    lines = [texts[start : start + a_line] for start in range(0, len(texts), a_line)]
    return "\n".join(f"  {','.join(line)}," for line in lines)
