"""Tiny VGG: blocks of 3x3 convolutions with ReLU and 2x2 max pooling, then two dense layers."""

import math
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tinyvgg_jax.devices import Share
from tinyvgg_jax.ops.convolution import (
    convolution_relu,
    convolution_relu_pool,
    plain_convolution_relu,
)
from tinyvgg_jax.ops.pooling import max_pool_2x2

# Initial kernels. "lecun_normal", Flax's own choice, has variance 1 / fan-in; "he_normal" has twice
# that, because ReLU halves the variance (He et al., arXiv:1502.01852); "orthogonal" has the gain
# sqrt(2) for the same reason (Saxe et al., arXiv:1312.6120).
KERNEL_INITS = {
    "lecun_normal": nn.initializers.lecun_normal(),
    "he_normal": nn.initializers.he_normal(),
    "orthogonal": nn.initializers.orthogonal(scale=2**0.5),
}


class Dropout(nn.Module):
    """Dropout as `nn.Dropout` draws it, also of one device's share of a batch.

    Attributes:
        rate: fraction of the inputs that are dropped.
    """

    rate: float

    def __call__(self, x: Array, share: Share | None = None) -> Array:
        """Drops inputs `[B, features]`; needs a PRNG key named "dropout"."""
        if not self.rate:
            return x
        shape = (share.total if share else len(x), *x.shape[1:])
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        return jnp.where(share.of(kept) if share else kept, x / (1 - self.rate), 0)


class ConvReLU(nn.Module):
    """A 3x3 SAME convolution with bias and ReLU, optionally with 2x2 max pooling, in one operation.

    Attributes:
        features: number of filters.
        dtype: dtype of the computation; the parameters are float32.
        kernel_init: one of `KERNEL_INITS`, the distribution of the initial kernel.
        native: see `TinyVGG`.
    """

    features: int
    dtype: Any = jnp.float32
    kernel_init: str = "lecun_normal"
    native: bool = False

    @nn.compact
    def __call__(self, x: Array, pool: bool = False) -> Array:
        """Maps `[B, H, W, C]` to `[B, H, W, features]`, or pooled to half the height and width."""
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", KERNEL_INITS[self.kernel_init], shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        arguments = [array.astype(self.dtype) for array in (x, kernel, bias)]
        if self.native:
            return (convolution_relu_pool if pool else convolution_relu)(*arguments)
        output = plain_convolution_relu(*arguments)
        return max_pool_2x2(output) if pool else output


def apply(
    model: nn.Module,
    params: Any,
    images: Array,
    dropout_key: Array | None = None,
    share: Share | None = None,
) -> Array:
    """Calls `model.apply` for a model whose only variables are its parameters.

    Args:
        model: the network.
        params: its parameters.
        images: `[B, H, W, C]`, floating, in [0, 1].
        dropout_key: PRNG key for training with dropout; None drops nothing.
        share: the part of a larger batch that the images are; None for all of it.

    Returns:
        `[B, num_classes]` float32 logits.
    """
    if dropout_key is None:
        return cast(Array, model.apply({"params": params}, images))
    rngs = {"dropout": dropout_key}
    return cast(Array, model.apply({"params": params}, images, True, share, rngs=rngs))


