"""Tiny VGG on FashionMNIST in purely functional JAX.

Importing this package is nearly free: each name below is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyvgg_jax.errors import DivergedError as DivergedError
    from tinyvgg_jax.errors import InterruptedRunError as InterruptedRunError
    from tinyvgg_jax.errors import LostProcessError as LostProcessError
    from tinyvgg_jax.errors import UserError as UserError
    from tinyvgg_jax.model import TinyVGG as TinyVGG
    from tinyvgg_jax.predict import Predictions as Predictions
    from tinyvgg_jax.predict import Predictor as Predictor
    from tinyvgg_jax.predict import load_predictor as load_predictor
    from tinyvgg_jax.runs.restore import restore as restore
    from tinyvgg_jax.train import train_and_evaluate as train_and_evaluate

__version__ = "0.1.0"

_HOME = {
    "TinyVGG": "tinyvgg_jax.model",
    "DivergedError": "tinyvgg_jax.errors",
    "InterruptedRunError": "tinyvgg_jax.errors",
    "LostProcessError": "tinyvgg_jax.errors",
    "UserError": "tinyvgg_jax.errors",
    "Predictions": "tinyvgg_jax.predict",
    "Predictor": "tinyvgg_jax.predict",
    "load_predictor": "tinyvgg_jax.predict",
    "restore": "tinyvgg_jax.runs.restore",
    "train_and_evaluate": "tinyvgg_jax.train",
}
__all__ = [
    "DivergedError",
    "InterruptedRunError",
    "LostProcessError",
    "Predictions",
    "Predictor",
    "TinyVGG",
    "UserError",
    "load_predictor",
    "restore",
    "train_and_evaluate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except AttributeError as error:
        # Python would take it for "there is no such name here".
        raise ImportError(f"{_HOME[name]} cannot be imported: {error}") from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
