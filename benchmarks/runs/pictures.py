"""The pictures that every benchmark writes. They see numbers and names, no models."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: it draws by Agg and needs no display

from benchmarks.runs.results import atomic_path

__all__ = [
    "draw_angles",
    "draw_curves",
]

Array = npt.NDArray[np.float64]

# Okabe and Ito's palette: told apart with any colour vision. Markers repeat what colour says.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
METHOD_LOOKS = {
    "full": ("#7F7F7F", "s"),
    "sum": (BLUE, "o"),
    "gmd": (RED, "D"),
    "gmd-all": (ORANGE, "d"),
    "pcgrad": (GREEN, "^"),
    "balance": (SKY, "s"),
    "balance+gmd-all": (PURPLE, "P"),
}
LINE_COLORS = (BLACK, BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
}


def draw_angles(
    path: Path,
    title: str,
    pairs: Mapping[str, Array],
    merged: Mapping[str, Array],
) -> None:
    """Two rows of histograms, one column per method, with a line at 90 degrees.

    Args:
        path: the file to write.
        title: of the whole picture.
        pairs: by method, the angles in degrees between two rows.
        merged: by method, the angles between a row and the merged update.
    """
    rows = (
        ("between two rows", "conflict", pairs),
        ("of a row to the merged update", "opposed", merged),
    )
    bins = np.arange(0.0, 181.0, 5.0)
    with style.context(STYLE):
        figure = Figure(figsize=(max(6.4, 1.2 + 3.4 * len(pairs)), 6.4))
        axes = figure.subplots(2, len(pairs), sharex=True, sharey=True, squeeze=False)
        for line, (between, what, angles) in zip(axes, rows, strict=True):
            for axis, (method, values) in zip(line, angles.items(), strict=True):
                _draw_histogram(axis, values, bins, color_of(method), what)
                axis.set_xlabel(f"angle {between} (°)")
            line[0].set_ylabel("share of all angles")
        for axis, method in zip(axes[0], pairs, strict=True):
            axis.set_title(method, color=color_of(method), fontweight="bold")
        finish(figure, path, title, [], [])


def draw_curves(
    path: Path,
    title: str,
    shares: Mapping[str, Array],
    combinations: Sequence[str],
    curves: Mapping[str, Mapping[str, Array]],
    highest: Mapping[str, float],
) -> None:
    """What the gradients did over training: shares per combination above, other measures below.

    Args:
        path: the file to write.
        title: of the whole picture.
        shares: by method, (seeds, steps, combinations); NaN where a combination was not drawn.
        combinations: the names of the last axis.
        curves: by the label of the y axis: by method, (seeds, steps).
        highest: by the same label, what the quantity cannot exceed: the band is cut off there.
    """
    with style.context(STYLE):
        figure = Figure(figsize=(12.5, 6.8))
        above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
        upper = above.subplots(1, len(shares) + 1, sharey=True, width_ratios=_widths(len(shares)))
        for axis, (method, values) in zip(upper, shares.items(), strict=False):
            _draw_shares(axis, values, combinations)
            axis.set_title(method, color=color_of(method), fontweight="bold")
            axis.set_xlabel("training step")
        upper[0].set_ylim(bottom=0)
        upper[0].set_ylabel("share of the gradient norms")
        _legend_beside(upper[-1], upper[0], "combination")
        lower = below.subplots(1, len(curves) + 1, width_ratios=_widths(len(curves)))
        for axis, (label, by_method) in zip(lower, curves.items(), strict=False):
            for method, values in by_method.items():
                _draw_band(axis, method, values, highest.get(label, np.inf))
            axis.set_title(label)
            axis.set_xlabel("training step")
            # The band of a quantity that is never negative may reach below zero.
            axis.set_ylim(bottom=max(0.0, axis.get_ylim()[0]))
            if all(_spans_decades(values) for values in by_method.values()):
                axis.set_yscale("log")
        _legend_beside(lower[-1], lower[0], "method")
        finish(figure, path, title, [], [])


def smooth(values: Array, window: int) -> Array:
    """Centred moving mean along the last axis that skips NaN; shorter windows at both ends."""
    known = np.isfinite(values)
    kernel = np.ones(window)
    padded = (window // 2, (window - 1) // 2)

    def moving_sum(line: Array) -> Array:
        return np.convolve(np.pad(line, padded), kernel, mode="valid")

    total = np.apply_along_axis(moving_sum, -1, np.where(known, values, 0.0))
    count = np.apply_along_axis(moving_sum, -1, known.astype(float))
    mean: Array = np.full_like(total, np.nan)
    np.divide(total, count, out=mean, where=count > 0)
    return mean


def finite_mean(values: Array, axis: int) -> Array:
    """Without the NaN; NaN where there is nothing else."""
    known = np.isfinite(values)
    total: Array = np.where(known, values, 0.0).sum(axis)
    mean: Array = np.full(total.shape, np.nan)
    np.divide(total, known.sum(axis), out=mean, where=known.any(axis))
    return mean


def _draw_histogram(axis: Axes, values: Array, bins: Array, color: str, what: str) -> None:
    values = values[np.isfinite(values)]  # NaN: a step with fewer rows
    weights = np.full(values.size, 1 / values.size)
    axis.hist(values, bins=bins.tolist(), weights=weights, color=color, alpha=0.85)
    axis.axvline(90, color=BLACK, linestyle=(0, (4, 3)), linewidth=1.2)
    axis.set_xlim(0, 180)
    axis.set_xticks(range(30, 151, 30))  # labels of neighbouring panels must not touch
    axis.tick_params(labelbottom=True)
    beyond = 100 * float((values > 90).mean())
    axis.text(
        0.98, 0.95, f"above 90°:\n{beyond:.1f}% {what}",
        transform=axis.transAxes, ha="right", va="top", fontsize=9.5,
    )  # fmt: skip


def _draw_shares(axis: Axes, values: Array, combinations: Sequence[str]) -> None:
    steps = values.shape[1]
    lines = smooth(values.transpose(2, 0, 1), _window(steps))  # (combinations, seeds, steps)
    means = [finite_mean(line, 0) for line in lines]
    for mean, look in zip(means, _looks(combinations), strict=True):
        drawn = np.isfinite(mean)  # sampled combinations have gaps: connect what there is
        if drawn.any():
            axis.plot(np.arange(steps)[drawn], mean[drawn], **look)


def _looks(combinations: Sequence[str]) -> list[dict[str, Any]]:
    """How to draw each; where there are too many to tell apart, those between are grouped by size.

    A single modality that dominates is what one looks for: each has a color of its own.
    """
    if len(combinations) <= len(LINE_COLORS):
        return [
            {"color": color, "linewidth": 1.6, "label": name}
            for color, name in zip(LINE_COLORS, combinations, strict=False)
        ]
    sizes = [name.count("+") + 1 for name in combinations]
    singles = [number for number, size in enumerate(sizes) if size == 1]
    looks: list[dict[str, Any]] = []
    for number, size in enumerate(sizes):
        if size == 1:
            color = LINE_COLORS[1 + singles.index(number) % (len(LINE_COLORS) - 1)]
            looks.append({"color": color, "linewidth": 2.0, "label": combinations[number]})
        elif size == max(sizes):
            looks.append({"color": BLACK, "linewidth": 2.0, "label": f"all {size}"})
        else:
            dashes = ("-", "--", ":")[(size - 2) % 3]
            label = f"{size} modalities ({sizes.count(size)})"
            grey = {"color": "#9A9A9A", "linewidth": 1.1, "linestyle": dashes, "zorder": 1.5}
            looks.append({**grey, "label": label})
    return looks


def _widths(count: int) -> list[float]:
    """Of ``count`` panels and the legend beside them."""
    return [1.0] * count + [0.17 * count]


def _legend_beside(place: Axes, drawn: Axes, title: str) -> None:
    place.axis("off")
    handles, labels = legend_of([drawn])
    place.legend(handles, labels, loc="center left", title=title, borderaxespad=0)


def _draw_band(axis: Axes, method: str, values: Array, highest: float) -> None:
    """Mean over seeds, smoothed, with a band of one sample standard deviation."""
    smoothed = smooth(values, _window(values.shape[1]))
    mean = finite_mean(smoothed, 0)
    steps = np.arange(len(mean))
    if len(values) > 1:
        spread = smoothed.std(0, ddof=1)
        top = np.minimum(mean + spread, highest)
        axis.fill_between(
            steps, mean - spread, top, color=color_of(method), alpha=0.15, linewidth=0
        )
    axis.plot(steps, mean, color=color_of(method), linewidth=1.6, label=method)


def _spans_decades(values: Array) -> bool:
    return bool(np.nanmin(values) > 0 and np.nanmax(values) > 100 * np.nanmin(values))


def _window(steps: int) -> int:
    return max(1, steps // 12)


def color_of(method: str) -> str:
    return METHOD_LOOKS[method][0]


def legend_of(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def finish(
    figure: Figure, path: Path, title: str, handles: Sequence[Any], labels: Sequence[str]
) -> None:
    # About 11 letters of this size to an inch.
    lines = [textwrap.fill(line, int(11 * figure.get_figwidth())) for line in title.split("\n")]
    figure.suptitle("\n".join(lines), fontsize=11.5)
    if handles:
        widths = [len(label) + 8 for label in labels]  # with the line and marker before each
        room, columns = int(11 * figure.get_figwidth()), len(labels)
        if sum(widths) > room:
            columns = max(1, room // max(widths))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
