"""Export for JAX itself: one StableHLO artifact of `jax.export`, for CPU, CUDA and TPU."""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from tinyvgg_jax.export.layers import forward, layers_of
from tinyvgg_jax.model import TinyVGG
from tinyvgg_jax.step import to_float

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(model: TinyVGG, params: Any, image_shape: tuple[int, int, int]) -> bytes:
    """Exports a network as a StableHLO artifact, which JAX alone can load and call.

    `jax.export.deserialize(artifact).call(images)` maps uint8 images `[B, H, W, C]`, for any B, to
    probabilities `[B, num_classes]` float32.

    Args:
        model: the network; whatever its dtype, the artifact computes in float32.
        params: its parameters.
        image_shape: `(H, W, C)` of its images.

    Returns:
        The artifact. JAX promises to read it for six months of later versions, and three weeks of
        earlier ones.
    """
    logits = forward(layers_of(model, params, image_shape))

    def probabilities(images: jax.Array) -> jax.Array:
        return jax.nn.softmax(logits(to_float(images)))

    shape = jax.export.symbolic_shape("B, " + ", ".join(map(str, image_shape)))
    with jax.enable_x64(False):
        exported = jax.export.export(jax.jit(probabilities), platforms=PLATFORMS)(
            jax.ShapeDtypeStruct(shape, jnp.uint8)
        )
        return bytes(exported.serialize())
