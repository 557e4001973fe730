"""The looks of all pictures, and those that every benchmark draws that compares combinations."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: it draws by Agg and needs no display
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from benchmarks.runs.results import atomic_path

__all__ = [
    "draw_band",
    "draw_before_after",
    "draw_combinations",
    "draw_training",
    "finish",
    "smooth",
    "window_of",
]

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# Okabe and Ito's palette: told apart with any colour vision. Markers repeat what colour says.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#7F7F7F"
METHOD_LOOKS = {
    "full": (GREY, "s"),
    "sum": (BLUE, "o"),
    "gmd": (RED, "D"),
    "gmd-all": (ORANGE, "d"),
    "pcgrad": (GREEN, "^"),
    "balance": (SKY, "v"),
    "balance+gmd-all": (PURPLE, "P"),
}
DASHED = (0, (4, 3))
# Figures are at most 8 inches wide or so: printed at 8 cm, letters are still 4 to 5 points high.
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


def color_of(method: str) -> str:
    return METHOD_LOOKS[method][0]


def legend_of(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Handles and labels, each label once."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def finish(
    figure: Figure,
    path: Path,
    title: str,
    handles: Sequence[Any] = (),
    labels: Sequence[str] = (),
) -> None:
    """Title above, legend below, as many lines of each as the width asks for; written to a file."""
    room = int(11 * figure.get_figwidth())  # about 11 letters of this size to an inch
    lines = [textwrap.fill(line, room) for line in title.split("\n")]
    figure.suptitle("\n".join(lines), fontsize=11.5)
    if handles:
        widths = [len(label) + 8 for label in labels]  # with the line and marker before each
        columns = len(labels) if sum(widths) <= room else max(1, room // max(widths))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


# --- scores --------------------------------------------------------------------------------------


def draw_combinations(
    path: Path,
    title: str,
    modalities: Sequence[str],
    available: Bools,
    panels: Mapping[str, Mapping[str, Array]],
    limits: tuple[float, float] = (-np.inf, np.inf),
    constant: Mapping[str, Array] | None = None,
) -> None:
    """Scores of many combinations: one panel per score, methods side by side, circles below.

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
        constant: by the same label: (combinations,), the scores of the train mean.
    """
    count, most = len(available), max(map(len, panels.values()))
    parts = [2.4] * len(panels) + [0.27 * len(modalities)]
    with style.context(STYLE):
        width = 2.2 + 0.3 * (count + 1) * max(1.0, 0.32 * most)
        figure = Figure(figsize=(max(6.4, width), sum(parts) + 1.3))
        axes = figure.subplots(len(parts), 1, sharex=True, height_ratios=parts)
        for axis, (label, methods) in zip(axes, panels.items(), strict=False):
            _draw_scores(axis, methods, count)
            heights = [] if constant is None else [*constant[label], constant[label].mean()]
            for number, height in enumerate(heights):
                ends = number - 0.45, number + 0.45
                axis.plot(ends, (height, height), "--", color=BLACK, lw=1, label="train mean")
            room = 0.02 * (limits[1] - limits[0])  # for the points that lie on a limit
            low, high = axis.get_ylim()
            if np.isfinite(room):
                axis.set_ylim(max(limits[0] - room, low), min(limits[1] + room, high))
            axis.set_ylabel(label)
        _draw_circles(axes[-1], modalities, available)
        for axis in axes:
            axis.grid(axis="x", visible=False)
            axis.tick_params(axis="x", length=0, labelbottom=False)
            for number in range(0, count, 2):
                axis.axvspan(number - 0.5, number + 0.5, color="#F4F4F4", zorder=0, linewidth=0)
            for number in np.flatnonzero(np.diff(available.sum(1))).tolist():
                axis.axvline(number + 0.5, color="#B0B0B0", linewidth=0.8, zorder=1)
            axis.axvline(count - 0.5, color=BLACK, linewidth=0.8, zorder=1)
            axis.set_xlim(-0.5, count + 0.5)
        figure.align_ylabels(axes)
        finish(figure, path, title, *legend_of(axes))


def _draw_scores(axis: Axes, methods: Mapping[str, Array], count: int) -> None:
    widest = min(0.3, 0.13 * (len(methods) - 1))
    offsets = np.linspace(-widest, widest, len(methods))
    for number, (offset, (method, values)) in enumerate(zip(offsets, methods.items(), strict=True)):
        by_seed = finite_mean(values, 1)
        by_seed = np.column_stack([by_seed, finite_mean(by_seed, 1)])  # (seeds, combinations + 1)
        place, mean = np.arange(count + 1) + offset, finite_mean(by_seed, 0)
        color, marker = METHOD_LOOKS[method]
        if len(values) > 1:
            spread = by_seed.std(0, ddof=1)
            axis.errorbar(place, mean, yerr=spread, fmt="none", color=color, capsize=2.5)
        else:
            by_case = np.column_stack([values[0], finite_mean(values[0], 1)])
            for x, column in zip(place, by_case.T, strict=True):
                if np.isfinite(column).any():
                    quartiles = np.nanpercentile(column, (25, 75))
                    axis.vlines(x, *quartiles, color=color, alpha=0.3, linewidth=4)
        axis.plot(place, mean, marker, color=color, markersize=5.5, label=method)
        axis.text(
            1.006, 0.97 - 0.11 * number, f"{mean[-1]:#.3g}", color=color, fontweight="bold",
            transform=axis.transAxes, ha="left", va="top",
        )  # fmt: skip


def _draw_circles(axis: Axes, modalities: Sequence[str], available: Bools) -> None:
    for number, row in enumerate(available):
        there = np.flatnonzero(row)
        axis.plot([number] * len(row), range(len(row)), "o", color="#D0D0D0", markersize=7)
        axis.plot([number] * len(there), there, "o-", color=BLACK, markersize=7, linewidth=1.6)
    axis.text(
        len(available), (len(modalities) - 1) / 2, "mean", ha="center", va="center", fontsize=9
    )
    axis.set_yticks(range(len(modalities)), modalities)
    axis.set_ylim(len(modalities) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_xlabel("modalities available at test", labelpad=8)


# --- gradients -----------------------------------------------------------------------------------


def draw_before_after(path: Path, title: str, seen: Mapping[str, Mapping[str, Array]]) -> None:
    """Histograms of angles: between two rows, and of a row to the update; one column per method.

    Args:
        path: the file to write.
        title: of the whole picture.
        seen: by method, degrees of any shape, NaN where there is none: ``pairs`` and ``projected``
            (which may be missing), ``summed`` and ``merged``.
    """
    rows = (("between two rows", "pairs", "projected"), ("row to the update", "summed", "merged"))
    with style.context(STYLE):
        figure = Figure(figsize=(max(6.9, 0.9 + 1.9 * len(seen)), 5.6))
        axes = figure.subplots(2, len(seen), sharex=True, sharey="row", squeeze=False)
        for line, (name, *keys) in zip(axes, rows, strict=True):
            for axis, (method, arrays) in zip(line, seen.items(), strict=True):
                _draw_angles(axis, [arrays.get(key) for key in keys], color_of(method))
                axis.set_xlabel(f"{name} (°)")
            line[0].set_ylabel("share of angles")
        for axis, method in zip(axes[0], seen, strict=True):
            axis.set_title(method, color=color_of(method), fontweight="bold")
        handles = [Line2D([], [], color=BLACK, linewidth=1), Patch(color=GREY, alpha=0.75)]
        labels = ["before: as taken; plain sum", "after: projected; merged"]
        finish(figure, path, title, handles, labels)


def _draw_angles(axis: Axes, both: Sequence[Array | None], color: str) -> None:
    """Before as an outline, after filled; what lies above 90 degrees in figures."""
    looks: Sequence[tuple[str, dict[str, Any]]] = (
        ("before", {"histtype": "step", "color": BLACK, "zorder": 3}),
        ("after", {"color": color, "alpha": 0.75}),
    )
    said = ["above 90°"]
    for (name, look), angles in zip(looks, both, strict=True):
        if angles is None:
            said.append(f"{name} –")
            continue
        known = angles[np.isfinite(angles)]
        weights = np.full(known.size, 1 / known.size)
        axis.hist(known, bins=np.arange(0.0, 181.0, 5.0).tolist(), weights=weights, **look)
        said.append(f"{name} {(known > 90).mean():.1%}")
    axis.axvline(90, color=BLACK, linestyle=DASHED, linewidth=1)
    axis.set_xlim(0, 180)
    axis.set_xticks((0, 45, 90, 135), ("0", "45", "90", "135"))
    axis.tick_params(labelbottom=True)
    axis.text(
        0.99, 0.98, "\n".join(said), transform=axis.transAxes, ha="right", va="top", fontsize=9
    )


def draw_training(
    path: Path, title: str, seen: Mapping[str, Mapping[str, Array]], names: Sequence[str]
) -> None:
    """What the gradients did over training: shares of one method above, all methods below.

    Lines: means over :func:`window_of` steps (of dominance, geometric), and over seeds. Bands: one
    sample standard deviation between seeds, where there are several.

    Args:
        path: the file to write.
        title: of the whole picture.
        seen: by method, (seeds, steps): ``dominance``, ``conflicts``, ``alignment``; and
            ``shares``, (seeds, steps, combinations), NaN where a combination was not drawn.
        names: of the combinations.
    """
    below = {
        "dominance": ("largest dominance\nof a pair", (0.0, np.inf)),
        "conflicts": ("share of pairs\nin conflict", (0.0, 1.0)),
        "alignment": ("alignment with\nthe plain sum", (-1.0, 1.0)),
    }
    with style.context(STYLE):
        figure = Figure(figsize=(7.6, 6.2))
        axes = figure.subplot_mosaic([["shares", "shares", "legend"], list(below)])
        first = "sum" if "sum" in seen else next(iter(seen))
        for columns, look in _grouped(names):
            share = finite_mean(seen[first]["shares"][..., columns], -1)
            draw_band(axes["shares"], share, (0.0, 1.0), **look)
        axes["shares"].set_title(f"{first}: share of the gradient norms")
        axes["shares"].set_ylim(bottom=0)
        axes["shares"].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes["legend"].axis("off")
        handles, labels = legend_of([axes["shares"]])
        axes["legend"].legend(handles, labels, loc="center left", borderaxespad=0)
        for key, (name, bounds) in below.items():
            for method, arrays in seen.items():
                look = {"color": color_of(method), "label": method}
                draw_band(axes[key], arrays[key], bounds, log=key == "dominance", **look)
            axes[key].set_title(name)
            axes[key].set_xlabel("training step")
        axes["dominance"].set_yscale("log")
        axes["dominance"].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes["dominance"].yaxis.set_major_formatter("{x:.3g}")
        axes["dominance"].yaxis.set_minor_locator(NullLocator())
        finish(figure, path, title, *legend_of([axes["conflicts"]]))


def _grouped(names: Collection[str]) -> list[tuple[list[int], dict[str, Any]]]:
    """Which combinations make one line, and its look: those of several modalities by their number.

    A single modality that dominates is what one looks for: each has a colour of its own.
    """
    colors = BLUE, RED, GREEN, PURPLE, ORANGE, SKY
    by_size: dict[int, dict[int, str]] = {}
    for number, name in enumerate(names):
        by_size.setdefault(1 + name.count("+"), {})[number] = name
    singles = by_size.pop(1, {}).items()
    lines: list[tuple[list[int], dict[str, Any]]] = [
        ([number], {"color": color, "label": name})
        for color, (number, name) in zip(colors, singles, strict=False)
    ]
    for size, members in sorted(by_size.items()):
        label = f"{size} modalities" + (f"\n(mean of {len(members)})" if len(members) > 1 else "")
        color = BLACK if size == max(by_size) else GREY
        dashes = "-" if size == max(by_size) else ("--", ":", "-.")[size % 3 - 2]
        lines.append((list(members), {"color": color, "linestyle": dashes, "label": label}))
    return lines


def draw_band(
    axis: Axes, values: Array, bounds: tuple[float, float], *, log: bool = False, **look: Any
) -> None:
    """Moving mean of (seeds, steps), and over seeds; a band only where there are several."""
    if log:
        values = np.log(np.where(values > 0, values, np.nan))
    smoothed = smooth(values, window_of(values.shape[1]))  # (seeds, steps)
    mean = finite_mean(smoothed, 0)
    steps = np.flatnonzero(np.isfinite(mean))  # sampled combinations have gaps: connect the rest
    spread = smoothed.std(0, ddof=1) if len(values) > 1 else np.zeros_like(mean)
    low, middle, high = ((mean + sign * spread)[steps] for sign in (-1, 0, 1))
    if log:
        low, middle, high = np.exp([low, middle, high])
    axis.plot(steps, middle, linewidth=1.6, **look)
    if len(values) > 1:
        low, high = np.clip([low, high], *bounds)
        axis.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0)


def window_of(steps: int) -> int:
    """Over how many steps a moving mean goes."""
    return max(1, steps // 12)


def smooth(values: Array, window: int) -> Array:
    """Centred moving mean along the last axis that skips NaN; shorter windows at both ends."""
    known = np.isfinite(values)
    places = np.arange(values.shape[-1])
    low, high = (places - window // 2).clip(0), (places + (window + 1) // 2).clip(max=places.size)
    before = [(0, 0)] * (values.ndim - 1) + [(1, 0)]
    total, count = (np.pad(one.cumsum(-1), before) for one in (np.where(known, values, 0.0), known))
    number = count[..., high] - count[..., low]
    mean: Array = np.full(values.shape, np.nan)
    np.divide(total[..., high] - total[..., low], number, out=mean, where=number > 0)
    return mean


def finite_mean(values: Array, axis: int) -> Array:
    """Without the NaN; NaN where there is nothing else."""
    known = np.isfinite(values)
    total: Array = np.where(known, values, 0.0).sum(axis)
    mean: Array = np.full(total.shape, np.nan)
    np.divide(total, known.sum(axis), out=mean, where=known.any(axis))
    return mean
