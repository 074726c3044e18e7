"""Export to LiteRT (TensorFlow Lite), in float32 or quantized to int8, without TensorFlow."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from tinyvgg_jax.export.layers import forward, layers_of
from tinyvgg_jax.model import TinyVGG

_SIGNATURE, _INPUT, _OUTPUT = "serving_default", "images", "probabilities"


def to_litert(model: TinyVGG, params: Any, image_shape: tuple[int, int, int]) -> bytes:
    """Exports a network to LiteRT in float32, for one image at a time.

    The input is float32 `[1, H, W, C]` in [0, 1], the output float32 probabilities
    `[1, num_classes]`.

    Args:
        model: the network; whatever its dtype, the file computes in float32.
        params: its parameters.
        image_shape: `(H, W, C)` of its images.

    Returns:
        The bytes of a `.tflite` file.
    """
    logits = forward(layers_of(model, params, image_shape))
    with jax.enable_x64(False):
        exported = jax.export.export(
            jax.jit(lambda images: jax.nn.softmax(logits(images))), platforms=["cpu"]
        )(jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return _converted(exported.mlir_module_serialized)


def _converted(module: bytes) -> bytes:
    """Converts StableHLO to the bytes of a `.tflite` file."""
    # This interface of LiteRT's converter is not documented, so its version is pinned.
    from litert_converter import converter_api_ext as converter
    from litert_converter.mlir import ir, passmanager

    with ir.Context() as context:
        converter.prepare_mlir_context(context)
        program = ir.Module.parse(module)
        # JAX serialises StableHLO in its versioned form.
        passmanager.PassManager.parse(
            "builtin.module(vhlo-legalize-to-stablehlo,reconcile-unrealized-casts)"
        ).run(program.operation)
        converter.set_signature(program.operation, _SIGNATURE, [_INPUT], [_OUTPUT])
        converter.run_convert_to_tfl_passes(
            program, passmanager.PassManager(), converter.ConvertToTFLConfig()
        )
        return bytes(converter.export_flatbuffer_to_bytes(program.operation))


def quantized(artifact: bytes, images: np.ndarray) -> bytes:
    """Quantizes an exported network to int8 everywhere, input and output included.

    Weights are quantized for each output channel, activations for each tensor, by the range that
    they have on the given images. The input is the pixel minus 128.

    Args:
        artifact: as from `to_litert`.
        images: `[N, H, W, C]` uint8 images of the train split, some hundreds, for calibration.

    Returns:
        The bytes of a `.tflite` file.
    """
    from litert_quantizer import calibrator, quantizer, recipe, recipe_manager
    from litert_quantizer.utils import qsv_utils

    wanted = recipe.static_wi8_ai8()
    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(wanted)
    # By default a moving average of the ranges is taken, which cuts off the largest activations.
    ranges = calibrator.Calibrator(
        artifact, num_threads=1, qsv_update_func=qsv_utils.min_max_update
    )
    ranges.calibrate({_SIGNATURE: list(_examples(images))}, manager)
    result = quantizer.Quantizer(artifact, wanted).quantize(
        ranges.get_model_qsvs(), enable_progress_bar=False, enable_progress_report=False
    )
    return _in_one_flatbuffer(result.quantized_model)


def _in_one_flatbuffer(artifact: bytes | bytearray) -> bytes:
    """Moves weights that lie behind a file's flatbuffer into it.

    The quantizer puts them there from 256 KiB on. TensorFlow Lite Micro does not look there, says
    nothing, and computes with zeros.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(artifact)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _examples(images: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    # The darkest and the lightest pixel fix the scale of the input at 1 / 255.
    ends = np.zeros_like(images[:1])
    ends.flat[0] = 255
    for image in np.concatenate([ends, images]):
        yield {_INPUT: image[None].astype(np.float32) / 255}
