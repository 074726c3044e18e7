"""The results of a case: what they mean, and their table for the terminal."""

import dataclasses
import statistics
from typing import Any

from tinyvgg_jax.benchmark.cases import BATCH_SIZE, EPOCHS, EXAMPLES
from tinyvgg_jax.benchmark.contest import Result, ratios
from tinyvgg_jax.benchmark.roofline import roofline


def entry_of(case: dict[str, Any], results: list[Result]) -> dict[str, Any]:
    """Makes the JSON entry of a case.

    Args:
        case: the fields that all its contestants share.
        results: the results of its contestants.

    Returns:
        `case` and `results`; with a peer `comparisons`, of each dtype of this package with the
        fastest of the peer's variants of all dtypes, and `least_memory`, the peer's variant that
        takes least; with a matrix product `rooflines`; for several devices `scaling`, a list of
        their `devices`, `speed_up` and `efficiency`.
    """
    entry: dict[str, Any] = {"case": case, "results": [dataclasses.asdict(r) for r in results]}
    ran = [result for result in results if result.seconds]
    ours = [result for result in ran if result.is_compared]
    peers = [result for result in ran if result.is_peer]
    if peers:
        entry["comparisons"] = [_comparison(result, peers) for result in ours]
        least = min(peers, key=peak_memory)
        entry["least_memory"] = {"name": least.name, "bytes": peak_memory(least)}
    if case["kind"] == "train":
        entry["rooflines"] = _rooflines(ran)
    if case["kind"] == "scale" and ran and ran[0].facts["devices"] == 1:
        entry["scaling"] = [_scaling(ran[0], result) for result in ran]
    return entry


def peak_memory(result: Result) -> int:
    """Returns the peak memory in bytes: an accelerator's own, or the process's on a CPU."""
    facts = result.facts
    return int(facts.get("peak_device_bytes") or facts.get("peak_host_bytes") or 0)


def _comparison(ours: Result, peers: list[Result]) -> dict[str, Any]:
    """Compares a contestant with the fastest peer by the median of the ratios of each round."""
    best = min(peers, key=lambda result: result.median)
    rounds = ratios(ours, best)
    ratio = statistics.median(rounds)
    return {"name": ours.name, "peer": best.name, "ratio": ratio, "rounds": rounds}


def _rooflines(ran: list[Result]) -> list[dict[str, Any]]:
    """Computes the share of its roofline that each dtype of this package reaches."""
    copy = next((result for result in ran if result.case.get("kind") == "copy"), None)
    byte_rate = 2 * copy.case["bytes"] / copy.median if copy else None
    products = {
        result.case["dtype"]: 2 * result.case["size"] ** 3 / result.median
        for result in ran
        if result.case.get("kind") == "matmul"
    }
    found = []
    for ours in ran:
        if ours.is_compared and ours.case["dtype"] in products:
            roof = roofline(ours.case, products[ours.case["dtype"]], byte_rate)
            rate = roof["step_flops"] / ours.median
            shares = {
                "flops_per_second": rate,
                "share_of_matmul": rate / roof["matmul_flops_per_second"],
                "share_of_roof": roof["roof_seconds"] / ours.median,
            }
            found.append({"name": ours.name} | roof | shares)
    return found


def _scaling(one: Result, several: Result) -> dict[str, Any]:
    """Compares several devices with one: speed-up is t(1) / t(n), efficiency t(1) / (n t(n))."""
    speed_up = statistics.median(ratios(several, one))
    devices = several.facts["devices"]
    return {"devices": devices, "speed_up": speed_up, "efficiency": speed_up / devices}


def conclusions(entry: dict[str, Any]) -> list[str]:
    """Says what the results of a case mean, in a sentence each.

    Args:
        entry: as from `entry_of`.
    """
    lines = []
    for one in entry.get("comparisons", []):
        low, high = min(one["rounds"]), max(one["rounds"])
        lines.append(
            f"{one['name']}: {one['ratio']:.2f} times as fast as the fastest peer, {one['peer']} "
            f"(rounds from {low:.2f} to {high:.2f}, n = {len(one['rounds'])})"
        )
    if "least_memory" in entry:
        least = entry["least_memory"]
        lines.append(
            f"least memory of the peer: {least['bytes'] / 2**20:,.0f} MiB, {least['name']}"
        )
    lines += [_roofline_line(one) for one in entry.get("rooflines", [])]
    for one in entry.get("scaling", [])[1:]:
        line = f"{one['devices']} devices: {one['speed_up']:.2f} times as fast as one"
        lines.append(f"{line}, efficiency {one['efficiency']:.0%}")
    if "scaling" in entry and entry["results"][0]["facts"].get("platform") == "cpu":
        lines.append("These devices share the cores of one CPU, so together they have no more.")
    return lines


def _roofline_line(one: dict[str, Any]) -> str:
    """Says how close a training step comes to the device's limits."""
    line = (
        f"{one['name']}: {one['step_flops'] / 1e9:.3g} GFLOP a step by formula, "
        f"{one['flops_per_second'] / 1e9:,.0f} GFLOP/s, {one['share_of_matmul']:.0%} of the matrix "
        f"product's {one['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s"
    )
    if one["copy_bytes_per_second"] is None:
        return line
    return (
        f"{line}; {one['step_bytes'] / 1e9:.3g} GB a step by formula, the copy's rate is "
        f"{one['copy_bytes_per_second'] / 1e9:,.0f} GB/s; {one['share_of_roof']:.0%} of the "
        f"roofline, whose {one['bound']} roof binds"
    )


def title_of(case: dict[str, Any]) -> str:
    """Names a case, like "train, batch 32"."""
    words = [case["kind"], f"batch {case['batch_size']}", case.get("dtype", "")]
    return ", ".join(word for word in words if word)


def table(entry: dict[str, Any], results: list[Result], where: str) -> str:
    """Formats the results of a case for the terminal.

    Args:
        entry: as from `entry_of`.
        results: the results of its contestants.
        where: the device on which they were measured.
    """
    case = entry["case"]
    batch, is_epoch = case["batch_size"], case["kind"] == "epoch"
    columns = (
        f"{'images/s':>12}{'ms per step':>12}{'host MiB':>10}{'device MiB':>12}{'first step':>12}"
    )
    width = max(len(result.name) for result in results) + 2 if results else 0
    lines = [f"{title_of(case)}, on {where}"]
    lines += [f"  {'':<{width}}{columns}" + ("  ten epochs" if is_epoch else "")]
    for result in results:
        if not result.seconds:
            lines.append(f"  {result.name:<{width}} failed: {result.error}")
            continue
        host = result.facts["peak_host_bytes"] / 2**20
        device = result.facts.get("peak_device_bytes")
        has_images = result.case.get("kind") not in ("matmul", "copy")
        rate = f"{batch / result.median:,.0f}" if has_images else ""
        line = f"  {result.name:<{width}}{rate:>12}{1e3 * result.median:>12.2f}{host:>12,.0f}"
        line += f"{device / 2**20:>12,.0f}" if device else f"{'':>12}"
        line += f"{result.first_step_seconds:>10.1f} s"
        if is_epoch:
            line += f"{EPOCHS * (EXAMPLES // BATCH_SIZE) * result.median:>10.1f} s"
        lines.append(line)
    lines += [f"  {sentence}" for sentence in conclusions(entry)]
    return "\n".join(lines)
