"""What gradsplit wants to reach, and whether a run did: ratios, from its rows alone."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.speed import ways
from benchmarks.speed.ranks import SHARED
from benchmarks.speed.timing import Row, paired_ratio

__all__ = ["bandwidths", "by_way", "goals", "multiples", "power"]


def goals(rows: Sequence[Row]) -> list[Row]:
    """All of them, with what this run found.

    Returns:
        what: a ratio, in words; sign and wanted: the goal; measured: in this run, None where it was
        not measured, and shown as text; verdict.
    """
    return [_goal(*one) for part in (_times, _bandwidths, _bytes) for one in part(rows)]


_Goals = Iterator[tuple[str, str, float, float | None]]


def _times(rows: Sequence[Row]) -> _Goals:
    def ratio(above: str, *below: str, **cell: Any) -> float | None:
        return paired_ratio(by_way(rows, **cell), above, *below)

    for n, wanted in ((100_000, 40.0), (1_000_000, 12.0), (5_000_000, 9.0)):
        what = f"copying, Gramian and merge over one read (m = 15, n = {power(n)})"
        yield what, "<=", wanted, ratio(ways.COPYING, ways.READ, task="rows", m=15, n=n)
    for name, other, wanted in (
        ("pairwise loop", ways.LOOP, 40), ("TorchJD's PCGrad", ways.JD_PCGRAD, 2.5)
    ):  # fmt: skip
        what = f"{name} over ours, rows filled (m = 15, n = 5e6)"
        yield what, ">=", wanted, ratio(other, ways.FILLED, task="rows", m=15, n=5_000_000)
    for task, m, wanted in (
        ("small MLP", 4, 1.7), ("MLP", 8, 1.7), ("sentiment", 7, 1.06), ("U-Net", 15, 1.03)
    ):  # fmt: skip
        what, plain = f"our exact step over m plain backwards ({task}, m = {m})", ways.PLAIN
        taken = ratio(ways.EXACT, plain, ways.BATCHED, task=task, m=m, apart=False)
        yield what, "<=", wanted, taken
    unet = {"task": "U-Net", "m": 15}
    theirs = ways.AUTOJAC, ways.VMAP, ways.AUTOGRAM
    what = "our step over TorchJD's fastest, one forward per loss (U-Net, m = 15)"
    yield what, "<=", 0.2, ratio(ways.EXACT, *theirs, apart=True, **unet)
    for name, way, wanted in (
        ("conflict_parameters (head)", ways.ON_HEAD, 1.3),
        ("conflict_parameters (last block)", ways.ON_BLOCK, 1.3),
        ("k = 5", ways.SAMPLED, 2.3),
    ):
        what = f"{name} step over the joint step (U-Net, m = 15)"
        yield what, "<=", wanted, ratio(way, ways.JOINT, apart=False, **unet)
    for what, way, other, wanted in (
        ("forward of all modalities over a loop over them", ways.ONE_FORWARD, ways.BRANCHES, 1.0),
        (
            "evaluation of 15 combinations over four branch passes",
            ways.EVALUATION,
            ways.PASSES,
            1.15,
        ),
    ):
        yield f"{what} (U-Net)", "<=", wanted, ratio(way, other, task="forwards", m=15)


def _bandwidths(rows: Sequence[Row]) -> _Goals:
    for name, fraction in bandwidths(rows, 15, 20_000_000).items():
        yield f"{name}: bandwidth over a copy's (m = 15, n = 2e7)", ">=", 0.8, fraction


def _bytes(rows: Sequence[Row]) -> _Goals:
    for task, m in (("MLP", 8), ("U-Net", 15)):
        live = multiples(rows, "live", part="memory", task=task, m=m)
        what = f"live gradients in multiples of n ({task}, m = {m})"
        yield f"{what}, goal m + 1", "<=", m + 1, live.get(ways.EXACT)
        what += ", bfloat16 rows, goal (m + 2) / 2 + 0.1"  # a buffer of half a megabyte
        yield what, "<=", (m + 2) / 2 + 0.1, live.get(ways.HALF)
    for kind in ("live", "resident"):
        taken = multiples(rows, kind, task="encoders")
        ours, plain = taken.get(ways.EXACT), taken.get(ways.PLAIN)
        above = None if ours is None or plain is None else ours - plain
        what = f"{kind} above a plain loop in multiples of n (private encoders, m = 7)"
        yield what, "<=", 2, above
    sent, held = (multiples(rows, kind, ranks=4, m=15).get(SHARED) for kind in ("sent", "live"))
    where = "in multiples of n (MLP, m = 15, R = 4), goal"
    yield f"sent per rank and step {where} (m + 1) (R - 1) / R", "<=", 12, sent
    yield f"live bytes of a rank {where} m / R + 1 and a gradient", "<=", 5.75, held


def _goal(what: str, sign: str, wanted: float, measured: float | None) -> Row:
    goal: Row = {"what": what, "sign": sign, "wanted": wanted, "measured": measured}
    if measured is None:
        return {**goal, "shown": "-", "verdict": "not measured"}
    shown = f"{measured:.3g}"  # what a reader compares
    reached = float(shown) <= wanted if sign == "<=" else float(shown) >= wanted
    return {**goal, "shown": shown, "verdict": "reached" if reached else "NOT REACHED"}


def by_way(rows: Sequence[Row], number: str = "seconds", **cell: Any) -> dict[str, Any]:
    """What the ways of one cell took: {way: ``number``}."""
    return {
        row["way"]: row[number]
        for row in rows
        if all(key in row and row[key] == value for key, value in cell.items())
    }


def multiples(rows: Sequence[Row], kind: str, **cell: Any) -> dict[str, float]:
    """By way, the bytes ``kind`` in multiples of n float32 elements, where they are known."""
    n, found = by_way(rows, "n", **cell), by_way(rows, kind, **cell)
    return {way: taken / n[way] / 4 for way, taken in found.items() if taken is not None}


def bandwidths(rows: Sequence[Row], m: int, n: int) -> dict[str, float]:
    """By kernel: the bandwidth that it reaches over that of a copy."""
    seconds = by_way(rows, task="kernels", m=m, n=n)
    moved = {name: reads(m) for name, (reads, _) in ways.KERNELS.items()}
    return {
        name: ratio * moved[name] / moved[ways.COPY]
        for name in moved
        if name != ways.COPY and (ratio := paired_ratio(seconds, ways.COPY, name)) is not None
    }


def power(n: int) -> str:
    """As in 5e6."""
    return f"{n:.0e}".replace("e+0", "e")
