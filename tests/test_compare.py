import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import stored
from ml_collections import ConfigDict
from PIL import Image
from scipy import stats

from tinyvgg_jax import UserError, train_and_evaluate
from tinyvgg_jax.report.compare import Welch, compare_runs, comparison_table, write_comparison
from tinyvgg_jax.report.scores import McNemar

Trained = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def twin(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run again, under a longer name and without a summary."""
    folder = tmp_path_factory.mktemp("twin")
    shutil.copytree(trained[0], folder, dirs_exist_ok=True)
    (folder / "summary.json").unlink()
    return folder


def test_runs_are_compared_on_the_same_images(
    trained: Trained, twin: Path, config: ConfigDict, tmp_path: Path
) -> None:
    workdir, summary = trained
    config.learning_rate, config.num_epochs = 1e-6, 1
    untrained = tmp_path / "untrained"
    poor = train_and_evaluate(config, untrained)["test_accuracy"]
    comparison = compare_runs([workdir, twin, untrained])
    first, second, third = comparison.runs
    assert first.accuracy == second.accuracy == summary["test_accuracy"]
    assert third.accuracy == poor
    assert third.interval[0] < third.accuracy < third.interval[1]
    assert first.parameters == summary["parameters"]
    assert (first.seconds, second.seconds) == (summary["seconds"], None)
    same = comparison.tests[0, 1]
    assert isinstance(same, McNemar) and same.p_value == 1.0
    test = comparison.tests[0, 2]
    assert isinstance(test, McNemar)
    assert test.only_first == (first.correct & ~third.correct).sum()
    assert test.p_value < 0.01
    table = comparison_table(comparison)
    assert f"{summary['test_accuracy']:.2%}" in table
    assert "1 and 2: +0.00 points, not significant" in table
    assert re.search(r"1 and 3: .* points, significant \(McNemar's test, p = ", table)

    picture = write_comparison(comparison, tmp_path / "new" / "plot.png")
    with Image.open(picture) as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
    content = json.loads((tmp_path / "new" / "plot.png.json").read_text())
    assert [run["accuracy"] for run in content["runs"]] == [first.accuracy] * 2 + [poor]
    assert len(content["tests"]) == 3


def test_different_images_are_not_compared(trained: Trained, twin: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(twin, other)
    content = stored(other / "config.json")
    content["data"]["test_split"] = "test[:50]"
    (other / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="different test splits"):
        compare_runs([trained[0], other])


def test_recipes_of_several_seeds_are_compared_by_their_means(
    config: ConfigDict, tmp_path: Path, trained: Trained
) -> None:
    config.num_seeds, config.num_epochs = 3, 1
    good, poor = tmp_path / "good", tmp_path / "poor"
    config.learning_rate = 0.1
    train_and_evaluate(config, good)
    config.learning_rate = 1e-6
    train_and_evaluate(config, poor)
    comparison = compare_runs([good, poor, trained[0]])
    first, second, _ = comparison.runs
    assert len(first.accuracies) == 3
    assert first.accuracy == pytest.approx(np.mean(first.accuracies))
    test = comparison.tests[0, 1]
    assert isinstance(test, Welch)
    expected = stats.ttest_ind(first.accuracies, second.accuracies, equal_var=False)
    assert test.p_value == pytest.approx(expected.pvalue)
    assert test.interval[0] < first.accuracy - second.accuracy < test.interval[1]
    assert comparison.tests[0, 2] is None
    table = comparison_table(comparison)
    assert "Welch" in table and "no test of several seeds against a single one" in table
    write_comparison(comparison, tmp_path / "plot.png")
