"""Tiny VGG on FashionMNIST in purely functional JAX.

Importing this package is nearly free: each name below is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyvgg_jax.errors import DivergedError as DivergedError
    from tinyvgg_jax.errors import InterruptedRunError as InterruptedRunError
    from tinyvgg_jax.errors import UserError as UserError
    from tinyvgg_jax.evaluate import restore as restore
    from tinyvgg_jax.model import TinyVGG as TinyVGG
    from tinyvgg_jax.train import train_and_evaluate as train_and_evaluate

__version__ = "0.1.0"

_HOME = {
    "TinyVGG": "tinyvgg_jax.model",
    "DivergedError": "tinyvgg_jax.errors",
    "InterruptedRunError": "tinyvgg_jax.errors",
    "UserError": "tinyvgg_jax.errors",
    "restore": "tinyvgg_jax.evaluate",
    "train_and_evaluate": "tinyvgg_jax.train",
}
__all__ = [
    "DivergedError",
    "InterruptedRunError",
    "TinyVGG",
    "UserError",
    "restore",
    "train_and_evaluate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
