"""The SAME convolution of the model, in plain JAX and in formulations that are fast on a CPU.

The plain one works under every JAX transformation. XLA's CPU backend computes the gradient with
respect to a convolution's kernel several times slower than its own matrix product could. So there,
3x3 convolutions in float32 are `native`'s, together with the pooling that may follow. Where they
cannot be, this file writes that gradient as a product of image patches with the output's gradient,
a few images at a time, so that the patches stay in the cache. On other platforms everything is
XLA's own. The fast formulations have a gradient of their own (`jax.custom_vjp`), so that they are
differentiable in reverse mode only, and only once.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from tinyvgg_jax.ops import winograd
from tinyvgg_jax.ops.pooling import lean_max_pool_2x2, maxima_mask, scatter_to_maxima

# Output pixels whose patches are gathered at a time: the best of 196 to 25,088 on two cores
# of an AMD EPYC at the model's own shapes. It also bounds the extra memory.
_PIXELS_PER_CHUNK = 3136

# Of images, kernel and bias.
Gradients = tuple[Array, Array, Array]


def _same_convolution(images: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def plain_convolution_relu(images: Array, kernel: Array, bias: Array) -> Array:
    """Convolves with stride 1 and SAME padding, adds a bias and applies ReLU, all by XLA.

    Args:
        images: `[B, H, W, C_in]`, floating.
        kernel: `[k_h, k_w, C_in, C_out]`, the dtype of `images`.
        bias: `[C_out]`, likewise.

    Returns:
        `[B, H, W, C_out]`, the same dtype.
    """
    # The axes are written out for those who forbid JAX to add them.
    return jax.nn.relu(_same_convolution(images, kernel) + bias[None, None, None])


def _kernel_gradient_from_patches(
    images: Array, gradient: Array, kernel_size: tuple[int, int]
) -> Array:
    """Sums patch-transposed times output gradient over chunks of images."""
    (B, H, W, C_in), C_out = images.shape, gradient.shape[-1]
    k_h, k_w = kernel_size
    pad_h, pad_w = (k_h - 1) // 2, (k_w - 1) // 2
    padding = ((0, 0), (pad_h, k_h - 1 - pad_h), (pad_w, k_w - 1 - pad_w), (0, 0))
    chunk = max(
        (n for n in range(1, B + 1) if B % n == 0 and n * H * W <= _PIXELS_PER_CHUNK), default=1
    )
    padded = jnp.pad(images, padding).reshape(B // chunk, chunk, H + k_h - 1, W + k_w - 1, C_in)
    gradients = gradient.reshape(B // chunk, chunk * H * W, C_out)

    def add_chunk(total: Array, chunk_of: tuple[Array, Array]) -> tuple[Array, None]:
        x, g = chunk_of
        shifted = [x[:, i : i + H, j : j + W] for i in range(k_h) for j in range(k_w)]
        patches = jnp.concatenate(shifted, axis=-1).reshape(chunk * H * W, k_h * k_w * C_in)
        product = lax.dot_general(
            patches, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return total + product, None

    zeros = jnp.zeros((k_h * k_w * C_in, C_out), jnp.float32)
    total, _ = lax.scan(add_chunk, zeros, (padded, gradients))
    return total.reshape(k_h, k_w, C_in, C_out)


def _native(images: Array, kernel: Array) -> bool:
    """Whether this convolution on a CPU is one of `native`'s."""
    return (
        images.dtype == kernel.dtype == jnp.float32
        and kernel.shape[:2] == (3, 3)
        and 0 not in images.shape + kernel.shape
        # On other platforms nothing is gained by compiling it.
        and jax.default_backend() == "cpu"
        and winograd.available()
    )


def _native_gradients(images: Array, kernel: Array, gradient: Array, passed: Array) -> Gradients:
    """By `native`, which says what `passed` is."""
    of_images = winograd.input_gradient(gradient, passed, kernel, images.shape)
    return of_images, *winograd.parameter_gradient(images, gradient, passed)


