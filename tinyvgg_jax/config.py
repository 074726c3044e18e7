"""The config of a run: what may stand in it, how it is kept, and where two of them differ."""

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tinyvgg_jax.errors import UserError

DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("sgd", "muon")
SCHEDULES = ("exponential", "cosine", "linear")
KERNEL_INITS = ("lecun_normal", "he_normal", "orthogonal")
PIPELINES = ("auto", "device", "stream")
# Where the data lies is not part of what a run computes.
_NOT_COMPARED = ("profile", "data.data_dir", "data.source_dir")
# What was true of configs before these fields came.
_ONCE: dict[str, Any] = {
    "profile": False,
    "num_seeds": 1,
    "optimizer": "sgd",
    "nesterov": False,
    "weight_decay": 0.0,
    "gradient_clipping": 0.0,
    "schedule": "exponential",
    "warmup_epochs": 0.0,
    "label_smoothing": 0.0,
    "ema_decay": 0.0,
    "model.dropout": 0.0,
    "model.kernel_init": "lecun_normal",
    "augment.alternating_flip": False,
    "augment.shift_pixels": 0,
    "augment.cutout_size": 0,
    "augment.mixup_alpha": 0.0,
}

# Every field and its type.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "seed": int,
    "num_seeds": int,
    "num_epochs": int,
    "batch_size": int,
    "learning_rate": float,
    "learning_rate_decay": float,
    "schedule": str,
    "warmup_epochs": float,
    "optimizer": str,
    "momentum": float,
    "nesterov": bool,
    "weight_decay": float,
    "gradient_clipping": float,
    "label_smoothing": float,
    "ema_decay": float,
    "dtype": str,
    "profile": bool,
    "model.widths": tuple,
    "model.convs_per_block": int,
    "model.hidden": int,
    "model.dropout": float,
    "model.kernel_init": str,
    "augment.rotation_degrees": float,
    "augment.horizontal_flip": bool,
    "augment.alternating_flip": bool,
    "augment.shift_pixels": int,
    "augment.cutout_size": int,
    "augment.mixup_alpha": float,
    "data.name": str,
    "data.data_dir": (str, type(None)),
    "data.source_dir": (str, type(None)),
    "data.pipeline": str,
    "data.train_split": str,
    "data.validation_split": str,
    "data.test_split": str,
}


def validated(config: ConfigDict | Mapping[str, Any]) -> ConfigDict:
    """A frozen copy of a config in which every field is there, of its type and in its range.

    Args:
        config: the fields of `configs/default.py`.

    Returns:
        The copy: tuples for lists, floats for whole numbers where a float is meant.

    Raises:
        UserError: naming the first field that is missing, unknown or wrong.
    """
    given = _ONCE | dict(_flatten(config))
    for name in given:
        if name not in FIELDS:
            raise UserError(f"unknown config field {name!r}{suggestion(name, FIELDS)}")
    values = {}
    for name, kind in FIELDS.items():
        if name not in given:
            raise UserError(f"the config has no field {name!r}.")
        values[name] = _of_type(name, given[name], kind)
    _check_ranges(values)
    result = ConfigDict()
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        if section and section not in result:
            result[section] = ConfigDict()
        (result[section] if section else result)[field] = value
    return result.lock()


def suggestion(word: str, known: Any) -> str:
    """`; did you mean 'x'?` with the nearest of the known words, or a full stop."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def to_json(config: ConfigDict) -> str:
    """The config as JSON text."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_file(path: Path) -> ConfigDict:
    """Reads a config that `to_json` wrote.

    Raises:
        UserError: if there is none, or it is not a valid config.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no run: there is no {path.name} in it.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a config.")
    return validated(content)


def differences(ours: ConfigDict, theirs: ConfigDict) -> list[str]:
    """One text for each field that differs and matters to the result, like `seed: 1, not 0`."""
    a, b = dict(_flatten(ours)), dict(_flatten(theirs))
    names = [name for name in FIELDS if name not in _NOT_COMPARED and a[name] != b[name]]
    return [f"{name}: {a[name]!r}, not {b[name]!r}" for name in names]


def _flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    content = config.to_dict() if isinstance(config, ConfigDict) else config
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _of_type(name: str, value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if value in ("None", "") and kind == (str, type(None)):
        # This is how None is said on a command line.
        value = None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise UserError(f"config.{name} must be of type {wanted}, not {value!r}.")
    return value


def _check_ranges(values: dict[str, Any]) -> None:
    def require(name: str, holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"config.{name} must be {what}, not {values[name]!r}.")

    for name in ("num_epochs", "batch_size", "model.convs_per_block", "model.hidden"):
        require(name, values[name] >= 1, "at least 1")
    # Beyond these, a typing error would end in a full memory and not in a message.
    for name in ("model.hidden", "batch_size", "num_epochs"):
        require(name, values[name] <= 1_000_000, "at most 1,000,000")
    require("model.convs_per_block", values["model.convs_per_block"] <= 100, "at most 100")
    require("seed", 0 <= values["seed"] < 2**32, "from 0 to 4294967295")
    for name in ("learning_rate", "learning_rate_decay"):
        require(name, math.isfinite(values[name]) and values[name] > 0, "a positive number")
    require("num_seeds", 1 <= values["num_seeds"] <= 1000, "from 1 to 1000")
    require("seed", values["seed"] + values["num_seeds"] <= 2**32, "low enough for all seeds")
    for name in ("momentum", "label_smoothing", "ema_decay", "model.dropout"):
        require(name, 0 <= values[name] < 1, "at least 0 and less than 1")
    for name in ("weight_decay", "gradient_clipping", "augment.mixup_alpha"):
        require(name, 0 <= values[name] < math.inf, "0 or a positive number")
    warmup, epochs = values["warmup_epochs"], values["num_epochs"]
    require("warmup_epochs", 0 <= warmup <= epochs, "from 0 to config.num_epochs")
    for name in ("augment.shift_pixels", "augment.cutout_size"):
        require(name, 0 <= values[name] <= 10_000, "from 0 to 10,000")
    for name, known in (
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("model.kernel_init", KERNEL_INITS),
    ):
        require(name, values[name] in known, "one of " + ", ".join(known))
    require("dtype", values["dtype"] in DTYPES, "one of " + ", ".join(DTYPES))
    widths = values["model.widths"]
    whole = all(type(width) is int and 1 <= width <= 100_000 for width in widths)
    require("model.widths", bool(widths) and whole, "a tuple of whole numbers from 1 to 100,000")
    rotation = values["augment.rotation_degrees"]
    require("augment.rotation_degrees", 0 <= rotation <= 180, "from 0 to 180")
    require("data.pipeline", values["data.pipeline"] in PIPELINES, "one of " + ", ".join(PIPELINES))
    require("data.name", bool(values["data.name"]), "the name of a dataset")
