"""SAME convolution with ReLU, and pooling: in plain JAX, and in forms that are fast on a CPU.

`plain_convolution_relu` works under every JAX transformation. On a CPU, XLA computes the gradient
of a convolution's kernel several times slower than its own matrix product could. `convolution_relu`
and `convolution_relu_pool` therefore choose a form by platform, dtype and kernel size:

- On a CPU with a C compiler, 3x3 convolutions in float32 or bfloat16 run in C (`winograd.py`),
  together with the pooling that may follow.
- Other convolutions on a CPU run in XLA, except for the kernel's gradient. It is a matrix product
  of image patches and the output's gradient, for a few images at a time.
- On a GPU or TPU everything is XLA's own.

These two define their own gradients (`jax.custom_vjp`), so that they are differentiable in reverse
mode only, and only once. README.md beside this file has the mathematics.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from tinyvgg_jax.ops import winograd
from tinyvgg_jax.ops.pooling import lean_max_pool_2x2, maxima_mask, scatter_to_maxima
from tinyvgg_jax.ops.varying import vary_alike

# Patches of this many output pixels are gathered at a time, so that they are still in the cache
# when they are multiplied, and the extra memory is bounded. It is the fastest of 196 to 25,088 on
# two cores of an AMD EPYC, at the model's own shapes.
_PIXELS_PER_CHUNK = 3136

# The gradients of images, kernel and bias.
Gradients = tuple[Array, Array, Array]


def _same_convolution(images: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def plain_convolution_relu(images: Array, kernel: Array, bias: Array) -> Array:
    """Computes `relu(convolution(images, kernel) + bias)` with stride 1 and SAME padding, by XLA.

    Args:
        images: `[B, H, W, C_in]`, floating.
        kernel: `[k_h, k_w, C_in, C_out]`, the dtype of `images`.
        bias: `[C_out]`, likewise.

    Returns:
        `[B, H, W, C_out]`, the same dtype.
    """
    # `bias` would broadcast without the new axes, unless a user has set
    # `jax_numpy_rank_promotion` to "raise".
    return jax.nn.relu(_same_convolution(images, kernel) + bias[None, None, None])


def _kernel_gradient_from_patches(
    images: Array, gradient: Array, kernel_size: tuple[int, int]
) -> Array:
    """Computes the kernel's gradient as a matrix product of image patches and output gradient.

    With P, `[pixels, k_h * k_w * C_in]`, the patch of the image that each output pixel depends on,
    and G, `[pixels, C_out]`, the output's gradient, it is P^T G, summed over chunks of images.

    Args:
        images: `[B, H, W, C_in]`.
        gradient: `[B, H, W, C_out]`.
        kernel_size: k_h and k_w.

    Returns:
        `[k_h, k_w, C_in, C_out]` float32.
    """
    (B, H, W, C_in), C_out = images.shape, gradient.shape[-1]
    k_h, k_w = kernel_size
    pad_h, pad_w = (k_h - 1) // 2, (k_w - 1) // 2
    padding = ((0, 0), (pad_h, k_h - 1 - pad_h), (pad_w, k_w - 1 - pad_w), (0, 0))
    # Every chunk has the same number of images, because `lax.scan` needs equal shapes.
    chunk = max(
        (n for n in range(1, B + 1) if B % n == 0 and n * H * W <= _PIXELS_PER_CHUNK), default=1
    )
    padded = jnp.pad(images, padding).reshape(B // chunk, chunk, H + k_h - 1, W + k_w - 1, C_in)
    gradients = gradient.reshape(B // chunk, chunk * H * W, C_out)

    def add_chunk(total: Array, images_and_gradient: tuple[Array, Array]) -> tuple[Array, None]:
        x, g = images_and_gradient
        # The patches of all pixels are k_h * k_w shifted copies of the images, side by side.
        shifted = [x[:, i : i + H, j : j + W] for i in range(k_h) for j in range(k_w)]
        patches = jnp.concatenate(shifted, axis=-1).reshape(chunk * H * W, k_h * k_w * C_in)
        product = lax.dot_general(
            patches, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return total + product, None

    zeros, *_ = vary_alike(jnp.zeros((k_h * k_w * C_in, C_out), jnp.float32), images, gradient)
    total, _ = lax.scan(add_chunk, zeros, (padded, gradients))
    return total.reshape(k_h, k_w, C_in, C_out)


def _runs_in_c(images: Array, kernel: Array) -> bool:
    """Tells whether `winograd.c` computes this convolution when it is lowered for a CPU."""
    return (
        images.dtype == kernel.dtype
        and images.dtype in (jnp.float32, jnp.bfloat16)
        and kernel.shape[:2] == (3, 3)
        and 0 not in images.shape + kernel.shape
        # A process that computes on a GPU has no use for the C code, so it does not compile it.
        and jax.default_backend() == "cpu"
        and winograd.available()
    )


def _gradients_in_c(images: Array, kernel: Array, gradient: Array, gate: Array) -> Gradients:
    """Computes all gradients by `winograd.c`; `winograd.input_gradient` describes `gate`."""
    of_images = winograd.input_gradient(gradient, gate, kernel, images.shape)
    return of_images, *winograd.parameter_gradient(images, gradient, gate)


def _gradients_in_xla(images: Array, kernel: Array, gradient: Array) -> Gradients:
    """Computes all gradients by XLA from the gradient behind the ReLU's gate."""
    of_images = _input_gradient(images, kernel, gradient)
    of_kernel = _kernel_gradient(images, kernel, gradient)
    return of_images, of_kernel, gradient.sum(axis=(0, 1, 2))