def _xla_gradients(images: Array, kernel: Array, gradient: Array) -> Gradients:
    of_images, of_kernel = jax.vjp(_same_convolution, images, kernel)[1](gradient)
    return of_images, of_kernel, gradient.sum(axis=(0, 1, 2))


@jax.custom_vjp
def convolution_relu(images: Array, kernel: Array, bias: Array) -> Array:
    """Computes `plain_convolution_relu` fast on a CPU; reverse-mode differentiable, once.

    Args:
        images: `[B, H, W, C_in]`, floating.
        kernel: `[k_h, k_w, C_in, C_out]`, the dtype of `images`.
        bias: `[C_out]`, likewise.

    Returns:
        `[B, H, W, C_out]`, the same dtype.
    """
    plain = plain_convolution_relu
    cpu = winograd.convolution_relu if _native(images, kernel) else plain
    return lax.platform_dependent(images, kernel, bias, cpu=cpu, default=plain)


def _forward(images: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    output = convolution_relu(images, kernel, bias)
    return output, (images, kernel, output)


def _backward(residuals: tuple[Array, Array, Array], gradient: Array) -> Gradients:
    images, kernel, output = residuals

    def xla(images: Array, kernel: Array, gradient: Array, output: Array) -> Gradients:
        return _xla_gradients(images, kernel, jnp.where(output > 0, gradient, 0))

    def patches(images: Array, kernel: Array, gradient: Array, output: Array) -> Gradients:
        gradient = jnp.where(output > 0, gradient, 0)
        _, input_vjp = jax.vjp(partial(_same_convolution, kernel=kernel), images)
        size = (kernel.shape[0], kernel.shape[1])
        of_kernel = _kernel_gradient_from_patches(images, gradient, size).astype(kernel.dtype)
        return input_vjp(gradient)[0], of_kernel, gradient.sum(axis=(0, 1, 2))

    cpu = _native_gradients if _native(images, kernel) else patches
    return lax.platform_dependent(images, kernel, gradient, output, cpu=cpu, default=xla)


convolution_relu.defvjp(_forward, _backward)


def convolution_relu_pool(images: Array, kernel: Array, bias: Array) -> Array:
    """`lean_max_pool_2x2(convolution_relu(...))`, on a CPU without writing what is pooled.

    Args and errors are those of `convolution_relu`.

    Returns:
        `[B, H // 2, W // 2, C_out]`, the dtype of `images`.
    """
    if _native(images, kernel) and min(images.shape[1:3]) >= 2:
        return _fused(images, kernel, bias)
    return lean_max_pool_2x2(convolution_relu(images, kernel, bias))


@jax.custom_vjp
def _fused(images: Array, kernel: Array, bias: Array) -> Array:
    return _fused_forward(images, kernel, bias)[0]


def _fused_forward(
    images: Array, kernel: Array, bias: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    def xla(images: Array, kernel: Array, bias: Array) -> tuple[Array, Array]:
        output = plain_convolution_relu(images, kernel, bias)
        pooled = lean_max_pool_2x2(output)
        return pooled, maxima_mask(output, pooled) * (pooled > 0)

    cpu = winograd.convolution_relu_pool
    pooled, maxima = lax.platform_dependent(images, kernel, bias, cpu=cpu, default=xla)
    return pooled, (images, kernel, maxima)


def _fused_backward(residuals: tuple[Array, Array, Array], gradient: Array) -> Gradients:
    images, kernel, maxima = residuals
    share = gradient / jnp.maximum(lax.population_count(maxima), 1)

    def xla(images: Array, kernel: Array, share: Array, maxima: Array) -> Gradients:
        of_output = scatter_to_maxima(share, maxima, images.shape[1:3])
        return _xla_gradients(images, kernel, of_output)

    return lax.platform_dependent(images, kernel, share, maxima, cpu=_native_gradients, default=xla)


_fused.defvjp(_fused_forward, _fused_backward)
