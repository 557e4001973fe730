"""The pictures of the BraTS benchmark: Dice by combination, and one case."""

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
from torch import Tensor

from benchmarks.brats.cases import MODALITIES, Case, Regions
from benchmarks.brats.inference import mean_of
from benchmarks.brats.metrics import segmented
from benchmarks.brats.volumes import Prepared
from benchmarks.runs.pictures import (
    BLACK,
    BLUE,
    GREEN,
    METHOD_LOOKS,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    STYLE,
    YELLOW,
    color_of,
    finish,
    finite_mean,
    legend_of,
)

Array = npt.NDArray[np.float64]
Sample = dict[str, Any]

__all__ = ["case_slices", "shown_case"]


def shown_case(prepared: Prepared) -> str:
    """The test case in the picture: the first that has all modalities, or else the first."""
    cases = prepared.split["test"]
    complete = [case for case in cases if len(case.files) == len(MODALITIES)]
    return (complete or list(cases))[0].name


def case_slices(
    case: Case, sample: Sample, logits: Mapping[str, Tensor], regions: Regions
) -> dict[str, Any]:
    """The axial slice in which the first region is largest, for the picture.

    Turned as it is looked at: the front up, the patient's right on the left.
    """
    label = sample["label"]
    index = int(label[0].sum((0, 1)).argmax())
    combinations = [tuple(logits), *((name,) for name in logits)]
    return {
        "case": case.name,
        "index": index,
        "volumes": sample["volume"][..., index].mT.contiguous(),  # not the whole of it
        "truth": label[..., index].mT.contiguous(),
        "predictions": {
            "+".join(combination): segmented(
                mean_of(logits, combination)[..., index].mT, regions
            ).byte()
            for combination in combinations
        },
    }


REGION_COLORS = (SKY, YELLOW, RED, GREEN, PURPLE, ORANGE, BLUE)  # the largest region first


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
        finish(figure, path, title, *legend_of(axes))


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
            line[0].set_ylabel(method, color=color_of(method), fontweight="bold", fontsize=12)
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
        finish(figure, path, title, handles, [*regions, "outline of the ground truth"])


def _most(panels: Mapping[str, Mapping[str, Array]]) -> int:
    return max(len(methods) for methods in panels.values())


def _draw_combination_points(axis: Axes, methods: Mapping[str, Array], count: int) -> None:
    widest = min(0.3, 0.13 * (len(methods) - 1))
    offsets = np.linspace(-widest, widest, len(methods))
    for number, (offset, (method, values)) in enumerate(zip(offsets, methods.items(), strict=True)):
        by_case = np.dstack([values, finite_mean(values, 2)])  # (seeds, cases, combinations + 1)
        by_seed = finite_mean(values, 1)
        by_seed = np.column_stack([by_seed, finite_mean(by_seed, 1)])  # (seeds, combinations + 1)
        place, mean = np.arange(count + 1) + offset, finite_mean(by_seed, 0)
        color = color_of(method)
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
