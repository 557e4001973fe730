"""A BraTS-like phantom: NIfTI cases of a simulated brain with a glioma, for runs without data.

BraTS may not be passed on. A benchmark that is given no data writes cases of its own, in the
layout of BraTS 2020 (``CASE/CASE_{t1,t1ce,t2,flair,seg}.nii.gz``; labels 1 necrotic core,
2 oedema, 4 enhancing tumour), and reads them like any others. Nothing about patients can be learnt
from them. They have what makes BraTS a case for gradient decoupling: modalities that differ in
what they show. How a case comes about:

1. *Anatomy.* Signed distances in mm to the surface of the brain, to the ventricles, to the midline
   and to the sulci of a folded cortex, all bent by smooth random fields. From distances follow
   the fractions of CSF, grey and white matter in each voxel.
2. *Tumour.* A necrotic core in an enhancing rim of uneven thickness, and oedema that follows white
   matter and spares cortex and CSF. Of each dozen cases one does not enhance and one hardly does,
   as low-grade gliomas: empty regions have to be met in training and in evaluation, and not too
   often.
3. *Signal.* Each tissue has a brightness in each sequence (:data:`BRIGHTNESS`); the fractions mix
   linearly, which is partial volume.
4. *Scanner.* Blur, a smooth multiplicative bias field, Rician noise, an arbitrary gain per volume
   that normalisation has to undo, and 0 outside the brain, as BraTS is stripped.

What single voxels tell: area under the ROC curve of a modality's intensity, for the voxels of a
region against all other voxels of the brain, mean over the cases that have the region (24 cases
of 64 x 64 x 56, seed 0; with one sign for all cases, - where the region is darker). Beside it the
same on real BraTS cases, whose signs are not known::

                WT            TC            ET
            here  real    here  real    here  real
    t1     -.57   .58    -.61   .58    -.62   .61
    t1ce    .71   .70     .93   .91     .99   .98
    t2      .79   .85     .84   .86     .82   .84
    flair   .99   .97     .99   .95     .98   .95
"""

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from benchmarks.brats.cases import ENDINGS
from benchmarks.runs.results import atomic_path

__all__ = ["write_phantoms"]

VERSION = 2  # of what is written for the same arguments: raise it with every change
FIELD_OF_VIEW = (146.0, 184.0, 140.0)  # mm, right-left, front-back, up-down: a brain and a margin

Array = npt.NDArray[np.float64]
Point = tuple[Array, Array, Array]  # x to the right, y to the front, z up; mm; they broadcast

SEQUENCES = ("t1", "t1ce", "t2", "flair")
# Spin echoes at 3 T, white matter 1, worked out from relaxation times. T1 is darker the more water
# there is, T2 brighter, and FLAIR waits until fluid passes zero. Gadolinium reaches what enhances,
# where the blood-brain barrier is broken, and a little of it necrosis and oedema.
BRIGHTNESS = {
    "csf": (0.41, 0.41, 3.50, 0.01),
    "grey": (0.79, 0.87, 1.57, 1.25),
    "white": (1.00, 1.02, 1.00, 1.00),
    "oedema": (0.75, 0.88, 2.32, 1.82),
    "necrosis": (0.74, 0.98, 2.49, 1.79),
    "enhancing": (0.78, 2.03, 2.15, 1.70),
}
NOISE = (0.02, 0.045)  # standard deviation of the noise over the signal of white matter: range
BIAS = 0.09  # standard deviation of the bias field's logarithm
BLUR = 0.5  # of the point spread function, standard deviation in voxels
GAIN = (600.0, 0.5)  # of white matter in the file: median over volumes, standard deviation of log
CORTEX = 3.0  # mm


def write_phantoms(
    folder: Path, *, cases: int, size: Sequence[int], seed: int, progress: bool = False
) -> Path:
    """Write ``cases`` phantoms into a folder below ``folder``, and return that folder.

    It is named by all arguments and the generator's version. Files that are there already are
    kept: a complete folder costs nothing, one whose making was interrupted is completed. A case
    is determined by ``seed``, its number and ``size`` to the byte. At another size it is the same
    patient in another scan.

    Args:
        cases: how many; they are named Phantom_000, Phantom_001, ...
        size: voxels (right-left, front-back, up-down), each at least 16: fewer do not hold a
            brain. Voxels are cubes, as large as it takes to cover a head: 2.88 mm for
            (64, 64, 56); other proportions than about (52, 64, 49) add background.
        seed: 0 or more.
        progress: show a bar.
    """
    sides = "x".join(map(str, size))
    root = folder / f"phantom-v{VERSION}-{sides}-seed{seed}-{cases}cases"
    grid = _Grid(tuple(size))
    files = {number: _files(root, number) for number in range(cases)}
    missing = [number for number, paths in files.items() if not all(map(Path.exists, paths))]
    # The matrices are small: a second thread would wait longer than it computes.
    with threadpool_limits(1, user_api="blas"):
        for number in tqdm(missing, desc="phantoms", disable=not (progress and missing)):
            _write_case(files[number], _simulate(grid, seed, number), grid)
    return root


