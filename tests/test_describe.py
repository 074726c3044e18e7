"""The table of a network's layers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from tinyvgg_jax import TinyVGG, UserError
from tinyvgg_jax.config import validated
from tinyvgg_jax.configs import default
from tinyvgg_jax.model import count_parameters
from tinyvgg_jax.report.describe import (
    describe_model,
    layers_table,
    model_of_config,
    model_of_run,
)
from tinyvgg_jax.runs.restore import abstract_params

Trained = tuple[Path, dict[str, Any]]


def test_the_papers_network_layer_by_layer() -> None:
    layers = describe_model(TinyVGG(), (28, 28, 1))
    assert [(layer.name, layer.output) for layer in layers] == [
        ("conv1_1", (28, 28, 64)),
        ("conv1_2", (14, 14, 64)),
        ("conv2_1", (14, 14, 128)),
        ("conv2_2", (7, 7, 128)),
        ("conv3_1", (7, 7, 256)),
        ("conv3_2", (3, 3, 256)),
        ("dense", (256,)),
        ("logits", (10,)),
    ]
    # Each of the H * W * features outputs is a sum of 9 * channels products.
    assert [layer.multiply_adds for layer in layers] == [
        28 * 28 * 64 * 9 * 1,
        28 * 28 * 64 * 9 * 64,
        14 * 14 * 128 * 9 * 64,
        14 * 14 * 128 * 9 * 128,
        7 * 7 * 256 * 9 * 128,
        7 * 7 * 256 * 9 * 256,
        3 * 3 * 256 * 256,
        256 * 10,
    ]
    table = layers_table(layers, (28, 28, 1))
    assert table.splitlines()[-2].split() == ["total", "1,736,906", "116,649,472"]
    assert table.splitlines()[-1].startswith("6.95 MB of parameters in float32")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("native", [False, True])
def test_any_network_has_its_own_parameters_and_shapes(dtype: Any, native: bool) -> None:
    model = TinyVGG(
        # More than nine blocks or layers: their names do not sort as they are computed.
        widths=(3, 5),
        convs_per_block=11,
        hidden=7,
        num_classes=4,
        dtype=dtype,
        dropout=0.5,
        native=native,
    )
    images = jax.ShapeDtypeStruct((2, 21, 34, 3), jnp.float32)
    params = abstract_params(model, (21, 34, 3))
    layers = describe_model(model, (21, 34, 3))
    names = [f"conv{block}_{layer}" for block in (1, 2) for layer in range(1, 12)]
    assert [layer.name for layer in layers] == [*names, "dense", "logits"]
    for layer in layers:
        assert layer.parameters == count_parameters(params[layer.name])
        assert layer.kernel == params[layer.name]["kernel"].shape
        assert layer.multiply_adds > 0
    assert sum(layer.parameters for layer in layers) == count_parameters(params)
    keep = partial(model.apply, capture_intermediates=True, mutable="intermediates")
    _, state = jax.eval_shape(keep, {"params": params}, images)
    for layer in layers:
        (output,) = state["intermediates"][layer.name]["__call__"]
        assert layer.output == output.shape[1:]


def test_a_config_needs_no_dataset_if_it_is_fashion_mnist(tmp_path: Path) -> None:
    config = default.get_config()
    config.data.data_dir = str(tmp_path / "none")
    model, shape = model_of_config(validated(config))
    assert (shape, model.num_classes) == ((28, 28, 1), 10)
    assert not (tmp_path / "none").exists()
    config.data.name = "unheard_of"
    with pytest.raises(UserError, match="no prepared dataset 'unheard_of'"):
        model_of_config(validated(config))


def test_a_prepared_dataset_and_a_run_tell_the_shape(config: ConfigDict, trained: Trained) -> None:
    of_config, of_run = model_of_config(validated(config)), model_of_run(trained[0])
    assert of_config == of_run
    assert of_run[1] == (16, 16, 1)
    total = sum(layer.parameters for layer in describe_model(*of_run))
    assert total == trained[1]["parameters"]
    with pytest.raises(UserError, match="holds no run"):
        model_of_run(trained[0].parent)


def test_the_command_line_describes(trained: Trained, command_line: Callable[..., Any]) -> None:
    done = command_line("--mode=describe", f"--workdir={trained[0]}")
    assert done.returncode == 0, done.stderr
    assert f"{trained[1]['parameters']:,}" in done.stdout
    for arguments in ([], [f"--workdir={trained[0]}", "--config=quick"]):
        done = command_line("--mode=describe", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert "needs either --config or --workdir" in line
