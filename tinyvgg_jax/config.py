"""The config of a run: one table of its fields, and their checks."""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tinyvgg_jax.errors import UserError

# A field that every config.json has ever had.
REQUIRED: Any = object()


class Check(NamedTuple):
    """A condition on a value, and its words in a message: "config.X must be ...".

    Attributes:
        holds: whether a value meets the condition.
        words: what a value must be; a function where they are expensive to know.
    """

    holds: Callable[[Any], bool]
    words: str | Callable[[], str]


class Field(NamedTuple):
    """A field of a config.

    Attributes:
        kind: its type, or several types.
        meaning: one line for people.
        checks: conditions on its value, checked in this order.
        value_before: value assumed for a config.json written before the field existed.
        affects_result: whether a changed value makes it a different run, which cannot go on in the
            same folder. `num_epochs` and `num_seeds` have rules of their own in `runs.folder`.
    """

    kind: type | tuple[type, ...]
    meaning: str
    checks: tuple[Check, ...] = ()
    value_before: Any = REQUIRED
    affects_result: bool = True


def _within(low: float, high: float, words: str) -> Check:
    return Check(lambda value: low <= value <= high, words)


def _one_of(*names: str) -> Check:
    return Check(lambda value: value in names, "one of " + ", ".join(names))


def _one_that_is_named_in(module: str, names: str) -> Check:
    """A choice whose names stand where they are implemented, which is imported when needed."""

    def known() -> tuple[str, ...]:
        return tuple(getattr(import_module(f"tinyvgg_jax.{module}"), names))

    return Check(lambda value: value in known(), lambda: "one of " + ", ".join(known()))


_AT_LEAST_1 = Check(lambda value: value >= 1, "at least 1")
# Beyond this, a typing error would end in a full memory and not in a message.
_AT_MOST_A_MILLION = Check(lambda value: value <= 1_000_000, "at most 1,000,000")
_POSITIVE = Check(lambda value: math.isfinite(value) and value > 0, "a positive number")
_NOT_NEGATIVE = Check(lambda value: 0 <= value < math.inf, "0 or a positive number")
_FRACTION = Check(lambda value: 0 <= value < 1, "at least 0 and less than 1")
_UNIT = _within(0, 1, "from 0 to 1")
_PIXELS = _within(0, 10_000, "from 0 to 10,000")
_WIDTHS = Check(
    lambda widths: (
        bool(widths) and all(type(width) is int and 1 <= width <= 100_000 for width in widths)
    ),
    "a tuple of whole numbers from 1 to 100,000",
)
_NOT_EMPTY = Check(bool, "the name of a dataset")
_FOLDER = _OPTIONAL = (str, type(None))

