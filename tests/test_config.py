import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from tinyvgg_jax import config as config_lib
from tinyvgg_jax import model, optimizer
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.runs.files import write_json
from tinyvgg_jax.runs.folder import read_config


def test_the_default_is_the_papers_recipe() -> None:
    config = config_lib.validated(
        importlib.import_module("tinyvgg_jax.configs.default").get_config()
    )
    assert config.model.widths == (64, 128, 256)
    assert (config.model.convs_per_block, config.model.hidden) == (2, 256)
    assert (config.batch_size, config.num_epochs) == (32, 10)
    assert (config.learning_rate, config.momentum) == (0.01, 0.9)
    assert config.learning_rate_decay < 1
    assert config.augment.rotation_degrees > 0 and config.augment.horizontal_flip
    # The dataset's own splits; `test_own_data.py` tests which.
    assert config.data.train_split is config.data.validation_split is None


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py")))
def test_configs_survive_json_and_do_not_differ_from_themselves(name: str, tmp_path: Path) -> None:
    config = config_lib.validated(
        importlib.import_module(f"tinyvgg_jax.configs.{name}").get_config()
    )
    path = tmp_path / "config.json"
    write_json(path, config.to_dict())
    again = read_config(path.parent)
    assert again == config
    assert config_lib.differences(config, again) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, "config.batch_size must be at least 1, not 0"),
        ("num_epochs", 0, "config.num_epochs must be at least 1"),
        ("num_epochs", True, "config.num_epochs must be of type int"),
        ("seed", -1, "config.seed must be from 0"),
        ("learning_rate", -0.1, "must be a positive number"),
        ("learning_rate", float("nan"), "must be a positive number, not nan"),
        ("learning_rate_decay", 0.0, "must be a positive number"),
        ("momentum", 1.0, "less than 1"),
        ("dtype", "float8", "one of float32, bfloat16"),
        ("model.widths", (), "tuple of whole numbers"),
        ("model.widths", (8, 0), "tuple of whole numbers"),
        ("model.widths", (8.0,), "tuple of whole numbers"),
        ("num_seeds", 0, "from 1 to 1000"),
        ("ema_decay", 1.0, "less than 1"),
        ("label_smoothing", -0.1, "at least 0"),
        ("model.dropout", 1.0, "less than 1"),
        ("weight_decay", -1e-4, "0 or a positive number"),
        ("gradient_clipping", float("nan"), "0 or a positive number"),
        ("warmup_epochs", 4.0, "from 0 to config.num_epochs"),
        ("schedule", "sine", "one of exponential, cosine, linear"),
        ("optimizer", "adam", "one of sgd, muon"),
        ("model.kernel_init", "zeros", "one of lecun_normal, he_normal, orthogonal"),
        ("augment.shift_pixels", -1, "from 0 to 10,000"),
        ("augment.mixup_alpha", -0.1, "0 or a positive number"),
        ("augment.rotation_degrees", 181.0, "from 0 to 180"),
        ("augment.horizontal_flip", "yes", "must be of type bool"),
        ("data.pipeline", "steam", "one of auto, device, stream"),
        ("data.data_dir", 3, "must be of type str or None"),
        ("data.nmae", "x", "unknown config field 'data.nmae'; did you mean 'data.name'?"),
    ],
)
def test_what_is_wrong_is_named(config: ConfigDict, field: str, value: Any, message: str) -> None:
    content = config.to_dict()
    section, _, name = field.rpartition(".")
    (content[section] if section else content)[name] = value
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        config_lib.validated(content)


def test_a_field_that_is_wrong_in_a_file_is_named_with_the_file(
    config: ConfigDict, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    write_json(path, config.to_dict() | {"batch_size": 0})
    with pytest.raises(
        UserError, match=rf"{path} is not valid: config.batch_size must be at least 1"
    ):
        read_config(tmp_path)


def test_a_missing_field_is_named(config: ConfigDict) -> None:
    content = config.to_dict()
    del content["model"]["hidden"]
    with pytest.raises(UserError, match=r"no field 'model\.hidden'"):
        config_lib.validated(content)


def test_whole_numbers_and_lists_are_taken_where_they_are_meant(config: ConfigDict) -> None:
    content = json.loads(json.dumps(config.to_dict())) | {"learning_rate": 1}
    validated = config_lib.validated(content)
    assert validated.learning_rate == 1.0 and isinstance(validated.learning_rate, float)
    assert validated.model.widths == (4, 8)


def test_differences_name_fields_but_not_where_the_data_lies(config: ConfigDict) -> None:
    ours = config_lib.validated(config)
    config.data.data_dir = "/elsewhere"
    assert config_lib.differences(config_lib.validated(config), ours) == []
    config.model.hidden = 9
    assert config_lib.differences(config_lib.validated(config), ours) == ["model.hidden: 9, not 8"]


def test_every_choice_that_is_implemented_is_valid(config: ConfigDict) -> None:
    for field, names in (("optimizer", optimizer.OPTIMIZERS), ("schedule", optimizer.SCHEDULES)):
        for name in names:
            assert config_lib.validated(config.to_dict() | {field: name})[field] == name
    for name in model.KERNEL_INITS:
        config.model.kernel_init = name
        assert config_lib.validated(config).model.kernel_init == name


def test_every_field_stands_in_the_default_config_and_the_other_way_round() -> None:
    content = importlib.import_module("tinyvgg_jax.configs.default").get_config()
    assert sorted(name for name, _ in config_lib._flatten(content)) == sorted(config_lib.FIELDS)


def test_a_run_of_an_older_version_had_none_of_the_newer_parts(config: ConfigDict) -> None:
    content = config.to_dict()
    for field in config_lib.FIELDS:
        if config_lib.FIELDS[field].value_before is config_lib.REQUIRED:
            continue
        section, _, name = field.rpartition(".")
        del (content[section] if section else content)[name]
    assert config_lib.validated(content) == config_lib.validated(config)


def test_the_last_seed_must_be_one_too(config: ConfigDict) -> None:
    config.seed, config.num_seeds = 2**32 - 2, 2
    config_lib.validated(config)
    config.num_seeds = 3
    with pytest.raises(UserError, match="low enough for all seeds"):
        config_lib.validated(config)


def test_none_may_be_said_on_a_command_line() -> None:
    config = importlib.import_module("configs.default").get_config()
    for said in ("None", "", None):
        config.data.data_dir = said
        assert config_lib.validated(config).data.data_dir is None
