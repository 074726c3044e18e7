"""A small synthetic dataset in tfds's own format, and the real one where it is prepared."""

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tinyvgg_jax import train_and_evaluate
from tinyvgg_jax.data import DatasetInfo, Split, load_splits, prepare
from tinyvgg_jax.runs.files import read_json

ROOT = Path(__file__).parent.parent

# Most of the time goes into compiling, and little into running what is compiled. Here and in child
# processes, XLA's programs are the same, but LLVM does not optimise them, unless a level is given.
if "xla_backend_optimization_level" not in (flags := os.environ.get("XLA_FLAGS", "")):
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()

CLASSES = ("top", "upper", "middle", "lower", "bottom")
TRAIN_SIZE, TEST_SIZE = 330, 70


def synthetic_arrays(seed: int = 0) -> prepare.Arrays:
    """16x16 images with a bright bar, whose height is the class, in noise."""
    rng = np.random.default_rng(seed)

    def draw(size: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(len(CLASSES), size=size).astype(np.uint8)
        images = rng.integers(60, size=(size, 16, 16)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[1 + 3 * label : 3 + 3 * label, 4:12] = 220
        return images, labels

    return {"train": draw(TRAIN_SIZE), "test": draw(TEST_SIZE)}


def stored(path: Path) -> dict[str, Any]:
    """The content of one of a run's JSON files, without its digest."""
    content = read_json(path)
    assert content is not None, f"{path} is not there"
    return content


def in_its_place(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Makes a fault in which something else stands in a file's place."""

    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps the user's own cache out of the tests, and theirs out of the user's."""
    home = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(home)
    # The same small networks are compiled again and again, in child processes too.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(home / "compiled")
    jax.config.update("jax_compilation_cache_dir", str(home / "compiled"))
    for setting in ("min_entry_size_bytes", "min_compile_time_secs"):
        os.environ[f"JAX_PERSISTENT_CACHE_{setting.upper()}"] = "0"
        jax.config.update(f"jax_persistent_cache_{setting}", 0)
    return home


@pytest.fixture(scope="session", autouse=True)
def heed_ctrl_c() -> None:
    """Tests that run in the background of a shell inherit that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tfds folder with the dataset `bars`."""
    folder = tmp_path_factory.mktemp("tfds")
    scratch = tmp_path_factory.mktemp("scratch")
    prepare.write_dataset(synthetic_arrays(), "bars", CLASSES, scratch, folder)
    # Decoded too, which is logged when it happens: no test is to be the one that it happens to.
    load_splits("bars", {"train": "train", "test": "test"}, str(folder))
    return folder


@pytest.fixture
def config(data_dir: Path) -> ConfigDict:
    """A config that trains on `bars` in a second."""
    config: ConfigDict = importlib.import_module("tinyvgg_jax.configs.default").get_config()
    config.num_epochs = 3
    config.batch_size = 30
    config.learning_rate = 0.05
    config.model.widths = (4, 8)
    config.model.convs_per_block = 1
    config.model.hidden = 8
    config.data.name = "bars"
    config.data.data_dir = str(data_dir)
    config.data.train_split = "train[:250]"
    config.data.validation_split = "train[250:]"
    return config


@pytest.fixture(scope="session")
def trained(
    data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A finished run on `bars`, and its summary; not to be changed."""
    config = importlib.import_module("tinyvgg_jax.configs.default").get_config()
    config.num_epochs, config.batch_size, config.learning_rate = 3, 30, 0.1
    config.model.widths, config.model.convs_per_block, config.model.hidden = (4, 8), 1, 8
    config.data.name, config.data.data_dir = "bars", str(data_dir)
    config.data.train_split, config.data.validation_split = "train[:250]", "train[250:]"
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train_and_evaluate(config, workdir)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A `worlds.World`, whose users put it back first, by `world.reset()`."""
    from worlds import World

    return World(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def real_data() -> tuple[dict[str, Split], DatasetInfo]:
    """FashionMNIST, whole."""
    import tensorflow_datasets as tfds

    folder = Path(tfds.core.constants.DATA_DIR).expanduser() / "fashion_mnist"
    if not folder.exists():
        pytest.skip(
            "FashionMNIST is not prepared: run "
            "`python -m tinyvgg_jax.main --mode prepare --config configs/default.py`"
        )
    return load_splits("fashion_mnist", {"train": "train", "test": "test"})


@pytest.fixture(scope="session")
def command_line() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m tinyvgg_jax.main` with arguments."""

    def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tinyvgg_jax.main", *map(str, arguments)]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, **options
        )

    return run