FIELDS: dict[str, Field] = {
    "seed": Field(
        int,
        "seed of all randomness of the run",
        (_within(0, 2**32 - 1, "from 0 to 4294967295"),),
    ),
    "num_seeds": Field(
        int,
        "number of runs, with this seed, the next, and so on",
        (_within(1, 1000, "from 1 to 1000"),),
        value_before=1,
        affects_result=False,
    ),
    "num_epochs": Field(
        int,
        "passes over the train split",
        (_AT_LEAST_1, _AT_MOST_A_MILLION),
        affects_result=False,
    ),
    "batch_size": Field(int, "images a step, over all devices", (_AT_LEAST_1, _AT_MOST_A_MILLION)),
    "num_devices": Field(
        (int, type(None)),
        "devices that share the work; all if left out",
        (Check(lambda value: value is None or value >= 1, "at least 1, or left out for all"),),
        value_before=None,
        affects_result=False,
    ),
    "learning_rate": Field(float, "highest learning rate", (_POSITIVE,)),
    "learning_rate_decay": Field(
        float, "factor of the learning rate from one epoch to the next", (_POSITIVE,)
    ),
    "schedule": Field(
        str,
        "how the learning rate falls",
        (_one_that_is_named_in("optimizer", "SCHEDULES"),),
        value_before="exponential",
    ),
    "warmup_epochs": Field(
        float, "epochs in which the learning rate rises from 0", (), value_before=0.0
    ),
    "optimizer": Field(
        str,
        "what turns gradients into updates",
        (_one_that_is_named_in("optimizer", "OPTIMIZERS"),),
        value_before="sgd",
    ),
    "momentum": Field(float, "decay of the accumulated gradients", (_FRACTION,)),
    "nesterov": Field(bool, "whether the momentum is Nesterov's", value_before=False),
    "weight_decay": Field(float, "decay of the kernels", (_NOT_NEGATIVE,), value_before=0.0),
    "gradient_clipping": Field(
        float, "upper bound of the gradients' norm, or 0", (_NOT_NEGATIVE,), value_before=0.0
    ),
    "label_smoothing": Field(
        float, "share of each target spread over all classes", (_FRACTION,), value_before=0.0
    ),
    "ema_decay": Field(
        float, "decay of a moving average of the parameters, or 0", (_FRACTION,), value_before=0.0
    ),
    "init_from": Field(
        (str, type(None)),
        "WORKDIR or WORKDIR:STEP of a run to start from",
        value_before=None,
    ),
    "freeze": Field(
        tuple,
        "layers that stay as they are",
        (
            Check(
                lambda names: all(isinstance(name, str) and name for name in names),
                "a tuple of layers' names",
            ),
        ),
        value_before=(),
    ),
    "dtype": Field(str, "dtype of the computation", (_one_of("float32", "bfloat16"),)),
    "profile": Field(
        bool, "whether to write a trace of some steps", value_before=False, affects_result=False
    ),
    "model.widths": Field(tuple, "filters of each block's convolutions", (_WIDTHS,)),
    "model.convs_per_block": Field(
        int,
        "convolutions in each block",
        (_AT_LEAST_1, Check(lambda value: value <= 100, "at most 100")),
    ),
    "model.hidden": Field(
        int, "width of the dense layer before the last", (_AT_LEAST_1, _AT_MOST_A_MILLION)
    ),
    "model.dropout": Field(
        float, "share of the dense layers' inputs that is dropped", (_FRACTION,), value_before=0.0
    ),
    "model.kernel_init": Field(
        str,
        "distribution of the kernels at the start",
        (_one_that_is_named_in("model", "KERNEL_INITS"),),
        value_before="lecun_normal",
    ),
    "augment.rotation_degrees": Field(
        float, "largest angle of a random rotation", (_within(0, 180, "from 0 to 180"),)
    ),
    "augment.horizontal_flip": Field(bool, "whether half of the images are mirrored, at random"),
    "augment.alternating_flip": Field(
        bool, "whether each image is mirrored every other epoch instead", value_before=False
    ),
    "augment.shift_pixels": Field(int, "largest random shift", (_PIXELS,), value_before=0),
    "augment.cutout_size": Field(
        int, "side of a square that is blackened", (_PIXELS,), value_before=0
    ),
    "augment.erasing": Field(
        float, "share of the images with a random rectangle erased", (_UNIT,), value_before=0.0
    ),
    "augment.mixup_alpha": Field(
        float, "how much images are mixed with others, or 0", (_NOT_NEGATIVE,), value_before=0.0
    ),
    "augment.scale": Field(
        float, "largest change of size, as a power of 2", (_NOT_NEGATIVE,), value_before=0.0
    ),
    "augment.aspect": Field(
        float,
        "largest change of width / height, as a power of 2",
        (_NOT_NEGATIVE,),
        value_before=0.0,
    ),
    "augment.shear_degrees": Field(
        float,
        "largest angle of a random shear",
        (_within(0, 80, "from 0 to 80"),),
        value_before=0.0,
    ),
    "augment.background": Field(
        float, "highest level of a random flat background", (_UNIT,), value_before=0.0
    ),
    "augment.gamma": Field(
        float, "largest change of gamma, as a power of 2", (_NOT_NEGATIVE,), value_before=0.0
    ),
    "augment.contrast": Field(
        float, "largest random change of contrast", (_UNIT,), value_before=0.0
    ),
    "augment.brightness": Field(
        float, "largest random change of brightness", (_UNIT,), value_before=0.0
    ),
    "augment.blur_sigma": Field(
        float,
        "largest standard deviation of a random blur, in pixels",
        (_within(0, 100, "from 0 to 100"),),
        value_before=0.0,
    ),
    "augment.noise": Field(
        float, "largest standard deviation of random noise", (_UNIT,), value_before=0.0
    ),
    "augment.inverted": Field(
        float, "share of the images whose garments are inverted", (_UNIT,), value_before=0.0
    ),
    "data.name": Field(str, "the tfds dataset", (_NOT_EMPTY,)),
    "data.data_dir": Field(_FOLDER, "tfds's folder of datasets", affects_result=False),
    "data.source_dir": Field(
        _FOLDER, "folder of pictures or IDX files to prepare from", affects_result=False
    ),
    "data.image_size": Field(
        (int, type(None)),
        "side in pixels of images prepared from pictures, or None for 28",
        (Check(lambda size: size is None or 8 <= size <= 1024, "None, or from 8 to 1024"),),
        value_before=None,
        affects_result=False,
    ),
    "data.channels": Field(
        (int, type(None)),
        "1 for grey or 3 for colour, or None for 1",
        (Check(lambda number: number in (None, 1, 3), "None, 1 or 3"),),
        value_before=None,
        affects_result=False,
    ),
    "data.fit": Field(
        (str, type(None)),
        "how pictures get to that size, or None for crop",
        (Check(lambda fit: fit in (None, "crop", "pad", "garment"), "crop, pad or garment"),),
        value_before=None,
        affects_result=False,
    ),
    "data.pipeline": Field(
        str,
        "where the images wait for their steps",
        (_one_of("auto", "device", "stream"),),
        affects_result=False,
    ),
    "data.train_split": Field(_OPTIONAL, "what is trained on, or None for the dataset's own"),
    "data.validation_split": Field(
        _OPTIONAL, "what is evaluated after every epoch, or None for the dataset's own"
    ),
    "data.test_split": Field(
        _OPTIONAL, "what is evaluated at the end, or None for the dataset's own"
    ),
}