def _files(root: Path, number: int) -> list[Path]:
    name = f"Phantom_{number:03d}"
    return [root / name / f"{name}_{role}.nii.gz" for role in ENDINGS]


def _write_case(paths: Sequence[Path], volumes: Sequence[Any], grid: "_Grid") -> None:
    nifti: Any = nibabel.Nifti1Image  # without type hints
    for path, volume in zip(paths, volumes, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nifti(volume, grid.affine)
        image.header.set_xyzt_units("mm")
        image.set_qform(grid.affine, "scanner")
        image.set_sform(grid.affine, "scanner")
        with atomic_path(path) as temporary:
            # Without the time, which would be the only thing that differs between two runs.
            temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))


# --- space ---------------------------------------------------------------------------------------


class _Grid:
    """Cubic voxels around the middle of the head.

    The first index goes to the left, the second to the back, the third up, as in BraTS.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        needed = max(width / count for width, count in zip(FIELD_OF_VIEW, shape, strict=True))
        self.voxel = float(np.ceil(needed * 100) / 100)  # mm
        self.affine = np.diag([-self.voxel, -self.voxel, self.voxel, 1.0])
        self.affine[:3, 3] = -np.diag(self.affine)[:3] * (np.array(shape) - 1) / 2
        x, y, z = (
            self.affine[axis, axis] * np.arange(count) + self.affine[axis, 3]
            for axis, count in enumerate(shape)
        )
        self.axes: Point = x[:, None, None], y[None, :, None], z[None, None, :]

    def field(self, random: np.random.Generator, scale: float) -> Array:
        """A Gaussian field of mean 0 and variance 1; exp(-(d / 2 scale)^2) correlates distance d.

        White noise on a lattice that does not depend on the voxels, blurred along each axis.
        """
        blurs = []
        for axis, width in zip(self.axes, FIELD_OF_VIEW, strict=True):
            reach = width / 2 + 2.5 * scale
            nodes = np.linspace(-reach, reach, int(np.ceil(2 * reach / scale)) + 1)
            at = axis.reshape(-1, 1).clip(-width / 2, width / 2)
            blur = np.exp(-(((at - nodes) / scale) ** 2) / 2)
            blurs.append(blur / np.sqrt((blur**2).sum(1, keepdims=True)))
        noise: Array = random.standard_normal([blur.shape[1] for blur in blurs])
        for blur in blurs:
            noise = np.tensordot(noise, blur, axes=(0, 1))  # consumes an axis, appends another
        return noise

    def fraction(self, distance: Array, transition: float = 0.0) -> Array:
        """How much of a voxel lies inside a surface, from the signed distance of its middle."""
        return (0.5 - distance / (self.voxel + transition)).clip(0, 1)

    def sheet(self, distance: Array, half: Array | float) -> Array:
        """How much of a voxel a sheet fills, which reaches ``half`` mm to both sides of 0."""
        low, high = distance - self.voxel / 2, distance + self.voxel / 2
        filled: Array = np.minimum(half, high) - np.maximum(-np.asarray(half), low)
        return filled.clip(0) / self.voxel


def _ellipsoid(
    point: Point, centre: Sequence[float | Array], radii: Sequence[float | Array]
) -> Array:
    """The signed distance, negative inside, to first order in the distance."""
    scaled = [(p - c) / r for p, c, r in zip(point, centre, radii, strict=True)]
    level = np.sqrt(sum(s**2 for s in scaled)) + 1e-9
    slope = np.sqrt(sum((s / r) ** 2 for s, r in zip(scaled, radii, strict=True))) + 1e-9
    return np.asarray(level * (level - 1) / slope)


def _merge(one: Array, other: Array, width: float) -> Array:
    """The union of two shapes, whose seam is rounded over ``width`` mm."""
    overlap = (width - np.abs(one - other)).clip(0)
    return np.minimum(one, other) - overlap**2 / (4 * width)


# --- anatomy -------------------------------------------------------------------------------------


def _brain(point: Point) -> Array:
    """Distance to the surface of both hemispheres with their temporal lobes, and the cerebellum."""
    x, y, z = np.abs(point[0]), point[1], point[2]
    hemisphere = np.maximum(_ellipsoid((x, y, z), (13, 0, 2), (54, 84, 62)), -16 - z)
    temporal_lobe = _ellipsoid((x, y, z), (38, 2, -20), (24, 44, 23))
    cerebellum = _ellipsoid((x, y, z), (14, -42, -32), (36, 36, 26))
    return _merge(_merge(hemisphere, temporal_lobe, 8), cerebellum, 3)


def _ventricles(point: Point, width: float) -> Array:
    x, y, z = np.abs(point[0]), point[1], point[2]
    bend = ((y + 4) / 38).clip(-1.3, 1.3) ** 2  # the horns part to the sides and sink
    parting = np.where(y < -4, 14, 8) * bend
    lateral = _ellipsoid((x - parting, y, z + 9 * bend), (8.5, -6, 17), (5 * width, 44, 7 * width))
    return _merge(lateral, _ellipsoid((x, y, z), (0, -10, 0), (2.2 * width, 12, 9)), 4)


def _tissues(
    grid: _Grid, random: np.random.Generator, point: Point, depth: Array
) -> dict[str, Array]:
    """Fractions (X, Y, Z) of the healthy tissues, which sum to 1; depth below the surface in mm."""
    # Sulci: where a random field is 0. Its distance from 0 over its mean slope is one in mm. They
    # narrow with the depth and end at 11 mm, the cortex along them at 22 mm.
    scale = 3.8
    sulcus = np.abs(grid.field(random, scale)) * scale / np.sqrt(1.5)
    gap = 0.95 - 4.1 * (depth.clip(0) / 22) ** 2
    # The fissure between the hemispheres ends on the corpus callosum.
    midline = np.broadcast_to(np.abs(point[0]), grid.shape)
    fissure = (0.35 * _ellipsoid(point, (0, -4, 6), (200, 40, 22))).clip(-9, 1.2)
    ventricles = grid.fraction(_ventricles(point, width=random.uniform(0.75, 1.35)))

    def around(more: float) -> Array:
        """What lies within so many mm of the fluid outside of the ventricles."""
        sheets = np.maximum(grid.sheet(sulcus, gap + more), grid.sheet(midline, fissure + more))
        return np.asarray(np.maximum(sheets, grid.fraction(depth - 0.1 - more)))

    fluid = np.maximum(around(0), ventricles)
    grey = (around(CORTEX) - fluid).clip(0)
    return {"csf": fluid, "grey": grey, "white": 1 - fluid - grey}


# --- tumour --------------------------------------------------------------------------------------


def _centre(random: np.random.Generator, radius: float) -> Array:
    """(3,): in the depth of a hemisphere; of many places the first that suits, or the deepest."""
    places = random.uniform((12, -55, -22), (46, 48, 42), (200, 3))
    point: Point = (places[:, 0], places[:, 1], places[:, 2])
    depth = -_brain(point)
    suits = (depth > 0.8 * radius + 3) & (point[0] > 0.6 * radius) & (_ventricles(point, 1.0) > 3)
    centre = places[suits.argmax() if suits.any() else depth.argmax()]
    return np.asarray(centre * (random.choice([-1.0, 1.0]), 1, 1))


def _enhancement(seed: int, number: int, random: np.random.Generator) -> tuple[float, float]:
    """Mean thickness of the rim that enhances over the radius of the core, and its deviation.

    One case of each dozen does not enhance at all, one in a few spots.
    """
    dozen, place = divmod(number, 12)
    # The same for each of the dozen, and independent of the other draws.
    grade = int(np.random.default_rng([seed, dozen, 1]).permutation(12)[place])
    mean = random.uniform(0.35, 0.75)
    return {0: (-1.0, 0.0), 1: (-0.1, 0.13)}.get(grade, (mean, 0.45 * mean))


def _tumour(
    grid: _Grid,
    random: np.random.Generator,
    point: Point,
    depth: Array,
    tissues: Mapping[str, Array],
    enhancement: tuple[float, float],
) -> tuple[npt.NDArray[np.uint8], dict[str, Array]]:
    """Labels (X, Y, Z) and the fractions of all tissues, of which healthy ones are displaced."""
    radius = random.uniform(12, 23)
    centre = _centre(random, radius)
    coarse, fine = grid.field(random, 9.0), grid.field(random, 4.5)
    smooth = _ellipsoid(point, tuple(centre), tuple(radius * np.exp(random.normal(0, 0.16, 3))))
    core = np.maximum(smooth + radius * (0.17 * coarse + 0.09 * fine), 1.5 - depth)
    rim, wobble = enhancement
    thickness = radius * (rim + wobble * (0.9 * grid.field(random, 6.0) + 0.4 * fine))
    necrosis = core + thickness.clip(0)

    patches = grid.field(random, 8.0)
    reach = random.uniform(8, 20) if rim > 0 else random.uniform(4, 9)
    oedema = smooth - reach * (1 + 0.35 * patches + 0.15 * fine)
    across = (-np.sign(centre[0]) * point[0]).clip(0)  # mm beyond the midline
    oedema = np.maximum(oedema + 16 * (1 - tissues["white"]) + 2.5 * across, 1 - depth)

    labels = np.zeros(grid.shape, np.uint8)
    labels[(oedema < 0) & (tissues["csf"] < 0.5)] = 2
    labels[core < 0] = 4
    labels[(core < 0) & (necrosis < 0)] = 1
    parts, _ = ndimage.label(labels, np.ones((3, 3, 3)))
    specks = np.bincount(parts.ravel()) * grid.voxel**3 < 500  # mm^3: nobody would outline them
    labels[specks[parts]] = 0

    solid = grid.fraction(core, transition=0.5)
    dead = np.minimum(grid.fraction(necrosis, transition=0.5), solid)
    wet = (1 - solid) * (1 - tissues["csf"]) * grid.fraction(oedema, transition=4.0)
    wet *= (0.75 + 0.2 * patches).clip(0, 1)
    fractions = {name: part * (1 - solid - wet) for name, part in tissues.items()}
    return labels, {**fractions, "oedema": wet, "necrosis": dead, "enhancing": solid - dead}


# --- scanner -------------------------------------------------------------------------------------


def _images(
    grid: _Grid,
    random: np.random.Generator,
    noise: np.random.Generator,
    fractions: Mapping[str, Array],
) -> list[Array]:
    """One image (X, Y, Z) per sequence, of positive numbers in the units of a file."""
    uptake = random.uniform(0.75, 1.25) * (1 + 0.4 * grid.field(random, 4.0)).clip(0.1)
    images = []
    for number, name in enumerate(SEQUENCES):
        image = np.zeros(grid.shape)
        for tissue, fraction in fractions.items():
            bright: Array | float = BRIGHTNESS[tissue][number]
            if name == "t1ce" and tissue == "enhancing":
                plain = BRIGHTNESS[tissue][0]
                bright = plain + (bright - plain) * uptake
            image += fraction * bright * np.exp(random.normal(0, 0.04))
        image *= 1 + 0.04 * grid.field(random, 3.0)
        image = ndimage.gaussian_filter(image, BLUR, truncate=3)
        image *= np.exp(BIAS * grid.field(random, 45.0))
        # The magnitude after complex Gaussian noise: Rician.
        parts = random.uniform(*NOISE) * noise.standard_normal((2, *grid.shape))
        image = np.hypot(image + parts[0], parts[1])
        images.append(image * GAIN[0] * np.exp(GAIN[1] * random.standard_normal()))
    return images


def _simulate(grid: _Grid, seed: int, number: int) -> list[npt.NDArray[Any]]:
    """The volumes (X, Y, Z) of a case: int16 for each sequence, and uint8 labels."""
    random = np.random.default_rng([seed, number])
    noise = np.random.default_rng([seed, number, *grid.shape])  # all else is the same at any size
    scale = random.uniform(0.90, 0.97, 3)
    x, y, z = (
        axis / s + 2.3 * grid.field(random, 22.0) + 1.3 * grid.field(random, 9.0)
        for axis, s in zip(grid.axes, scale, strict=True)
    )
    depth = -_brain((x, y, z))
    enhancement = _enhancement(seed, number, random)
    tissues = _tissues(grid, random, (x, y, z), depth)
    labels, fractions = _tumour(grid, random, (x, y, z), depth, tissues, enhancement)
    images = _images(grid, random, noise, fractions)

    parts, _ = ndimage.label(ndimage.binary_opening(depth > 0))
    brain = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    # At least 1 within the brain: 0 means outside.
    volumes = [np.where(brain, np.rint(image).clip(1, 32767), 0) for image in images]
    return [*(volume.astype(np.int16) for volume in volumes), labels * brain]
