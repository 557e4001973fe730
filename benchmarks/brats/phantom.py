"""A BraTS-like phantom: NIfTI cases of a simulated brain with a glioma, for runs without data.

BraTS may not be passed on. A benchmark that is given no data writes cases of its own, in the
layout of BraTS 2020 (``CASE/CASE_{t1,t1ce,t2,flair,seg}.nii.gz``; labels 1 necrotic core,
2 oedema, 4 enhancing tumour), and reads them like any others. Nothing about patients can be learnt
from them. They have what makes BraTS a case for gradient decoupling: modalities that differ in
what they show. How a case comes about:

1. *Anatomy.* Signed distances in mm to cerebrum, temporal lobes, cerebellum, brain stem,
   ventricles, deep grey nuclei, the midline and the sulci of a folded cortex, all bent by smooth
   random fields. From distances follow the fractions of CSF, grey and white matter in each voxel.
2. *Tumour.* One to three foci that merge: a necrotic core in an enhancing rim of uneven thickness,
   and oedema that follows white matter and spares cortex and CSF. It pushes the midline and the
   ventricles aside. Of each dozen cases one does not enhance and one hardly does, as low-grade
   gliomas: empty regions have to be met in training and in evaluation, and not too often.
3. *Signal.* What a tissue gives in a sequence follows from its relaxation times (:data:`TISSUES`,
   :data:`SEQUENCES`, :func:`signal`), and the fractions mix linearly, which is partial volume.
4. *Scanner.* Blur, a smooth multiplicative bias field, Rician noise (:func:`rician`), an arbitrary
   gain per volume that normalisation has to undo, and 0 outside the brain, as BraTS is stripped.

What single voxels tell: area under the ROC curve of a modality's intensity, for the voxels of a
region against all other voxels of the brain, mean over the cases that have the region (24 cases
of 64 x 64 x 56, seed 0; with one sign for all cases, - where the region is darker). Beside it the
same on real BraTS cases, whose signs are not known::

                WT            TC            ET
            here  real    here  real    here  real
    t1     -.57   .58    -.63   .58    -.60   .61
    t1ce    .70   .70     .89   .91     .99   .98
    t2      .81   .85     .87   .86     .83   .84
    flair   .99   .97     .98   .95     .98   .95
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from benchmarks.runs.results import atomic_path, write_json

__all__ = ["SEQUENCES", "TISSUES", "Timing", "Tissue", "rician", "signal", "write_phantoms"]

VERSION = 1  # of what is written for the same arguments: raise it with every change
MANIFEST = "phantom.json"  # written last
SMALLEST = 16  # voxels along an axis; fewer do not hold a brain
FIELD_OF_VIEW = (146.0, 184.0, 140.0)  # mm, right-left, front-back, up-down: a brain and a margin

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.uint8]
Volume = npt.NDArray[np.int16] | Labels
Point = tuple[Array, Array, Array]  # x to the right, y to the front, z up; mm; they broadcast


@dataclass(frozen=True)
class Tissue:
    """Relaxation times in ms, water content relative to CSF, and gadolinium after injection."""

    t1: float
    t2: float
    water: float
    gadolinium: float  # mmol/l


@dataclass(frozen=True)
class Timing:
    """Repetition, echo and (of an inversion recovery) inversion time in ms."""

    tr: float
    te: float
    ti: float | None = None


# Round numbers in the range of what is measured in brains at 3 T. What matters is the order. White
# matter is the least watery and relaxes fastest, then grey, then fluid. Oedema is white matter with
# more water, so that T1 and T2 grow. Enhancing tumour is solid: less watery than necrosis, which
# goes on towards fluid. Gadolinium stays in the vessels, but for where the blood-brain barrier is
# broken; a little has seeped into necrosis and oedema when the scan begins.
TISSUES = {
    "csf": Tissue(t1=4200, t2=1500, water=1.00, gadolinium=0.0),
    "grey": Tissue(t1=1450, t2=95, water=0.82, gadolinium=0.02),
    "white": Tissue(t1=850, t2=72, water=0.70, gadolinium=0.01),
    "gliosis": Tissue(t1=1150, t2=110, water=0.76, gadolinium=0.01),  # of age, around ventricles
    "vessel": Tissue(t1=1700, t2=30, water=0.80, gadolinium=1.5),  # flow takes its T2 signal
    "oedema": Tissue(t1=1650, t2=155, water=0.84, gadolinium=0.03),
    "necrosis": Tissue(t1=1800, t2=165, water=0.88, gadolinium=0.055),
    "enhancing": Tissue(t1=1600, t2=135, water=0.85, gadolinium=0.45),
}
# Spin echoes, as in clinical protocols. FLAIR inverts and waits until fluid passes zero.
SEQUENCES = {
    "t1": Timing(tr=500, te=9),
    "t1ce": Timing(tr=500, te=9),
    "t2": Timing(tr=5000, te=95),
    "flair": Timing(tr=9000, te=120, ti=2450),
}
RELAXIVITY = 4.0e-3  # 1/T1 gained per gadolinium, in l/mmol/ms

NOISE = (0.02, 0.045)  # standard deviation of the noise over the signal of white matter: range
BIAS = 0.09  # standard deviation of the bias field's logarithm
BLUR = 0.5  # of the point spread function, standard deviation in voxels
GAIN = (600.0, 0.5)  # of white matter in the file: median over volumes, standard deviation of log
CORTEX = 3.0  # mm


def write_phantoms(
    folder: Path, *, cases: int, size: Sequence[int], seed: int, progress: bool = False
) -> Path:
    """Write ``cases`` phantoms into a folder below ``folder``, and return that folder.

    It is named by all arguments and the generator's version. What is there already is kept: a
    complete folder costs nothing, one whose making was interrupted is completed. A case is
    determined by ``seed``, its number and ``size`` to the byte. At another size it is the same
    patient in another scan.

    Args:
        cases: how many; they are named Phantom_000, Phantom_001, ...
        size: voxels (right-left, front-back, up-down), each at least 16. Voxels are cubes, as large
            as it takes to cover a head: 2.88 mm for (64, 64, 56); other proportions than about
            (52, 64, 49) add background.
        seed: 0 or more.
        progress: show a bar.

    Raises:
        ValueError: an argument is out of range, or the folder's manifest is of something else.
    """
    shape = tuple(int(n) for n in size)
    if len(shape) != 3 or min(shape) < SMALLEST:
        raise ValueError(f"size: expected three numbers of at least {SMALLEST} voxels, got {size}")
    if cases < 1:
        raise ValueError(f"cases: expected at least 1, got {cases}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")

    sides = "x".join(map(str, shape))
    root = folder / f"phantom-v{VERSION}-{sides}-seed{seed}-{cases}cases"
    manifest = {"phantom": VERSION, "size": list(shape), "seed": seed, "cases": cases}
    complete = (root / MANIFEST).exists()
    if complete and _read_manifest(root / MANIFEST) != manifest:
        raise ValueError(
            f"{root / MANIFEST}: expected {manifest}: this folder was made by something else; "
            "delete it"
        )
    grid = _Grid(shape)
    missing = [number for number in range(cases) if not all(map(Path.exists, _files(root, number)))]
    quiet = not (progress and missing)
    # The matrices are small: a second thread would wait longer than it computes.
    with threadpool_limits(1, user_api="blas"):
        for number in tqdm(missing, desc="phantoms", unit="case", disable=quiet):
            _write_case(root, number, grid, seed)
    if not complete:
        write_json(root / MANIFEST, manifest)
    return root


def signal(timing: Timing, *, t1: Array | float, t2: float, water: float) -> Array:
    """Longitudinal recovery times transverse decay: what one voxel full of a tissue gives.

    The signal of an inversion recovery is negative before it passes zero.
    """
    recovery = 1 - np.exp(-timing.tr / np.asarray(t1, np.float64))
    if timing.ti is not None:
        recovery = 1 + np.exp(-timing.tr / t1) - 2 * np.exp(-timing.ti / t1)
    return np.asarray(water * recovery * np.exp(-timing.te / t2))


def rician(random: np.random.Generator, image: Array, sigma: float) -> Array:
    """The magnitude of ``image`` after complex Gaussian noise of ``sigma`` in each component."""
    real = image + sigma * random.standard_normal(image.shape)
    return np.hypot(real, sigma * random.standard_normal(image.shape))


# --- files ---------------------------------------------------------------------------------------


def _files(root: Path, number: int) -> list[Path]:
    name = f"Phantom_{number:03d}"
    return [root / name / f"{name}_{kind}.nii.gz" for kind in (*SEQUENCES, "seg")]


def _read_manifest(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # no JSON
        return None


def _write_case(root: Path, number: int, grid: "_Grid", seed: int) -> None:
    volumes = _simulate(grid, seed, number)
    nifti: Any = nibabel.Nifti1Image  # without type hints
    for path, volume in zip(_files(root, number), volumes, strict=True):
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


def _cerebrum(point: Point) -> Array:
    x, y, z = np.abs(point[0]), point[1], point[2]
    narrowing = 1 + 0.1 * ((y + 20) / 90).clip(-1, 1)  # towards the front
    dome = np.maximum(_ellipsoid((x * narrowing, y, z), (13, 0, 2), (54, 84, 62)), -14 - z)
    base = np.maximum(_ellipsoid((x, y, z), (15, 0, -4), (48, 80, 30)), -20 - z)
    temporal_lobe = _ellipsoid((x, y, z), (40, 2, -20), (22, 42, 23))
    return _merge(_merge(dome, base, 6), temporal_lobe, 8)


def _stem(point: Point) -> Array:
    return _ellipsoid(point, (0, -22, -34), (13, 14, 32))


def _cerebellum(point: Point) -> Array:
    x, y, z = np.abs(point[0]), point[1], point[2]
    return _ellipsoid((x, y, z), (17, -50, -32), (34, 29, 22))


def _brain(point: Point) -> Array:
    return _merge(_merge(_cerebrum(point), _stem(point), 6), _cerebellum(point), 3)


def _ventricles(point: Point, width: float) -> Array:
    x, y, z = np.abs(point[0]), point[1], point[2]
    bend = ((y + 4) / 38).clip(-1.3, 1.3) ** 2  # the horns part to the sides and sink
    parting = np.where(y < -4, 14, 8) * bend
    lateral = _ellipsoid((x - parting, y, z + 9 * bend), (8.5, -6, 17), (5 * width, 44, 7 * width))
    temporal = _ellipsoid((x, y, z), (32, -18, -14), (3 * width, 20, 4 * width))
    third = _ellipsoid((x, y, z), (0, -10, 0), (2.2 * width, 12, 9))
    fourth = _ellipsoid((x, y, z), (0, -38, -34), (5 * width, 5, 9))
    return np.minimum(_merge(lateral, temporal, 4), np.minimum(third, fourth))


def _deep_grey(point: Point) -> Array:
    x, y, z = np.abs(point[0]), point[1], point[2]
    thalamus = _ellipsoid((x, y, z), (10, -16, 5), (8, 14, 9))
    caudate = _ellipsoid((x, y, z), (15, 16, 9), (4, 12, 8))
    lentiform = _ellipsoid((x, y, z), (26, 4, 3), (6, 16, 10))
    return np.minimum(thalamus, np.minimum(caudate, lentiform))


@dataclass(frozen=True)
class _Head:
    """Where each voxel lies."""

    grid: _Grid
    point: Point  # in an undeformed head
    moved: Point  # the same, of the inner structures, which a tumour pushes aside
    depth: Array  # below the surface of the brain, mm


def _tissues(head: _Head, random: np.random.Generator) -> dict[str, Array]:
    """Fractions (X, Y, Z) of the healthy tissues, which sum to 1."""
    grid, depth, moved = head.grid, head.depth, head.moved
    cerebrum, stem = _cerebrum(head.point), _stem(head.point)
    under = np.minimum(stem, _cerebellum(head.point)) - cerebrum  # negative below the cerebrum
    # Sulci: where a random field is 0. Its distance from 0 over its mean slope is one in mm. They
    # narrow with the depth and end at 11 mm, the cortex along them at 22 mm.
    scale = 3.8
    sulcus = np.abs(grid.field(random, scale)) * scale / np.sqrt(1.5)
    gap = 0.95 - 4.1 * (depth.clip(0) / 22) ** 2
    # The fissure between the hemispheres ends on the corpus callosum, and the cleft above the
    # cerebellum where the stem begins.
    callosum = _ellipsoid(moved, (0, -4, 6), (200, 40, 22))
    fissure = np.where(under < 0, -9, (0.35 * callosum).clip(-9, 1.2))
    midline = np.broadcast_to(np.abs(moved[0]), grid.shape)
    cleft = grid.sheet(under, np.where(depth < 25, 0.7, -5))
    ventricles = _ventricles(moved, width=random.uniform(0.75, 1.35))
    fluid = np.maximum.reduce(
        [
            grid.sheet(sulcus, gap),
            grid.sheet(midline, fissure),
            grid.fraction(depth - 0.1),
            grid.fraction(ventricles),
            cleft,
        ]
    )
    not_white = np.maximum.reduce(
        [
            grid.sheet(sulcus, gap + CORTEX),
            grid.sheet(midline, fissure + CORTEX),
            grid.fraction(depth - 0.1 - CORTEX),
            0.8 * grid.fraction(_deep_grey(moved)),
            # The folds of the cerebellum are finer than these voxels: a mixture.
            np.where((under < 0) & (stem > 0), 0.55, 0),
        ]
    )
    not_white *= 1 - grid.fraction(stem + 2)
    grey = (not_white - fluid).clip(0)
    # Vessels: where two random fields are both 0, which is a curve; near the surface.
    scale = 5.0
    curve = np.hypot(grid.field(random, scale), grid.field(random, scale)) * scale / np.sqrt(1.5)
    vessel = np.where(depth < 16, grid.sheet(curve, 1.3 - depth / 12), 0)
    white = 1 - fluid - grey
    caps = random.uniform(0, 0.8) * white * grid.fraction(ventricles - 2.5, transition=3)
    return {
        "csf": fluid * (1 - vessel),
        "grey": grey * (1 - vessel),
        "white": (white - caps) * (1 - vessel),
        "gliosis": caps * (1 - vessel),
        "vessel": vessel,
    }


# --- tumour --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Growth:
    """What a tumour is like. Lengths in mm."""

    centre: Array  # (3,), in an undeformed head
    radius: float
    foci: Sequence[tuple[Array, float]]  # centre and radius of each, the first included
    oedema: float  # mean reach beyond the core
    rim: float  # mean thickness of what enhances; where it is below 0, nothing does
    wobble: float  # standard deviation of that thickness


def _growth(random: np.random.Generator, seed: int, number: int) -> _Growth:
    dozen, place = divmod(number, 12)
    # The same for each of the dozen, and independent of the other draws.
    grade = int(np.random.default_rng([seed, dozen, 1]).permutation(12)[place])
    radius = random.uniform(12, 23)
    if grade == 0:  # no enhancement
        oedema, rim, wobble = random.uniform(4, 9), -1.0, 0.0
    elif grade == 1:  # a few spots
        oedema, rim, wobble = random.uniform(4, 9), random.uniform(-2.0, 0.0), 3.0
    else:
        oedema, rim = random.uniform(8, 20), radius * random.uniform(0.35, 0.85)
        wobble = 0.45 * rim

    # In the depth of a hemisphere: the first of many places that suits, or else the deepest.
    places = random.uniform((12, -55, -22), (46, 48, 42), (200, 3))
    point: Point = (places[:, 0], places[:, 1], places[:, 2])
    depth = -_brain(point)
    suits = (depth > 0.8 * radius + 3) & (point[0] > 0.6 * radius)
    suits &= (_ventricles(point, 1.0) > 3) & ((point[1] > -30) | (point[2] > 0))
    centre = places[suits.argmax() if suits.any() else depth.argmax()]
    centre = centre * (random.choice([-1.0, 1.0]), 1, 1)

    foci = [(centre, radius)]
    for _ in range(random.choice(3, p=(0.72, 0.2, 0.08))):
        away = random.standard_normal(3)
        away *= radius * random.uniform(1.0, 1.7) / np.linalg.norm(away)
        foci.append((centre + away, radius * random.uniform(0.35, 0.7)))
    return _Growth(centre, radius, foci, oedema, rim, wobble)


def _pushed(point: Point, growth: _Growth) -> Point:
    """Where inner structures came from: towards the centre of what has pushed them aside."""
    away = [p - c for p, c in zip(point, growth.centre, strict=True)]
    distance = np.sqrt(sum(a**2 for a in away)) + 1e-9
    push = 0.35 * growth.radius * np.exp(-((distance / (2.2 * growth.radius)) ** 2)) / distance
    x, y, z = (p - push * a for p, a in zip(point, away, strict=True))
    return x, y, z


def _tumour(
    head: _Head, random: np.random.Generator, growth: _Growth, tissues: Mapping[str, Array]
) -> tuple[Labels, dict[str, Array]]:
    """Labels (X, Y, Z) and the fractions of all tissues, of which healthy ones are displaced."""
    grid, depth, moved = head.grid, head.depth, head.moved
    turn, _ = np.linalg.qr(random.standard_normal((3, 3)))
    stretch = np.exp(random.normal(0, 0.16, (3, 1)))
    coarse, fine = grid.field(random, 9.0), grid.field(random, 4.5)

    distances = []  # from each focus
    for centre, radius in growth.foci:
        away = np.stack([p - c for p, c in zip(head.point, centre, strict=True)])  # (3, X, Y, Z)
        away = np.tensordot(stretch * turn, away, axes=1)
        distances.append(np.linalg.norm(away, axis=0) - radius)
    smooth = distances[0]
    for distance in distances[1:]:
        smooth = _merge(smooth, distance, 8)
    core = smooth + growth.radius * (0.17 * coarse + 0.09 * fine)
    core = np.maximum(core, 1.5 - depth)
    thickness = growth.rim + growth.wobble * (0.9 * grid.field(random, 6.0) + 0.4 * fine)
    necrosis = core + thickness.clip(0)

    patches = grid.field(random, 8.0)
    oedema = smooth - growth.oedema * (1 + 0.35 * patches + 0.15 * fine)
    white = tissues["white"] + tissues["gliosis"]
    across = (-np.sign(growth.centre[0]) * moved[0]).clip(0)  # mm beyond the midline
    oedema = np.maximum(oedema + 16 * (1 - white) + 2.5 * across, 1 - depth)

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
    pathology = ("oedema", "necrosis", "enhancing")
    spread = {name: 0.08 if name in pathology else 0.03 for name in fractions}
    change = {name: np.exp(random.normal(0, spread[name], 2)) for name in fractions}
    dose = random.uniform(0.7, 1.3)
    uptake = (1 + 0.4 * grid.field(random, 4.0)).clip(0.1)
    texture = {True: 1 + 0.03 * grid.field(random, 3.0), False: 1 + 0.05 * grid.field(random, 3.0)}
    images = []
    for name, timing in SEQUENCES.items():
        image = np.zeros(grid.shape)
        for kind, fraction in fractions.items():
            tissue = TISSUES[kind]
            t1: Array | float = tissue.t1 * change[kind][0]
            if name == "t1ce":
                gadolinium = tissue.gadolinium * dose * (uptake if kind == "enhancing" else 1)
                t1 = 1 / (1 / t1 + RELAXIVITY * gadolinium)
            t2 = tissue.t2 * change[kind][1]
            image += fraction * signal(timing, t1=t1, t2=t2, water=tissue.water)
        image *= texture[name in ("t1", "t1ce")]
        image = ndimage.gaussian_filter(image, BLUR, truncate=3)
        image *= np.exp(BIAS * grid.field(random, 45.0))
        white = TISSUES["white"]
        unit = float(signal(timing, t1=white.t1, t2=white.t2, water=white.water))
        image = rician(noise, image / unit, random.uniform(*NOISE))
        images.append(image * GAIN[0] * np.exp(GAIN[1] * random.standard_normal()))
    return images


def _simulate(grid: _Grid, seed: int, number: int) -> list[Volume]:
    """The volumes (X, Y, Z) of a case: int16 for each sequence, and uint8 labels."""
    random = np.random.default_rng([seed, number])
    noise = np.random.default_rng([seed, number, *grid.shape])  # all else is the same at any size
    scale = random.uniform(0.90, 0.97, 3)
    x, y, z = (
        axis / s + 2.3 * grid.field(random, 22.0) + 1.3 * grid.field(random, 9.0)
        for axis, s in zip(grid.axes, scale, strict=True)
    )
    growth = _growth(random, seed, number)
    head = _Head(grid, (x, y, z), moved=_pushed((x, y, z), growth), depth=-_brain((x, y, z)))
    tissues = _tissues(head, random)
    labels, fractions = _tumour(head, random, growth, tissues)
    images = _images(grid, random, noise, fractions)

    parts, _ = ndimage.label(ndimage.binary_opening(head.depth > 0))
    brain = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    # At least 1 within the brain: 0 means outside.
    volumes = [np.where(brain, np.rint(image).clip(1, 32767), 0) for image in images]
    return [*(volume.astype(np.int16) for volume in volumes), labels * brain]