def _input_gradient(images: Array, kernel: Array, gradient: Array) -> Array:
    """Computes the images' gradient by XLA; it depends on the shape of `images` only."""
    return jax.vjp(partial(_same_convolution, kernel=kernel), images)[1](gradient)[0]


@jax.custom_batching.custom_vmap
def _kernel_gradient(images: Array, kernel: Array, gradient: Array) -> Array:
    """Computes the kernel's gradient by XLA; it depends on the shape of `kernel` only."""
    return jax.vjp(partial(_same_convolution, images), kernel)[1](gradient)[0]


@_kernel_gradient.def_vmap
def _kernel_gradients(
    runs: int, batched: list[bool], images: Array, kernel: Array, gradient: Array
) -> tuple[Array, bool]:
    """Computes the gradients of the kernels of several runs.

    From the gradient's own convolution, `vmap` would make one with a group of features for each
    run. XLA does not recognise that as the gradient of kernels, and runs it forwards, with windows
    as large as the images. The gradient of the mapped convolution is one with a group of the batch
    for each run, which it does recognise.
    """
    images, kernel, gradient = (
        array if mapped else jnp.broadcast_to(array, (runs, *array.shape))
        for array, mapped in zip((images, kernel, gradient), batched, strict=True)
    )
    convolve = jax.vmap(_same_convolution)
    return jax.vjp(partial(convolve, images), kernel)[1](gradient)[0], True


def convolution_relu(images: Array, kernel: Array, bias: Array) -> Array:
    """Computes `plain_convolution_relu` in the form that is fastest on the platform.

    It is differentiable in reverse mode only, and only once.

    Args:
        images: `[B, H, W, C_in]`, floating.
        kernel: `[k_h, k_w, C_in, C_out]`, the dtype of `images`.
        bias: `[C_out]`, likewise.

    Returns:
        `[B, H, W, C_out]`, the same dtype.
    """
    return _separate(*vary_alike(images, kernel, bias))


@jax.custom_vjp
def _separate(images: Array, kernel: Array, bias: Array) -> Array:
    """Computes `convolution_relu` of arrays that vary over the same mesh axes."""
    plain = plain_convolution_relu
    cpu = winograd.convolution_relu if _runs_in_c(images, kernel) else plain
    # The platform is chosen when the program is lowered, which may be for another one than that of
    # this process, for example by `jax.export`.
    return lax.platform_dependent(images, kernel, bias, cpu=cpu, default=plain)


