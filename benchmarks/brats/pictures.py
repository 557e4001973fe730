"""cases.png: one slice of a test case, as each method segments it; and which case and slice."""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
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
from benchmarks.runs.pictures import BLACK, GREEN, PURPLE, RED, SKY, STYLE, YELLOW, color_of, finish

__all__ = ["case_slices", "draw_cases", "shown_case"]

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Sample = dict[str, Any]

REGION_COLORS = SKY, YELLOW, RED, GREEN, PURPLE  # the largest region first


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


def draw_cases(
    path: Path,
    title: str,
    modalities: Sequence[str],
    volumes: npt.NDArray[np.float32],
    regions: Sequence[str],
    truth: Bools,
    predictions: Mapping[str, Sequence[tuple[Bools, str] | None]],
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
    shape = volumes.shape[1:]
    shown = [_image(volume) for volume in volumes]
    complete = all(image is not None for image in shown)
    # Where lesions are clearest: FLAIR is last of BraTS's modalities.
    backgrounds = [next(image for image in reversed(shown) if image is not None), *shown]
    colors = list(islice(cycle(REGION_COLORS), len(regions)))
    with style.context(STYLE):
        wide, lines = 1.45, len(predictions) + 1
        size = wide * len(backgrounds) + 0.6, (wide * shape[0] / shape[1] + 0.3) * lines + 1.0
        # Compressed: panels of a fixed shape leave no gaps between them.
        figure = Figure(figsize=size, layout="compressed")
        axes = figure.subplots(lines, len(backgrounds), squeeze=False)
        whole = "from all" if complete else "from all available"
        _set_titles(axes[0], ["ground truth", *modalities])
        _set_titles(axes[1], [whole, *(f"{name} alone" for name in modalities)])
        for axis, image in zip(axes[0], backgrounds, strict=True):
            _draw_slice(axis, image, shape)
        _draw_regions(axes[0][0], truth, colors)
        for line, (method, cells) in zip(axes[1:], predictions.items(), strict=True):
            line[0].set_ylabel(method, color=color_of(method), fontweight="bold", fontsize=12)
            for axis, image, cell in zip(line, backgrounds, cells, strict=True):
                _draw_slice(axis, image if cell is not None else None, shape)
                if cell is not None:
                    prediction, caption = cell
                    _draw_regions(axis, prediction[:, rows, columns], colors)
                    _draw_outline(axis, np.any(truth, axis=0))
                    axis.set_xlabel(caption, fontsize=9, labelpad=3)
        handles = [Patch(color=color) for color in colors]
        outline = Line2D([], [], color="#9A9A9A", linewidth=1.2)
        labels = [*regions, "outline of the ground truth"]
        finish(figure, path, title, [*handles, outline], labels)


def _box(mask: Any) -> tuple[slice, slice]:
    """Of the last two axes, with a small margin; everything where the mask is empty."""
    inside = np.argwhere(mask.any(0))
    if not len(inside):
        return slice(None), slice(None)
    low, high = inside.min(0), inside.max(0) + 1
    margin = np.maximum(2, (high - low) // 25)
    (top, left), (bottom, right) = (low - margin).clip(0), high + margin
    return slice(top, bottom), slice(left, right)


def _image(volume: npt.NDArray[np.float32]) -> Array | None:
    """Grey values in [0, 1], from the 1st to the 99th percentile of what is not background."""
    inside = volume != 0
    if not inside.any():
        return None
    low, high = np.percentile(volume[inside], (1, 99))
    grey = (volume - low) / max(float(high - low), np.finfo(np.float32).tiny)
    # Of a normalised volume much is below the background's 0: it is black all the same.
    return np.where(inside, 0.06 + 0.94 * grey.clip(0, 1), 0.0)


def _set_titles(line: Sequence[Axes], titles: Sequence[str]) -> None:
    for axis, title in zip(line, titles, strict=True):
        axis.set_title(title, fontsize=10.5)


def _draw_slice(axis: Axes, image: Array | None, shape: tuple[int, ...]) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    if image is None:
        axis.imshow(np.full(shape, 0.95), cmap="gray", vmin=0, vmax=1)
        axis.text(0.5, 0.5, "missing", transform=axis.transAxes, ha="center", va="center")
    else:
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _draw_regions(axis: Axes, masks: Bools, colors: Sequence[str]) -> None:
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
