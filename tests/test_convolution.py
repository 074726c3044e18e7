import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

from tinyvgg_jax import convolution
from tinyvgg_jax.convolution import same_convolution

# Batch, height, width, input and output channels, kernel height and width.
SHAPES = [
    (2, 28, 28, 1, 64, 3, 3),
    (3, 14, 14, 16, 8, 3, 3),
    (5, 7, 9, 3, 4, 3, 3),
    (1, 2, 5, 2, 3, 5, 1),
    (4, 6, 6, 2, 3, 2, 4),
]


def reference(images: Array, kernel: Array) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def draw(shape: tuple[int, ...], dtype: str) -> tuple[Array, Array, Array]:
    b, h, w, c_in, c_out, k_h, k_w = shape
    keys = jax.random.split(jax.random.key(0), 3)
    images = jax.random.normal(keys[0], (b, h, w, c_in), dtype)
    kernel = jax.random.normal(keys[1], (k_h, k_w, c_in, c_out), dtype)
    return images, kernel, jax.random.normal(keys[2], (b, h, w, c_out), dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_values_and_gradients_are_those_of_xla(
    shape: tuple[int, ...], dtype: str, tolerance: float
) -> None:
    images, kernel, cotangent = draw(shape, dtype)
    ours, our_vjp = jax.vjp(same_convolution, images, kernel)
    theirs, their_vjp = jax.vjp(reference, images, kernel)
    for a, b in zip([ours, *our_vjp(cotangent)], [theirs, *their_vjp(cotangent)], strict=True):
        assert a.dtype == b.dtype == dtype
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(
            a.astype(jnp.float32) / scale, b.astype(jnp.float32) / scale, atol=tolerance
        )


def test_chunks_of_every_size_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    images, kernel, cotangent = draw((6, 4, 4, 2, 3, 3, 3), "float32")
    expected = jax.vjp(reference, images, kernel)[1](cotangent)[1]
    for pixels in (1, 16, 32, 48, 96, 1000):
        monkeypatch.setattr(convolution, "_PIXELS_PER_CHUNK", pixels)
        gradient = jax.vjp(same_convolution, images, kernel)[1](cotangent)[1]
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_vmap_over_kernels() -> None:
    images, kernel, cotangent = draw((2, 6, 6, 2, 3, 3, 3), "float32")
    kernels = jnp.stack([kernel, 2 * kernel])

    def gradient(kernel: Array) -> Array:
        return jax.grad(lambda k: (same_convolution(images, k) ** 2 * cotangent).sum())(kernel)

    expected = jnp.stack([gradient(kernel) for kernel in kernels])
    np.testing.assert_allclose(jax.vmap(gradient)(kernels), expected, rtol=1e-4, atol=1e-3)