def _forward(images: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    output = _separate(images, kernel, bias)
    # The output is in memory anyway, and where it is positive, ReLU lets the gradient through.
    return output, (images, kernel, output)


def _backward(residuals: tuple[Array, Array, Array], gradient: Array) -> Gradients:
    images, kernel, output = residuals

    def xla(images: Array, kernel: Array, gradient: Array, output: Array) -> Gradients:
        # Not `gradient * (output > 0)`, in which an infinite gradient times 0 would be NaN.
        return _gradients_in_xla(images, kernel, jnp.where(output > 0, gradient, 0))

    def patches(images: Array, kernel: Array, gradient: Array, output: Array) -> Gradients:
        gradient = jnp.where(output > 0, gradient, 0)
        # XLA is slow at the kernel's gradient only; that of the images is one more convolution.
        size = (kernel.shape[0], kernel.shape[1])
        of_kernel = _kernel_gradient_from_patches(images, gradient, size).astype(kernel.dtype)
        of_images = _input_gradient(images, kernel, gradient)
        return of_images, of_kernel, gradient.sum(axis=(0, 1, 2))

    cpu = _gradients_in_c if _runs_in_c(images, kernel) else patches
    return lax.platform_dependent(images, kernel, gradient, output, cpu=cpu, default=xla)


_separate.defvjp(_forward, _backward)


def convolution_relu_pool(images: Array, kernel: Array, bias: Array) -> Array:
    """Computes `lean_max_pool_2x2(convolution_relu(...))`, on a CPU as one operation.

    That operation writes a quarter of the convolution's output, the maxima. Like
    `convolution_relu`, it is differentiable in reverse mode only, and only once.

    Args:
        images: `[B, H, W, C_in]`, floating.
        kernel: `[k_h, k_w, C_in, C_out]`, the dtype of `images`.
        bias: `[C_out]`, likewise.

    Returns:
        `[B, H // 2, W // 2, C_out]`, the dtype of `images`.
    """
    # An image of one row or column has no 2x2 square, so there would be nothing to compute.
    if _runs_in_c(images, kernel) and min(images.shape[1:3]) >= 2:
        return _fused(*vary_alike(images, kernel, bias))
    return lean_max_pool_2x2(convolution_relu(images, kernel, bias))


@jax.custom_vjp
def _fused(images: Array, kernel: Array, bias: Array) -> Array:
    """Computes `convolution_relu_pool` where a CPU runs it in C."""
    return _fused_forward(images, kernel, bias)[0]


def _fused_forward(
    images: Array, kernel: Array, bias: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    def xla(images: Array, kernel: Array, bias: Array) -> tuple[Array, Array]:
        output = plain_convolution_relu(images, kernel, bias)
        pooled = lean_max_pool_2x2(output)
        # Where the maximum is not positive, ReLU lets no gradient through to any of the four.
        return pooled, jnp.where(pooled > 0, maxima_mask(output, pooled), jnp.uint8(0))

    # Both branches return the same two arrays, so that a program traced on a CPU can be lowered for
    # another platform.
    cpu = winograd.convolution_relu_pool
    pooled, maxima = lax.platform_dependent(images, kernel, bias, cpu=cpu, default=xla)
    # For the gradient a byte for each square is kept, instead of the four pixels' 16 bytes.
    return pooled, (images, kernel, maxima)


def _fused_backward(residuals: tuple[Array, Array, Array], gradient: Array) -> Gradients:
    images, kernel, maxima = residuals
    # Equal maxima receive equal parts, as in `lean_max_pool_2x2`. A square may have no bit set, and
    # the 1 keeps that from a division by zero.
    number = jnp.maximum(lax.population_count(maxima), jnp.uint8(1))
    gradient_share = gradient / number.astype(gradient.dtype)

    def xla(images: Array, kernel: Array, gradient_share: Array, maxima: Array) -> Gradients:
        of_output = scatter_to_maxima(gradient_share, maxima, images.shape[1:3])
        return _gradients_in_xla(images, kernel, of_output)

    return lax.platform_dependent(
        images, kernel, gradient_share, maxima, cpu=_gradients_in_c, default=xla
    )


_fused.defvjp(_fused_forward, _fused_backward)
