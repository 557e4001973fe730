"""The pictures of the study: gain.png, opposed.png, and the smallest example, valley.png."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from benchmarks.regimes.report import SAME, comparisons, opposed_of
from benchmarks.runs.methods import plain_sum
from benchmarks.runs.pictures import (
    BLACK,
    BLUE,
    DASHED,
    GREEN,
    GREY,
    METHOD_LOOKS,
    RED,
    SKY,
    STYLE,
    YELLOW,
    finish,
    legend_of,
)
from gradsplit.rules import gmd

__all__ = ["descend", "draw_gain", "draw_opposed", "draw_valley", "line_rows", "valley_rows"]

LOOKS = {
    **METHOD_LOOKS,
    "balance-first": (BLUE, "<"),
    "balance-first+gmd-all": ("#882255", ">"),
    "standardised target": (BLACK, "o"),
}
PART_COLORS = {"units": BLUE, "long": SKY, "contradiction": RED, "missing": GREEN}
STRENGTH = 100.0  # s of the smallest example
RATE = 0.1 / STRENGTH
STEPS = 120


def draw_gain(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Gain over the sum against the unit of the target: a panel per optimizer."""
    found = [one for one in comparisons(rows) if one["part"] == "units"]
    units = [float(one["setting"].split()[1].rstrip(",")) for one in found]
    curves: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    for unit, one in sorted(zip(units, found, strict=True), key=lambda pair: pair[0]):
        ends = one["interval"] or (one["mean"], one["mean"])  # one seed has no interval
        by_method = curves.setdefault(one["optimizer"], {})
        by_method.setdefault(one["method"], []).append((unit, one["mean"], *ends))
    with style.context(STYLE):
        figure = Figure(figsize=(7.6, 5.0))
        axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for axis, (optimizer, by_method) in zip(axes, curves.items(), strict=True):
            for method, points in by_method.items():
                (color, marker), (x, means, low, high) = LOOKS[method], np.transpose(points)
                axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
                axis.plot(x, means, color=color, marker=marker, markersize=6, label=method)
            axis.axhline(0, color=BLACK, linewidth=1)
            axis.set_xscale("log")
            axis.set_xticks(sorted(set(units)))
            axis.set_xticks([], minor=True)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_title(optimizer)
            axis.set_xlabel("unit of the regression target\n(1: grey levels, 34: standardised)")
        axes[0].set_ylabel("gain over the plain sum, points")
        finish(
            figure,
            path,
            "Two tasks on two halves of a digit: what a method gains, by the scale of one target\n"
            "(test score, learning rates tuned; bands: 95 % intervals over several seeds)",
            *legend_of(axes),
        )


