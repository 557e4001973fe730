"""The speed benchmark's two pictures: projections over one read, and steps over the joint step."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure  # without pyplot: it draws by Agg and needs no display

from benchmarks.runs import pictures
from benchmarks.speed import ways
from benchmarks.speed.goals import by_way
from benchmarks.speed.timing import Row, paired_ratios

__all__ = ["draw_projection", "draw_steps"]

_DASHED: dict[str, Any] = {"color": pictures.BLACK, "linestyle": pictures.DASHED, "linewidth": 1.2}
_DASHES = ("-", "--", ":")
# What is ours is red, TorchJD's blue, and anything else grey or black.
_FAMILIES = {
    "ours": ("D", (pictures.RED, pictures.ORANGE, "#8C5A00", pictures.PURPLE, "#882255")),
    "TorchJD": ("o", (pictures.BLUE, pictures.SKY, pictures.GREEN, "#004466")),
    "": ("s", (pictures.GREY, pictures.BLACK, "#B0B0B0")),
}


def draw_projection(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Time of a projection over one read of its data, against n: a panel per number of rows."""
    panels = sorted({row["m"] for row in rows})
    looks = _looks(row["way"] for row in rows if row["way"] != ways.READ)
    with style.context(pictures.STYLE):
        figure = Figure(figsize=(max(7.0, 1.0 + 2.6 * len(panels)), 4.4))
        axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axis, m in zip(axes, panels, strict=True):
            sizes = sorted({row["n"] for row in rows if row["m"] == m})
            cells = {n: by_way(rows, m=m, n=n) for n in sizes}
            for way, look in looks.items():
                points = [
                    (n, statistics.median(ratios))
                    for n, taken in cells.items()
                    if (ratios := paired_ratios(taken, way, ways.READ))
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), label=way, markersize=5, **look)
            axis.axhline(1, label="one read", **_DASHED)
            axis.set(xscale="log", yscale="log", title=f"{m} rows", xlabel="n")
        axes[0].set_ylim(bottom=0.7)
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].set_ylabel("time / one read of the data")
        title = "Projection alone: from rows to the merged gradient\n" + title
        pictures.finish(figure, path, title, *pictures.legend_of(axes))


def draw_steps(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Ratios of steps to the joint step: a line per way, a panel per model and kind of forward."""
    panels = list(dict.fromkeys((row["apart"], row["task"], row["m"]) for row in rows))
    looks = _looks(row["way"] for row in rows if row["way"] != ways.JOINT)
    places = {way: place for place, way in enumerate(looks)}
    lines = -(-len(panels) // 2)
    with style.context(pictures.STYLE):
        figure = Figure(figsize=(12.0, (0.55 + 0.24 * len(looks)) * lines + 1.0))
        axes = figure.subplots(lines, 2, sharex=True, sharey=True, squeeze=False)
        # Down the left column, then down the right one.
        for axis, (apart, task, m) in zip(axes.T.flat, panels, strict=True):
            taken = by_way(rows, apart=apart, task=task)
            for way, look in looks.items():
                if ratios := paired_ratios(taken, way, ways.JOINT):
                    _draw_range(axis, places[way], ratios, look["color"])
            axis.axvline(1, **_DASHED)
            forwards = "one forward per loss" if apart else "one forward for all losses"
            axis.set(xscale="log", title=f"{task}, m = {m}, {forwards}")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.grid(axis="y", visible=False)
        axes[0][0].set_yticks(range(len(looks)), list(looks))
        axes[0][0].set_ylim(len(looks) - 0.5, -0.5)
        low, high = axes[0][0].get_xlim()
        axes[0][0].set_xlim(low, high * 1.5)  # room for the numbers
        for axis in axes[-1]:
            axis.set_xlabel("time / joint step (bar: minimum to maximum)")
        title = "Forward and backward against one of the summed losses\n" + title
        pictures.finish(figure, path, title, [], [])


def _draw_range(axis: Any, place: int, ratios: Sequence[float], color: str) -> None:
    middle = statistics.median(ratios)
    axis.plot([min(ratios), max(ratios)], [place, place], color=color, linewidth=2, alpha=0.45)
    axis.plot(middle, place, marker="o", color=color, markersize=6)
    axis.annotate(
        f"{middle:.2f}" if middle < 10 else f"{middle:.1f}", (max(ratios), place), (7, 0),
        textcoords="offset points", va="center", fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip


def _looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each is drawn, in their order."""
    looks: dict[str, dict[str, Any]] = {}
    counts = Counter[str]()
    for way in dict.fromkeys(names):
        family = next(start for start in _FAMILIES if way.startswith(start))
        marker, colors = _FAMILIES[family]
        color, dash = (choices[counts[family] % len(choices)] for choices in (colors, _DASHES))
        looks[way] = {"color": color, "marker": marker, "linestyle": dash, "linewidth": 1.6}
        counts[family] += 1
    return looks
