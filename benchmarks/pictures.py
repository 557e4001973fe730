"""The pictures that every benchmark writes. They see numbers and names, no models."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure  # without pyplot: it draws by Agg and needs no display
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.results import atomic_path

__all__ = [
    "draw_angles",
    "draw_cases",
    "draw_combinations",
    "draw_curves",
    "draw_projection",
    "draw_scores",
    "draw_steps",
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
REGION_COLORS = (SKY, YELLOW, RED, GREEN, PURPLE, ORANGE, BLUE)  # the largest region first
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


def draw_scores(
    path: Path,
    title: str,
    groups: Sequence[str],
    panels: Mapping[str, Mapping[str, Array]],
    references: Mapping[str, tuple[str, float]],
) -> None:
    """Means with sample standard deviations over seeds: one panel per score, methods side by side.

    Args:
        path: the file to write.
        title: of the whole picture.
        groups: what lies along the x axis; a "+" breaks the line.
        panels: by the label of the y axis: by method, (seeds, groups).
        references: by the same label: name and height of a horizontal line.
    """
    with style.context(STYLE):
        figure = Figure(figsize=(9.5, 3.3 * len(panels) + 0.7))
        axes = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
        for axis, (label, methods) in zip(axes, panels.items(), strict=True):
            _draw_points(axis, methods)
            if label in references:
                name, height = references[label]
                axis.axhline(height, color=BLACK, linestyle=(0, (4, 3)), linewidth=1, label=name)
            axis.set_ylabel(label)
            axis.grid(axis="x", visible=False)
            axis.tick_params(axis="x", length=0)
        _shade_groups(axes, len(groups))
        last = axes[-1]
        last.set_xticks(range(len(groups)), [name.replace("+", "\n+ ") for name in groups])
        last.set_xlabel("modalities available at test")
        figure.align_ylabels(axes)
        _finish(figure, path, title, *_legend_of(axes))


def draw_combinations(
    path: Path,
    title: str,
    modalities: Sequence[str],
    available: npt.NDArray[np.bool_],
    panels: Mapping[str, Mapping[str, Array]],
    limits: tuple[float, float],
) -> None:
    """Scores of many combinations: one panel per region, methods side by side, circles below.

    Points are means over cases and seeds; the last group is the mean over the combinations.
    Bars: one sample standard deviation over seeds; with one seed, in a lighter tone, from the
    first to the third quartile of the cases.

    Args:
        path: the file to write.
        title: of the whole picture.
        modalities: names of the rows of circles.
        available: (combinations, modalities): filled circles.
        panels: by the label of the y axis: by method, (seeds, cases, combinations); NaN where a
            case has not all modalities of a combination.
        limits: what the scores cannot exceed.
    """
    count = len(available)
    with style.context(STYLE):
        rows = len(modalities)
        width = 3.6 + 0.62 * count * max(1.0, 0.28 * _most(panels))
        figure = Figure(figsize=(max(7.0, width), 2.7 * len(panels) + 0.27 * rows + 1.2))
        axes = list(
            figure.subplots(
                len(panels) + 1,
                1,
                sharex=True,
                squeeze=False,
                height_ratios=[2.7] * len(panels) + [0.27 * rows],
            )[:, 0]
        )
        for axis, (label, methods) in zip(axes, panels.items(), strict=False):
            _draw_combination_points(axis, methods, count)
            low, high = axis.get_ylim()
            room = 0.02 * (limits[1] - limits[0])  # for the points that lie on a limit
            axis.set_ylim(max(limits[0] - room, low), min(limits[1] + room, high))
            axis.set_ylabel(label)
        _draw_circles(axes[-1], modalities, available)
        sizes = available.sum(1)
        for axis in axes:
            axis.grid(axis="x", visible=False)
            axis.tick_params(axis="x", length=0, labelbottom=False)
            for number in range(0, count, 2):
                axis.axvspan(number - 0.5, number + 0.5, color="#F4F4F4", zorder=0, linewidth=0)
            for number in np.flatnonzero(np.diff(sizes)).tolist():
                axis.axvline(number + 0.5, color="#B0B0B0", linewidth=0.8, zorder=1)
            axis.axvline(count - 0.5, color=BLACK, linewidth=0.8, zorder=1)
            axis.set_xlim(-0.5, count + 0.5)
        figure.align_ylabels(axes)
        _finish(figure, path, title, *_legend_of(axes))


def draw_cases(
    path: Path,
    title: str,
    modalities: Sequence[str],
    volumes: npt.NDArray[np.float32],
    regions: Sequence[str],
    truth: npt.NDArray[np.bool_],
    predictions: Mapping[str, Sequence[tuple[npt.NDArray[np.bool_], str] | None]],
) -> None:
    """One slice of one case: what the model saw, what is true, and what each method makes of it.

    The first row holds the ground truth and the modalities, every other row a method's
    predictions: from all modalities, then from each alone, drawn on what the model saw.

    Args:
        path: the file to write.
        title: of the whole picture.
        modalities: M names.
        volumes: (M, H, W), H down and W to the right; 0 is background, or a missing modality.
        regions: R names, in the order of painting: a later region covers an earlier one.
        truth: (R, H, W).
        predictions: by method, M + 1 pairs of (R, H, W) and a caption; None for a modality that is
            missing.
    """
    rows, columns = _box(volumes != 0)
    volumes, truth = volumes[:, rows, columns], truth[:, rows, columns]
    height, width = volumes.shape[1:]
    shown = [_image(volume) for volume in volumes]
    # Where lesions are clearest: FLAIR is last of BraTS's modalities.
    backgrounds = [next(image for image in reversed(shown) if image is not None), *shown]
    colors = [REGION_COLORS[number % len(REGION_COLORS)] for number in range(len(regions))]
    with style.context(STYLE):
        wide = 2.0
        tall = wide * height / width
        size = (wide * len(backgrounds) + 0.6, (tall + 0.3) * (len(predictions) + 1) + 1.0)
        # Compressed: panels of a fixed shape leave no gaps between them.
        figure = Figure(figsize=size, layout="compressed")
        axes = figure.subplots(len(predictions) + 1, len(backgrounds), squeeze=False)
        heads = ["ground truth", *modalities]
        for axis, image, head in zip(axes[0], backgrounds, heads, strict=True):
            _draw_slice(axis, image, (height, width))
            axis.set_title(head, fontsize=10.5)
        _draw_regions(axes[0][0], truth, colors)
        for line, (method, cells) in zip(axes[1:], predictions.items(), strict=True):
            line[0].set_ylabel(method, color=_color(method), fontweight="bold", fontsize=12)
            for axis, image, cell in zip(line, backgrounds, cells, strict=True):
                _draw_slice(axis, image if cell is not None else None, (height, width))
                if cell is not None:
                    prediction, caption = cell
                    _draw_regions(axis, prediction[:, rows, columns], colors)
                    _draw_outline(axis, np.any(truth, axis=0))
                    axis.set_xlabel(caption, fontsize=9, labelpad=3)
        complete = all(image is not None for image in shown)
        whole = "from all" if complete else "from all available"
        below = [whole, *(f"from {name} alone" for name in modalities)]
        for axis, head in zip(axes[1], below, strict=True):
            axis.set_title(head, fontsize=10.5)
        handles: list[Any] = [Patch(color=color) for color in colors]
        handles.append(Line2D([], [], color="#9A9A9A", linewidth=1.2))
        _finish(figure, path, title, handles, [*regions, "outline of the ground truth"])


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
                _draw_histogram(axis, values, bins, _color(method), what)
                axis.set_xlabel(f"angle {between} (°)")
            line[0].set_ylabel("share of all angles")
        for axis, method in zip(axes[0], pairs, strict=True):
            axis.set_title(method, color=_color(method), fontweight="bold")
        _finish(figure, path, title, [], [])


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
            axis.set_title(method, color=_color(method), fontweight="bold")
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
        _finish(figure, path, title, [], [])


def draw_projection(
    path: Path,
    title: str,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
) -> None:
    """Time of a projection over one read of its data, against n: a panel per number of rows.

    Args:
        path: the file to write.
        title: of the whole picture.
        panels: by the panel's title: by method, (n, ratio); both axes are logarithmic.
    """
    methods = list(dict.fromkeys(method for panel in panels.values() for method in panel))
    with style.context(STYLE):
        figure = Figure(figsize=(max(7.0, 1.0 + 2.6 * len(panels)), 4.4))
        axes = figure.subplots(1, max(1, len(panels)), sharex=True, sharey=True, squeeze=False)[0]
        for axis, (name, panel) in zip(axes, panels.items(), strict=False):
            for method, points in panel.items():
                axis.plot(*zip(*points, strict=True), label=method, **_speed_look(method, methods))
            axis.axhline(1, color=BLACK, linestyle=(0, (4, 3)), linewidth=1.2, label="one read")
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_title(name)
            axis.set_xlabel("n")
        axes[0].set_ylim(bottom=0.7)
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].set_ylabel("time / one read of the data")
        _finish(
            figure,
            path,
            "Projection alone: from rows to the merged gradient\n" + title,
            *_legend_of(axes),
        )


def draw_steps(
    path: Path,
    title: str,
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]],
) -> None:
    """Ratios of steps to the joint step: two panels side by side, a line per method.

    Args:
        path: the file to write.
        title: of the whole picture.
        panels: by the panel's title: by method, the lowest, median and highest ratio.
    """
    methods = list(dict.fromkeys(method for panel in panels.values() for method in panel))
    with style.context(STYLE):
        lines = -(-len(panels) // 2)
        figure = Figure(figsize=(12.0, (0.55 + 0.24 * len(methods)) * lines + 1.0))
        axes = figure.subplots(lines, 2, sharex=True, sharey=True, squeeze=False)
        # Down the left column, then down the right one.
        for axis, (name, panel) in zip(axes.T.flat, panels.items(), strict=False):
            for place, method in enumerate(methods):
                if method in panel:
                    low, middle, high = panel[method]
                    color = _speed_look(method, methods)["color"]
                    axis.plot([low, high], [place, place], color=color, linewidth=2, alpha=0.45)
                    axis.plot(middle, place, marker="o", color=color, markersize=6)
                    number = f"{middle:.2f}" if middle < 10 else f"{middle:.1f}"
                    axis.annotate(
                        number, (high, place), (7, 0), textcoords="offset points", va="center",
                        fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                    )  # fmt: skip
            axis.axvline(1, color=BLACK, linestyle=(0, (4, 3)), linewidth=1.2)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_title(name)
            axis.grid(axis="y", visible=False)
        axes[0][0].set_yticks(range(len(methods)), methods)
        axes[0][0].set_ylim(len(methods) - 0.5, -0.5)
        low, high = axes[0][0].get_xlim()
        axes[0][0].set_xlim(low, high * 1.5)  # room for the numbers
        for axis in axes[-1]:
            axis.set_xlabel("time / joint step (bar: minimum to maximum)")
        _finish(
            figure, path, "Forward and backward against one of the summed losses\n" + title, [], []
        )


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


def _draw_points(axis: Axes, methods: Mapping[str, Array]) -> None:
    offsets = np.linspace(-0.27, 0.27, len(methods)) if len(methods) > 1 else np.zeros(1)
    for offset, (method, values) in zip(offsets, methods.items(), strict=True):
        seeds, groups = values.shape
        axis.errorbar(
            np.arange(groups) + offset,
            values.mean(0),
            yerr=values.std(0, ddof=1) if seeds > 1 else None,
            fmt=METHOD_LOOKS[method][1],
            color=_color(method),
            markersize=6,
            capsize=3,
            linewidth=1.4,
            label=method,
        )


def _shade_groups(axes: Sequence[Axes], count: int) -> None:
    for axis in axes:
        for number in range(0, count, 2):
            axis.axvspan(number - 0.5, number + 0.5, color="#F4F4F4", zorder=0, linewidth=0)
        axis.set_xlim(-0.5, count - 0.5)


def _most(panels: Mapping[str, Mapping[str, Array]]) -> int:
    return max(len(methods) for methods in panels.values())


def _draw_combination_points(axis: Axes, methods: Mapping[str, Array], count: int) -> None:
    widest = min(0.3, 0.13 * (len(methods) - 1))
    offsets = np.linspace(-widest, widest, len(methods))
    for number, (offset, (method, values)) in enumerate(zip(offsets, methods.items(), strict=True)):
        by_case = np.dstack([values, _mean(values, 2)])  # (seeds, cases, combinations + 1)
        by_seed = _mean(values, 1)
        by_seed = np.column_stack([by_seed, _mean(by_seed, 1)])  # (seeds, combinations + 1)
        place, mean = np.arange(count + 1) + offset, _mean(by_seed, 0)
        color = _color(method)
        if len(values) > 1:
            spread = by_seed.std(0, ddof=1)
            axis.errorbar(place, mean, yerr=spread, fmt="none", color=color, capsize=2.5)
        else:
            known = [column[np.isfinite(column)] for column in by_case[0].T]
            quartiles = [np.percentile(column, (25, 75)) for column in known if len(column)]
            there = place[[len(column) > 0 for column in known]]
            axis.vlines(there, *np.transpose(quartiles), color=color, alpha=0.3, linewidth=4)
        marker = METHOD_LOOKS[method][1]
        axis.plot(place, mean, marker, color=color, markersize=5.5, label=method)
        axis.text(
            1.006, 0.97 - 0.11 * number, f"{mean[-1]:.1f}", color=color, fontweight="bold",
            transform=axis.transAxes, ha="left", va="top",
        )  # fmt: skip


def _mean(values: Array, axis: int) -> Array:
    """Without the NaN; NaN where there is nothing else."""
    known = np.isfinite(values)
    total: Array = np.where(known, values, 0.0).sum(axis)
    mean: Array = np.full(total.shape, np.nan)
    np.divide(total, known.sum(axis), out=mean, where=known.any(axis))
    return mean


def _draw_circles(axis: Axes, modalities: Sequence[str], available: npt.NDArray[np.bool_]) -> None:
    for number, row in enumerate(available):
        there = np.flatnonzero(row)
        axis.plot([number] * len(there), there, color=BLACK, linewidth=1.6)
        axis.plot([number] * len(row), range(len(row)), "o", color="#D0D0D0", markersize=7)
        axis.plot([number] * len(there), there, "o", color=BLACK, markersize=7)
    axis.text(len(available), (len(modalities) - 1) / 2, "mean", ha="center", va="center")
    axis.set_yticks(range(len(modalities)), modalities)
    axis.set_ylim(len(modalities) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_xlabel("modalities available at test", labelpad=8)


def _box(mask: npt.NDArray[np.bool_]) -> tuple[slice, slice]:
    """Of the last two axes, with a small margin; everything where the mask is empty."""
    found = []
    for axis in (1, 2):
        inside = np.flatnonzero(mask.any(axis=(0, 3 - axis)))
        low, high = (inside[0], inside[-1] + 1) if len(inside) else (0, mask.shape[axis])
        margin = max(2, (high - low) // 25)
        found.append(slice(max(0, low - margin), high + margin))
    return found[0], found[1]


def _image(volume: npt.NDArray[np.float32]) -> Array | None:
    """Grey values in [0, 1], from the 1st to the 99th percentile of what is not background."""
    inside = volume != 0
    if not inside.any():
        return None
    low, high = np.percentile(volume[inside], (1, 99))
    grey = (volume - low) / max(float(high - low), np.finfo(np.float32).tiny)
    # Of a normalised volume much is below the background's 0: it is black all the same.
    return np.where(inside, 0.06 + 0.94 * grey.clip(0, 1), 0.0)


def _draw_slice(axis: Axes, image: Array | None, shape: tuple[int, int]) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    if image is None:
        axis.imshow(np.full(shape, 0.95), cmap="gray", vmin=0, vmax=1)
        axis.text(0.5, 0.5, "missing", transform=axis.transAxes, ha="center", va="center")
    else:
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _draw_regions(axis: Axes, masks: npt.NDArray[np.bool_], colors: Sequence[str]) -> None:
    """Painted one over the other, so that of nested regions every one can be seen."""
    paint = np.zeros((*masks.shape[1:], 4))
    for mask, color in zip(masks, colors, strict=True):
        paint[mask] = to_rgba(color, 0.6)
    axis.imshow(paint, interpolation="nearest")


def _draw_outline(axis: Axes, mask: Any) -> None:
    """White on black: to be seen on tissue of any brightness."""
    if mask.any():
        for color, linewidth in ((BLACK, 2.0), ("white", 1.0)):
            axis.contour(mask, levels=[0.5], colors=color, linewidths=linewidth)


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
    means = [_mean(line, 0) for line in lines]
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
    handles, labels = _legend_of([drawn])
    place.legend(handles, labels, loc="center left", title=title, borderaxespad=0)


def _draw_band(axis: Axes, method: str, values: Array, highest: float) -> None:
    """Mean over seeds, smoothed, with a band of one sample standard deviation."""
    smoothed = smooth(values, _window(values.shape[1]))
    mean = _mean(smoothed, 0)
    steps = np.arange(len(mean))
    if len(values) > 1:
        spread = smoothed.std(0, ddof=1)
        top = np.minimum(mean + spread, highest)
        axis.fill_between(steps, mean - spread, top, color=_color(method), alpha=0.15, linewidth=0)
    axis.plot(steps, mean, color=_color(method), linewidth=1.6, label=method)


def _spans_decades(values: Array) -> bool:
    return bool(np.nanmin(values) > 0 and np.nanmax(values) > 100 * np.nanmin(values))


def _window(steps: int) -> int:
    return max(1, steps // 12)


def _color(method: str) -> str:
    return METHOD_LOOKS[method][0]


def _speed_look(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """Ours in red, TorchJD in blue and its neighbours, anything else in grey and black."""
    families = {
        "ours": (RED, ORANGE, "#8C5A00", PURPLE, "#882255"),
        "TorchJD": (BLUE, SKY, GREEN, "#004466"),
        "": ("#7F7F7F", BLACK, "#B0B0B0"),
    }
    family = next(name for name in families if method.startswith(name))
    others = [name for name in methods if next(f for f in families if name.startswith(f)) == family]
    place = others.index(method)
    marker = {"ours": "D", "TorchJD": "o", "": "s"}[family]
    colors = families[family]
    return {
        "color": colors[place % len(colors)], "marker": marker, "markersize": 5, "linewidth": 1.6,
        "linestyle": ("-", "--", ":")[place % 3],
    }  # fmt: skip


def _legend_of(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _finish(
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
