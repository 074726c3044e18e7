"""Export for PyTorch and back: its layout of the parameters, in a safetensors file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyvgg_jax.errors import UserError
from tinyvgg_jax.export import card as cards
from tinyvgg_jax.export.card import Card
from tinyvgg_jax.export.layers import channels_first, check_shapes, layers_of
from tinyvgg_jax.export.loaded import Call, call_in_jax
from tinyvgg_jax.model import TinyVGG


def to_torch(
    model: TinyVGG, params: Any, image_shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """Converts parameters to the layout of PyTorch.

    Args:
        model: the network.
        params: its parameters.
        image_shape: `(H, W, C)` of its images.

    Returns:
        For each layer, `NAME.weight` and `NAME.bias`, float32: a state dict of the module that
        `torch_module` shows. Kernels of convolutions are `[C_out, C_in, 3, 3]`, those of dense
        layers `[outputs, inputs]`.
    """
    tensors = {}
    for layer in channels_first(layers_of(model, params, image_shape), image_shape):
        tensors[f"{layer.name}.weight"], tensors[f"{layer.name}.bias"] = layer.kernel, layer.bias
    return tensors


def to_safetensors(tensors: dict[str, np.ndarray], card: Card) -> bytes:
    """Serialises tensors and a network's card as the bytes of a safetensors file."""
    from safetensors.numpy import save

    return bytes(save(tensors, {cards.KEY: cards.to_text(card, save(tensors))}))


def from_torch(
    tensors: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> tuple[TinyVGG, dict[str, Any]]:
    """Converts a state dict of PyTorch to a network and its parameters.

    Args:
        tensors: NumPy arrays or tensors, named and shaped as `to_torch` returns them.
        image_shape: `(H, W, C)` of the network's images, which the shapes alone do not tell.

    Returns:
        `(model, params)`, ready for `model.apply({"params": params}, images)`.

    Raises:
        UserError: if tensors are missing, superfluous, or do not fit together.
    """
    try:
        arrays = {name: _array(tensor) for name, tensor in tensors.items()}
        model = _model_of(arrays)
        params = _params_of(arrays, model, image_shape)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"these tensors are not those of a Tiny VGG: {error}.") from error
    return model, params


def _array(tensor: Any) -> np.ndarray:
    """Converts an array, or a tensor of PyTorch on any device and of any dtype, to float32."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().float().cpu()
    return np.asarray(tensor, np.float32)


def _model_of(arrays: dict[str, np.ndarray]) -> TinyVGG:
    """Infers the network from the names and shapes of its tensors."""
    kernels = [name for name in arrays if name.startswith("conv") and name.endswith(".weight")]
    places = sorted(
        tuple(int(number) for number in name[4 : -len(".weight")].split("_")) for name in kernels
    )
    if not places:
        raise ValueError("there is no conv1_1.weight")
    blocks, convs_per_block = places[-1]
    model = TinyVGG(
        widths=[len(arrays[f"conv{block}_1.weight"]) for block in range(1, blocks + 1)],
        convs_per_block=convs_per_block,
        hidden=len(arrays["dense.weight"]),
        num_classes=len(arrays["logits.weight"]),
    )
    layers = [f"conv{b}_{n}" for b in range(1, blocks + 1) for n in range(1, convs_per_block + 1)]
    expected = {f"{x}.{part}" for x in [*layers, "dense", "logits"] for part in ("weight", "bias")}
    if arrays.keys() != expected:
        raise ValueError(f"missing or superfluous: {', '.join(sorted(arrays.keys() ^ expected))}")
    return model


def _params_of(
    arrays: dict[str, np.ndarray], model: TinyVGG, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Converts tensors to parameters in the layout of Flax, and checks their shapes."""
    params: dict[str, Any] = {}
    for name in dict.fromkeys(tensor.partition(".")[0] for tensor in arrays):
        weight = arrays[f"{name}.weight"]
        if name == "dense":
            h, w = (size >> len(model.widths) for size in image_shape[:2])
            # PyTorch flattens in the order (channel, height, width).
            weight = weight.reshape(len(weight), -1, h, w).transpose(0, 2, 3, 1)
            weight = weight.reshape(len(weight), -1)
        kernel = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        params[name] = {"kernel": np.ascontiguousarray(kernel), "bias": arrays[f"{name}.bias"]}
    check_shapes(model, params, image_shape)
    return params


def torch_module(model: TinyVGG, image_shape: tuple[int, int, int]) -> str:
    """Writes the PyTorch module into which the tensors of `to_torch` load.

    Args:
        model: the network.
        image_shape: `(H, W, C)` of its images.

    Returns:
        Python code that makes `model`, whose input is `[B, C, H, W]` float32 in [0, 1].
    """
    lines = ["from collections import OrderedDict", "", "from torch import nn", ""]
    lines += ["model = nn.Sequential(OrderedDict(["]
    channels = image_shape[2]
    for block, width in enumerate(model.widths, start=1):
        for number in range(1, model.convs_per_block + 1):
            name = f"conv{block}_{number}"
            lines.append(
                f'    ("{name}", nn.Conv2d({channels}, {width}, 3, padding=1)), '
                f'("relu{block}_{number}", nn.ReLU()),'
            )
            channels = width
        lines.append(f'    ("pool{block}", nn.MaxPool2d(2)),')
    h, w = (size >> len(model.widths) for size in image_shape[:2])
    lines += [
        '    ("flatten", nn.Flatten()),',
        f'    ("dense", nn.Linear({channels * h * w}, {model.hidden})), ("relu", nn.ReLU()),',
        f'    ("logits", nn.Linear({model.hidden}, {model.num_classes})),',
        "]))",
    ]
    return "\n".join(lines)


def load_call(
    path: Path, model: TinyVGG, image_shape: tuple[int, int, int]
) -> tuple[Call, Call | None]:
    """Loads a safetensors file into PyTorch if it is installed, else back into JAX.

    Args:
        path: the file.
        model: the network, which the module is made for.
        image_shape: `(H, W, C)` of its images.

    Returns:
        A function from uint8 images `[B, H, W, C]` to probabilities; and the same on one thread,
        None without PyTorch.
    """
    from safetensors.numpy import load_file

    tensors = load_file(path)
    try:
        import torch
    except ImportError:
        network, params = from_torch(tensors, image_shape)
        return call_in_jax(network, params), None
    names: dict[str, Any] = {}
    exec(torch_module(model, image_shape), names)
    module = names["model"]
    module.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})

    def call(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            x = torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2)
            return np.asarray(module(x).softmax(dim=1))

    def on_one_thread(images: np.ndarray) -> np.ndarray:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call(images)
        finally:
            torch.set_num_threads(threads)

    return call, on_one_thread