def validated(config: ConfigDict | Mapping[str, Any]) -> ConfigDict:
    """Copies a config in which every field is there, of its type and in its range, and locks it.

    Args:
        config: the fields of `configs/default.py`, or the content of a run's `config.json`.

    Returns:
        The copy: tuples for lists, floats for whole numbers where a float is meant.

    Raises:
        UserError: naming the first field that is missing, unknown or wrong.
    """
    before = {
        name: field.value_before
        for name, field in FIELDS.items()
        if field.value_before is not REQUIRED
    }
    given = before | dict(_flatten(config))
    # A run's config.json, loaded as it is, holds its digest too.
    given.pop("sha256", None)
    for name in given:
        if name not in FIELDS:
            raise UserError(f"unknown config field {name!r}{suggestion(name, FIELDS)}")
    values = {}
    for name, field in FIELDS.items():
        if name not in given:
            raise UserError(f"the config has no field {name!r}.")
        values[name] = _of_type(name, given[name], field.kind)
        for check in field.checks:
            _require(name, values[name], check)
    _check_together(values)
    result = ConfigDict()
    for name, value in values.items():
        section, _, field_name = name.rpartition(".")
        if section and section not in result:
            result[section] = ConfigDict()
        (result[section] if section else result)[field_name] = value
    return result.lock()


def with_splits(config: ConfigDict, splits: Mapping[str, str]) -> ConfigDict:
    """Copies a validated config, with a dataset's own splits where it names none.

    Args:
        config: the config.
        splits: tfds specifications of train, validation and test.
    """
    result = ConfigDict(config.to_dict())
    for name, specification in splits.items():
        if result.data[f"{name}_split"] is None:
            result.data[f"{name}_split"] = specification
    return result.lock()


def suggestion(word: str, known: Any) -> str:
    """Ends a sentence with `; did you mean 'x'?`, the nearest known word, or a full stop."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def differences(ours: ConfigDict, theirs: ConfigDict) -> list[str]:
    """Lists the fields that differ and affect the result, like `seed: 1, not 0`."""
    a, b = dict(_flatten(ours)), dict(_flatten(theirs))
    names = [name for name in FIELDS if FIELDS[name].affects_result and a[name] != b[name]]
    return [f"{name}: {a[name]!r}, not {b[name]!r}" for name in names]


def flat(config: ConfigDict) -> dict[str, Any]:
    """Returns a config's fields by their names in `FIELDS`."""
    return dict(_flatten(config))


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
    if kind == _OPTIONAL and value in ("None", ""):
        # This is how None is said on a command line.
        value = None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise UserError(f"config.{name} must be of type {wanted}, not {value!r}.")
    return value


def _require(name: str, value: Any, check: Check) -> None:
    if not check.holds(value):
        words = check.words if isinstance(check.words, str) else check.words()
        raise UserError(f"config.{name} must be {words}, not {value!r}.")


def _check_together(values: dict[str, Any]) -> None:
    """Checks what concerns more than one field."""
    _require(
        "seed",
        values["seed"],
        Check(lambda seed: seed + values["num_seeds"] <= 2**32, "low enough for all seeds"),
    )
    _require(
        "warmup_epochs",
        values["warmup_epochs"],
        _within(0, values["num_epochs"], "from 0 to config.num_epochs"),
    )