def cast_params(model: nn.Module, params: Any) -> Any:
    """Casts parameters to the dtype of the computation, as every call of the model does.

    Who calls a model many times with the same parameters, and takes no gradient, casts them once.

    Args:
        model: the network.
        params: its parameters, float32.

    Returns:
        The tree in `model.dtype`; with it the model computes the same.
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, model.dtype), params)


def count_parameters(params: Any) -> int:
    """Counts the elements of all arrays in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class TinyVGG(nn.Module):
    """A small VGG (Simonyan & Zisserman, arXiv:1409.1556) without batch normalisation.

    The defaults have 1,736,906 parameters on 28x28x1 images. Parameters are float32.

    Attributes:
        widths: filters of the convolutions of each block; a 2x2 max pooling ends each block.
        convs_per_block: convolutions in each block, each 3x3, SAME, followed by ReLU.
        hidden: width of the dense layer before the last.
        num_classes: number of logits.
        dtype: dtype of the computation; the logits are float32 whatever it is.
        dropout: fraction of its inputs that each dense layer drops in training.
        kernel_init: one of `KERNEL_INITS`, the distribution of all initial kernels but the last.
        native: whether to compute convolutions on a CPU in C, several times faster than XLA does,
            and the gradient of pooling on any device in less memory. Training, evaluation and
            prediction turn it on. With it, gradients are of reverse mode and first order only
            (`jax.grad`, not `jax.jvp`), and `jax.export` refuses the program on a CPU. Without it,
            the network works under every JAX transformation. `model.clone(native=True)` is the
            same network with it, for the same parameters. `ops/README.md` has the details.
    """

    widths: Sequence[int] = (64, 128, 256)
    convs_per_block: int = 2
    hidden: int = 256
    num_classes: int = 10
    dtype: Any = jnp.float32
    dropout: float = 0.0
    kernel_init: str = "lecun_normal"
    native: bool = False

    def __post_init__(self) -> None:
        # With a list the network would not be hashable, as a static argument of `jax.jit` must be.
        object.__setattr__(self, "widths", tuple(self.widths))
        super().__post_init__()

    def setup(self) -> None:
        self.blocks = [
            [
                ConvReLU(
                    width, self.dtype, self.kernel_init, self.native, name=f"conv{block}_{layer}"
                )
                for layer in range(1, self.convs_per_block + 1)
            ]
            for block, width in enumerate(self.widths, start=1)
        ]
        kernel_init = KERNEL_INITS[self.kernel_init]
        self.dense = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=kernel_init)
        self.drop = Dropout(self.dropout)
        self.logits = nn.Dense(self.num_classes, dtype=self.dtype)

    def __call__(self, images: Array, train: bool = False, share: Share | None = None) -> Array:
        """Computes the logits.

        Args:
            images: `[B, H, W, C]`, floating, in [0, 1].
            train: whether to apply dropout, if the network has any; that needs a PRNG key named
                "dropout".
            share: the part of a larger batch that the images are; only dropout depends on it.

        Returns:
            `[B, num_classes]` float32 logits.

        Raises:
            ValueError: if `images` does not have four dimensions, or if its height or width is
                less than 2**(number of blocks), so that nothing is left after pooling.
        """
        self._check(images)
        x = images.astype(self.dtype)
        for *convolutions, last in self.blocks:
            for convolution in convolutions:
                x = convolution(x)
            x = last(x, pool=True)
        return self._head(x, train, share)

    def activations(self, images: Array) -> list[Array]:
        """Computes the output of each block's last convolution, before the pooling.

        Args:
            images: `[B, H, W, C]`, floating, in [0, 1].

        Returns:
            For each block i, counted from 0, `[B, H // 2**i, W // 2**i, widths[i]]`.

        Raises:
            ValueError: as a call does.
        """
        self._check(images)
        x = images.astype(self.dtype)
        outputs: list[Array] = []
        for block in self.blocks:
            if outputs:
                x = max_pool_2x2(x)
            for convolution in block:
                x = convolution(x)
            outputs.append(x)
        return outputs

    def classify(self, x: Array) -> Array:
        """Computes the logits from the last of the `activations`.

        Args:
            x: `[B, h, w, widths[-1]]`, the output of the last block before its pooling.

        Returns:
            `[B, num_classes]` float32 logits.
        """
        return self._head(max_pool_2x2(x), train=False)

    def _check(self, images: Array) -> None:
        if images.ndim != 4:
            raise ValueError(f"images must be [B, H, W, C], not of shape {images.shape}.")
        smallest = 2 ** len(self.widths)
        if min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"images of {images.shape[1]}x{images.shape[2]} pixels are too small for "
                f"{len(self.widths)} blocks: at least {smallest}x{smallest}, or fewer widths."
            )

    def _head(self, x: Array, train: bool, share: Share | None = None) -> Array:
        # The size is computed, because -1 would be ambiguous for an empty batch.
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        x = self.drop(x, share) if train else x
        x = nn.relu(self.dense(x))
        x = self.drop(x, share) if train else x
        return cast(Array, self.logits(x)).astype(jnp.float32)
