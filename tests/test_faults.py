"""A damaged file is survived, or named in one line; `python tests/faults.py` tries every case."""

from collections.abc import Iterator

import pytest
from faults import TARGETS, Judge, Score, Target, all_cases, sample, try_cases
from worlds import Done, World, complaint, refusal

# Cases of each kind of file; all of them take an hour or two.
_CASES = 2


@pytest.fixture(scope="module")
def judge(world: World) -> Judge:
    return Judge(world)


@pytest.fixture(scope="module")
def score() -> Iterator[Score]:
    score = Score()
    yield score
    print(f"\n{score.table()}")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)
def test_a_damaged_file_is_survived_or_named(
    world: World, judge: Judge, score: Score, target: Target
) -> None:
    world.reset()
    wrong_before = len(score.wrong)
    try_cases(judge, sample(all_cases(world, target), _CASES), score)
    assert not score.wrong[wrong_before:], "\n".join(score.wrong[wrong_before:])


ONE_LINE = "tinyvgg_jax: a.json is not readable."


@pytest.mark.parametrize(
    ("done", "verdict"),
    [
        (Done(2, "", f"{ONE_LINE}\n", 0), ""),
        (Done(2, "", f"A warning.\n{ONE_LINE}\n", 0), ""),
        (Done(2, "", f"{ONE_LINE}\n{ONE_LINE}\n", 0), "does not end in one line"),
        (Done(2, "", f"{ONE_LINE}\nmore\n", 0), "does not end in one line"),
        (Done(2, "", "", 0), "does not end in one line"),
        (Done(2, "", "tinyvgg_jax: damaged.\n", 0), "names no"),
        (Done(1, "", f"{ONE_LINE}\n", 0), "exit status 1"),
        (Done(-11, "", f"{ONE_LINE}\n", 0), "ended by SIGSEGV"),
        (Done(-9, "", f"{ONE_LINE}\n", 0, True), "hangs"),
        (Done(2, "", f"Traceback (most recent call last):\n{ONE_LINE}\n", 0), "prints 'Traceback'"),
        (Done(2, "", f"Exception ignored in: x\n{ONE_LINE}\n", 0), "prints 'Exception ignored'"),
    ],
)
def test_the_judge_tells_an_error_for_people_from_others(done: Done, verdict: str) -> None:
    found = complaint(done) or refusal(done, r"a\.json")
    assert found.startswith(verdict) and bool(found) == bool(verdict)
