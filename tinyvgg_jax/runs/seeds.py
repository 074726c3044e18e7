"""Several runs that differ in their seeds only: their folders, and what they have in common."""

import statistics
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tinyvgg_jax.config import validated
from tinyvgg_jax.errors import UserError


def members(config: ConfigDict) -> dict[str, ConfigDict]:
    """The folder's name and the config of each of a config's runs; it is a run like any other."""
    result = {}
    for seed in range(config.seed, config.seed + config.num_seeds):
        one = ConfigDict(config.to_dict())
        one.seed, one.num_seeds = seed, 1
        result[f"seed_{seed}"] = validated(one)
    return result


def folders(workdir: Path, config: ConfigDict) -> list[Path]:
    """The folders of a run's seeds, or the run's own if it has only one.

    Raises:
        UserError: if some of them are not there yet.
    """
    if config.num_seeds == 1:
        return [workdir]
    found = [workdir / name for name in members(config)]
    begun = sum((folder / "config.json").exists() for folder in found)
    if begun < len(found):
        raise UserError(
            f"{workdir} is not finished: {begun} of its {len(found)} seeds have begun. Run its "
            "command again to go on."
        )
    return found


def statistics_of(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation, 95 % interval of the mean (Student's t), n and the values.

    Args:
        values: one for each seed.

    Returns:
        `mean`, `std` (of the sample), `interval` (two numbers), `n`, `values`; of a single value
        std and interval are None.
    """
    n, mean = len(values), statistics.fmean(values)
    content: dict[str, Any] = {"mean": mean, "std": None, "interval": None, "n": n}
    if n > 1:
        from scipy import stats

        content["std"] = statistics.stdev(values)
        half = float(stats.t.ppf(0.975, n - 1)) * content["std"] / n**0.5
        content["interval"] = [mean - half, mean + half]
    return content | {"values": values}


def summarise(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of several runs from each one's.

    Returns:
        What is the same in all of them; of the accuracies and losses the mean, as in a run's
        own; under `seeds` their `statistics_of`; and the sum of the seconds.
    """
    first = summaries[0]
    measured = [name for name in first if name.endswith(("_accuracy", "_loss"))]
    seeds = {name: statistics_of([one[name] for one in summaries]) for name in measured}
    return (
        {name: seeds[name]["mean"] for name in measured}
        | {name: value for name, value in first.items() if name not in measured}
        | {"seconds": sum(one["seconds"] for one in summaries)}
        | {"num_seeds": len(summaries), "seeds": seeds}
    )