def draw_opposed(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Gain over the sum against how often the sum opposes a loss: a panel per method."""
    opposed, found = opposed_of(rows), comparisons(rows)
    methods = dict.fromkeys(one["method"] for one in found)
    with style.context(STYLE):
        figure = Figure(figsize=(7.9, 2.3 * -(-len(methods) // 4) + 1.4))
        axes = figure.subplots(-(-len(methods) // 4), 4, sharex=True, sharey=True, squeeze=False)
        for axis, method in zip(axes.flat, methods, strict=False):
            for one in (one for one in found if one["method"] == method):
                x = 100 * opposed[one["part"], one["setting"]]
                color = PART_COLORS[one["part"]]
                face = "white" if one["verdict"] == SAME else color
                marker = "o" if one["optimizer"] == "SGD" else "s"
                axis.plot(x, one["mean"], marker, color=color, markerfacecolor=face, markersize=6)
            axis.axhline(0, color=BLACK, linewidth=1)
            axis.set_title(method, fontsize=10)
        for axis in axes.flat[len(methods) :]:
            axis.set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel("opposed (%)")
        for axis in axes[:, 0]:
            axis.set_ylabel("gain (points)")
        dots = [("o", PART_COLORS[part], part) for part in dict.fromkeys(o["part"] for o in found)]
        dots += [("o", GREY, "SGD"), ("s", GREY, "Adam")]
        finish(
            figure,
            path,
            "Gain over the plain sum against the share of losses that the sum raises (opposed)\n"
            "(one dot per setting; filled: told apart from the sum; hollow: not)",
            [Line2D([], [], linestyle="", marker=m, color=c, markersize=7) for m, c, _ in dots],
            [label for *_, label in dots],
        )


# --- the smallest example ------------------------------------------------------------------------


def valley_rows(place: Tensor) -> Tensor:
    """Gradients of L_A = s/2 (u - 1)^2 and L_B = 1/2 (u + v)^2 at (u, v)."""
    u, v = place
    return torch.stack([torch.stack([STRENGTH * (u - 1), 0 * v]), torch.stack([u + v, u + v])])


def line_rows(place: Tensor) -> Tensor:
    """Gradients of L_A = s/2 (u - 1)^2 and L_B = 1/2 (u + 1)^2 at (u,)."""
    return torch.stack([STRENGTH * (place - 1), place + 1])


def descend(
    rows_at: Callable[[Tensor], Tensor],
    rule: Callable[[Tensor], Tensor],
    start: Sequence[float],
    steps: int,
) -> npt.NDArray[np.float64]:
    """(steps + 1, n): gradient descent along the mean of the two rows, weighed by ``rule``."""
    place = torch.tensor(start, dtype=torch.float64)
    path = [place]
    for _ in range(steps):
        rows = rows_at(place)
        place = place - RATE * (rule(rows @ rows.T) @ rows) / 2
        path.append(place)
    return torch.stack(path).numpy()


def draw_valley(path: Path) -> None:
    """Where gmd provably helps, and where it provably stops short."""
    with style.context(STYLE):
        figure = Figure(figsize=(8.4, 4.8))
        left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
        _draw_valley(left)
        _draw_line(right)
        finish(
            figure,
            path,
            f"Two losses, one {STRENGTH:g} times as steep: where removing conflict helps, and "
            "where not",
        )


def _draw_valley(axis: Axes) -> None:
    u, v = np.meshgrid(np.linspace(-0.25, 1.35, 300), np.linspace(-1.3, 0.3, 300))
    mean = STRENGTH / 4 * (u - 1) ** 2 + (u + v) ** 2 / 4
    axis.contour(u, v, mean, levels=np.geomspace(3e-3, 50, 14), colors="#C4C4C4", linewidths=0.8)
    axis.plot([-0.25, 1.3], [0.25, -1.3], color=BLACK, linestyle=DASHED, linewidth=1)
    slow = descend(valley_rows, plain_sum, (0.0, 0.0), 4000)
    fast = descend(valley_rows, gmd, (0.0, 0.0), STEPS)
    axis.plot(*slow.T, color=BLUE, linewidth=2)
    axis.plot(*slow[: STEPS + 1 : 10].T, "o", color=BLUE, markersize=5)
    axis.plot(*slow[2000::2000].T, "o", color=BLUE, markersize=6, markerfacecolor="white")
    axis.plot(*fast.T, color=RED, linewidth=2)
    axis.plot(*fast[::10].T, "D", color=RED, markersize=5)
    axis.plot(1, -1, "*", color=BLACK, markersize=16, zorder=5)
    notes = [
        ("start", (0.02, 0.05), BLACK),
        (f"plain sum, {STEPS} steps:\nA pulls it out of the valley", (0.3, 0.06), BLUE),
        ("2000 steps", (1.04, slow[2000, 1] - 0.02), BLUE),
        ("4000 steps", (1.04, slow[4000, 1] - 0.02), BLUE),
        (f"gmd, {STEPS} steps:\nB stays solved", (0.02, -0.8), RED),
        ("best for both", (0.48, -1.08), BLACK),
        ("valley of B,\n$u + v = 0$", (-0.22, -0.4), BLACK),
    ]
    for text, place, color in notes:
        axis.text(*place, text, color=color, fontsize=10)
    axis.set_xlim(-0.25, 1.35)
    axis.set_ylim(-1.3, 0.3)
    axis.set_xlabel("u")
    axis.set_ylabel("v")
    axis.grid(visible=False)
    axis.set_title("helps: $L_A = 50\\,(u-1)^2$,  $L_B = (u+v)^2/2$\na filled mark every 10 steps")


def _draw_line(axis: Axes) -> None:
    axis.axhspan(-1, 1, color=YELLOW, alpha=0.25, linewidth=0)
    for start in (-2.0, -0.3, 0.4):
        axis.plot(descend(line_rows, plain_sum, [start], STEPS), color=BLUE, linewidth=2)
        axis.plot(descend(line_rows, gmd, [start], STEPS), "--", color=RED, linewidth=2)
    best = (STRENGTH - 1) / (STRENGTH + 1)
    axis.text(6, best + 0.1, "plain sum: reaches the best mean", color=BLUE)
    axis.text(36, -0.22, "gmd: stops where it enters", color=RED)
    axis.text(16, -1.25, "shaded: gmd stays where it is", color=BLACK)
    axis.set_xlim(0, STEPS)
    axis.set_ylim(-2.1, 1.4)
    axis.set_xlabel("step")
    axis.set_ylabel("u")
    axis.set_title("does not: $L_A = 50\\,(u-1)^2$,  $L_B = (u+1)^2/2$\nthree starts")
