"""Exported networks: plain functions from a model and its parameters to other formats, and back.

Each name below is imported on first use, and the libraries of a format when it is called.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyvgg_jax.export.litert import to_litert as to_litert
    from tinyvgg_jax.export.loaded import load as load
    from tinyvgg_jax.export.onnx import to_onnx as to_onnx
    from tinyvgg_jax.export.page import to_page as to_page
    from tinyvgg_jax.export.run import export_run as export_run
    from tinyvgg_jax.export.stablehlo import to_stablehlo as to_stablehlo
    from tinyvgg_jax.export.torch import from_torch as from_torch
    from tinyvgg_jax.export.torch import to_torch as to_torch

_HOME = {
    "export_run": "run",
    "from_torch": "torch",
    "load": "loaded",
    "to_litert": "litert",
    "to_onnx": "onnx",
    "to_page": "page",
    "to_stablehlo": "stablehlo",
    "to_torch": "torch",
}
__all__ = [
    "export_run",
    "from_torch",
    "load",
    "to_litert",
    "to_onnx",
    "to_page",
    "to_stablehlo",
    "to_torch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
