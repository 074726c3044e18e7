import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn

from tinyvgg_jax.report.scores import (
    accuracy_interval,
    calibration,
    confusion_matrix,
    mcnemar,
    precision_recall_f1,
    top_confusions,
)


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(4, size=(2, 60))
    # A class that never occurs, and one that is never predicted.
    labels[labels == 2] = 1
    predicted[predicted == 3] = 0
    confusion = confusion_matrix(labels, predicted, 5)
    expected = sklearn.confusion_matrix(labels, predicted, labels=range(5))
    np.testing.assert_array_equal(confusion, expected)
    scores = sklearn.precision_recall_fscore_support(
        labels, predicted, labels=range(5), zero_division=0
    )
    for ours, theirs in zip(precision_recall_f1(confusion), scores[:3], strict=True):
        np.testing.assert_allclose(ours, theirs)


def test_calibration_by_hand() -> None:
    # Two bins: confidences 0.5 (correct) and 0.4 (wrong) in the lower, 0.8 and 1 in the upper.
    probabilities = np.array([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0]])
    curve = calibration(probabilities, np.array([0, 1, 0, 2]), bins=2)
    np.testing.assert_array_equal(curve.counts, [2, 2])
    np.testing.assert_allclose(curve.confidence, [0.45, 0.9])
    np.testing.assert_allclose(curve.accuracy, [0.5, 0.5])
    assert curve.expected_error == pytest.approx((2 * 0.05 + 2 * 0.4) / 4)


def test_each_bin_has_wilsons_interval() -> None:
    confidence = np.array([0.95] * 40 + [0.55] + [0.65] * 2)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.array([0] * 38 + [1] * 2 + [0] + [1] * 2)
    curve = calibration(probabilities, labels, bins=10)
    expected = {
        9: accuracy_interval(38, 40),
        5: accuracy_interval(1, 1),
        6: accuracy_interval(0, 2),
    }
    for index, interval in enumerate(curve.intervals):
        assert interval == pytest.approx(expected.get(index, (0, 1)))


def test_confusions_come_by_their_number() -> None:
    matrix = np.array([[50, 3, 0], [9, 80, 11], [0, 9, 1]])
    found = top_confusions(matrix, 10)
    assert found == [(1, 2, 11, 100), (1, 0, 9, 100), (2, 1, 9, 10), (0, 1, 3, 53)]
    assert top_confusions(matrix, 2) == found[:2]
    assert top_confusions(np.eye(3, dtype=int), 5) == []


def test_a_calibrated_classifier_has_little_calibration_error() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, 20_000)
    probabilities = np.stack([sure, 1 - sure], axis=1)
    labels = (rng.random(20_000) > sure).astype(int)
    assert calibration(probabilities, labels).expected_error < 0.015
    assert calibration(probabilities, 1 - labels).expected_error > 0.4


def test_the_interval_is_wilsons() -> None:
    low, high = accuracy_interval(9, 10)
    # Wilson's formula.
    z2 = stats.norm.ppf(0.975) ** 2
    centre = (9 + z2 / 2) / (10 + z2)
    half = np.sqrt(z2) / (10 + z2) * np.sqrt(9 * 1 / 10 + z2 / 4)
    assert (low, high) == pytest.approx((centre - half, centre + half))
    assert accuracy_interval(10, 10)[1] == 1.0


def test_mcnemar_counts_where_one_alone_is_right() -> None:
    first = np.array([True] * 12 + [False] * 2 + [True] * 50)
    second = np.array([False] * 12 + [True] * 2 + [True] * 50)
    test = mcnemar(first, second)
    assert (test.only_first, test.only_second) == (12, 2)
    # Both tails of the binomial distribution of 14 trials.
    tail = sum(stats.binom.pmf(k, 14, 0.5) for k in range(3))
    assert test.p_value == pytest.approx(2 * tail)
    assert mcnemar(first, first).p_value == 1.0
