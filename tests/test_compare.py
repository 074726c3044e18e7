import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, stored
from ml_collections import ConfigDict
from PIL import Image
from scipy import stats

from tinyvgg_jax import UserError, train_and_evaluate
from tinyvgg_jax.report import compare
from tinyvgg_jax.report.compare import (
    ComparedRun,
    Welch,
    compare_runs,
    comparison_table,
    write_comparison,
)
from tinyvgg_jax.report.scores import McNemar
from tinyvgg_jax.runs import seeds

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
    assert third.interval is not None
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
    assert test.interval is not None
    assert test.interval[0] < first.accuracy - second.accuracy < test.interval[1]
    assert comparison.tests[0, 2] is None
    table = comparison_table(comparison)
    assert "Welch" in table and "no test of several seeds against a single one" in table
    write_comparison(comparison, tmp_path / "plot.png")


def test_two_seeds_have_a_deviation_but_no_interval(
    config: ConfigDict, tmp_path: Path, trained: Trained
) -> None:
    config.num_seeds, config.num_epochs, config.learning_rate = 2, 1, 0.01
    train_and_evaluate(config, tmp_path / "two")
    comparison = compare_runs([tmp_path / "two", tmp_path / "two", trained[0]])
    two = comparison.runs[0]
    assert two.interval is None
    assert two.std == pytest.approx(np.std(two.accuracies, ddof=1))
    test = comparison.tests[0, 1]
    assert isinstance(test, Welch) and test.interval is None and test.p_value == 1
    table = comparison_table(comparison)
    assert table.splitlines()[1].split()[3:6] == ["2", f"{two.std:.2%}", "-"]
    assert "Two seeds give no useful interval" in table
    write_comparison(comparison, tmp_path / "plot.png")
    assert json.loads((tmp_path / "plot.png.json").read_text())["runs"][0]["interval"] is None


def _run(name: str, accuracies: list[float]) -> ComparedRun:
    found = seeds.statistics_of(accuracies)
    interval = found["interval"]
    return ComparedRun(
        name, 1, found["mean"], found["std"], interval, 1, None, accuracies, np.zeros(1, bool)
    )


def test_an_interval_of_differences_stays_within_minus_1_and_1() -> None:
    test = compare._test(_run("a", [0.1, 0.9, 1.0]), _run("b", [0.0, 0.1, 0.9]))
    assert isinstance(test, Welch) and test.interval is not None
    assert -1 <= test.interval[0] < test.interval[1] <= 1
    found = stats.ttest_ind([0.1, 0.9, 1.0], [0.0, 0.1, 0.9], equal_var=False)
    assert found.confidence_interval(0.95).high > 1


def test_seeds_that_do_not_vary_are_compared_without_a_warning() -> None:
    run, better = _run("a", [0.5, 0.5, 0.5]), _run("b", [0.75] * 3)
    # One of two that varies is enough for a test.
    found = compare._test(run, _run("c", [0.5, 0.6, 0.7]))
    assert isinstance(found, Welch) and 0.2 < found.p_value < 0.3
    same = compare._test(run, run)
    assert isinstance(same, Welch) and same.p_value == 1
    # One image of a small split would make the difference certain.
    test = compare._test(run, better)
    assert test is None
    line = compare._test_line(run, better, test)
    assert line == "-25.00 points; no test, since neither accuracy varies between seeds"


def test_what_is_no_run_is_left_out_and_named(
    trained: Trained, twin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "comparison.png").touch()
    (tmp_path / "notes").mkdir()
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_text((trained[0] / "config.json").read_text())
    others = [tmp_path / "comparison.png", tmp_path / "notes", begun]
    comparison = compare_runs([others[0], trained[0], *others[1:], twin])
    assert [run.name for run in comparison.runs] == [str(trained[0]), str(twin)]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("Left out, because they hold no run, or no checkpoint yet: ")
    assert all(str(path) in message for path in others)
    with pytest.raises(UserError, match=r"two runs or more; these hold no run, .*notes"):
        compare_runs([trained[0], tmp_path / "notes"])
    # A shell's pattern never gives it, so it is a mistyped name.
    with pytest.raises(UserError, match=r"there is no folder .*mistyped"):
        compare_runs([trained[0], twin, tmp_path / "mistyped"])
    with pytest.raises(UserError, match=r"nnn cannot be read: File name too long"):
        compare_runs([trained[0], twin, tmp_path / ("n" * 300)])


def test_a_folder_that_may_not_be_entered_is_left_out(
    trained: Trained,
    twin: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    stat = Path.stat

    def refuse(path: Path, **options: Any) -> Any:  # Root may enter every folder.
        if path.parent == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    assert len(compare_runs([trained[0], closed, twin]).runs) == 2
    assert f"Left out, because they cannot be read: {closed}" in caplog.text


def test_it_writes_only_where_it_is_told_to(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "tinyvgg_jax.main", "--mode=compare", *[str(trained[0])] * 2]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "1 and 2: +0.00 points" in done.stdout and "plot:" not in done.stdout
    assert list(tmp_path.iterdir()) == []
    done = subprocess.run(
        [*command, "--output=x.png"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("plot: x.png\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.png", "x.png.json"]
