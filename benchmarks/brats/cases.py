"""BraTS cases on disk: which there are, whether each can be used, and segmentations written back.

Layouts, told apart by themselves, with ``.nii`` or ``.nii.gz`` in whatever case of letters:

    HGG|LGG/CASE/CASE_{t1,t1ce,t2,flair,seg}.nii.gz     BraTS 2017 to 2019
    CASE/CASE_{t1,t1ce,t2,flair,seg}.nii.gz             BraTS 2020 and 2021, and data made like it
    CASE/CASE-{t1n,t1c,t2w,t2f,seg}.nii.gz              BraTS 2023 and later

:func:`load_folder` reads every file to its end before anything is trained. What becomes of the
cases then is in :mod:`benchmarks.brats.volumes` (tensors and batches) and
:mod:`benchmarks.brats.splits` (train, validation, test).
"""

import gzip
import hashlib
import math
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from torch import Tensor
from tqdm.contrib.concurrent import thread_map

from benchmarks.runs.results import atomic_path

__all__ = [
    "MODALITIES",
    "REGIONS",
    "BratsData",
    "Case",
    "labels_of",
    "load_folder",
    "masks_of",
    "read_regions",
    "read_volumes",
    "write_segmentation",
]

SEGMENTATION = "seg"
# How the names of files end: behind "_", and since 2023 behind "-".
ENDINGS = {
    "t1": ("t1", "t1n"),
    "t1ce": ("t1ce", "t1c"),
    "t2": ("t2", "t2w"),
    "flair": ("flair", "t2f"),
    SEGMENTATION: (SEGMENTATION, SEGMENTATION),
}
MODALITIES = tuple(ENDINGS)[:4]
REGIONS: dict[str, tuple[int, ...]] = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
# By year; for messages. Gliomas after treatment have a resection cavity.
PUBLISHED = {
    "BraTS until 2022": "WT=1,2,4 TC=1,4 ET=4",
    "BraTS 2023": "WT=1,2,3 TC=1,3 ET=3",
    "BraTS 2024 (GLI)": "WT=1,2,3 TC=1,3 ET=3 RC=4",
}
ORIENTATION = "LPS"  # that of BraTS: axes point to the left, to the back and up
GRADES = ("HGG", "LGG")
PROBLEMS_SHOWN = 20
# In voxels, at the corners of the volume. What rounding to the header's float32 does is below
# 0.001; a shift, flip or resampling that matters is far above.
AFFINE_TOLERANCE = 0.05

Array = npt.NDArray[Any]
Regions = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One scan session, checked.

    Attributes:
        name: its folder's name.
        patient: what a split must not divide. The scan number at the end of BraTS 2017 to 2019
            names (``Brats18_TCIA08_167_1``) and the time point at the end of names since 2023
            (``BraTS-GLI-00005-001``) are dropped; any other name is a patient's own.
        files: the available modalities, in the order of MODALITIES.
        segmentation: the file of labels; None where they were not asked for.
        shape: voxels along each axis, of volumes that are turned to ORIENTATION.
        spacing: mm between voxels along each axis.
        digest: SHA-256 over the contents of its files.
    """

    name: str
    patient: str
    files: Mapping[str, Path]
    segmentation: Path | None
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    digest: str

    @property
    def grid(self) -> Path:
        """The file whose grid a segmentation of the case is written on."""
        return self.segmentation or next(iter(self.files.values()))


@dataclass(frozen=True)
class BratsData:
    """Checked cases, sorted by name.

    Attributes:
        source: the folder.
        cases: at least one.
        regions: name -> labels it is made of.
        digest: SHA-256 over the names and digests of the cases.
        phantom: whether the benchmark made the cases itself.
    """

    source: str
    cases: tuple[Case, ...]
    regions: dict[str, tuple[int, ...]]
    digest: str
    phantom: bool

    def lacking(self) -> str:
        """How many cases lack a modality, and which: ``"3 cases lack a modality (t1 1, t2 2)"``."""
        incomplete = sum(len(case.files) < len(MODALITIES) for case in self.cases)
        count = {name: sum(name not in case.files for case in self.cases) for name in MODALITIES}
        each = ", ".join(f"{name} {number}" for name, number in count.items() if number)
        cases = "case lacks" if incomplete == 1 else "cases lack"
        return f"{incomplete} {cases} a modality" + (f" ({each})" if each else "")


# --- regions -------------------------------------------------------------------------------------


def read_regions(text: str) -> dict[str, tuple[int, ...]]:
    """``"WT=1,2,3 TC=1,3 ET=3"`` as a mapping from region to sorted labels.

    Raises:
        ValueError: another form, a label outside 1 to 255, or two regions of one name or of the
            same labels.
    """
    regions: dict[str, tuple[int, ...]] = {}
    for part in text.split():
        match = re.fullmatch(r"(.+?)=([0-9]+(?:,[0-9]+)*)", part)
        if match is None:
            raise ValueError(f"regions {text!r}: {part!r} is not NAME=LABEL,LABEL,...")
        name, labels = match[1], tuple(sorted(map(int, match[2].split(","))))
        if not 1 <= labels[0] <= labels[-1] <= 255 or len(set(labels)) < len(labels):
            raise ValueError(f"regions {text!r}: labels of {name!r} must differ and be 1 to 255")
        if name in regions or labels in regions.values():
            raise ValueError(f"regions {text!r}: {name!r} or its labels are there twice")
        regions[name] = labels
    if not regions:
        raise ValueError(f"regions {text!r}: none given; those of {_published(set())}")
    return regions


def _published(labels: set[int]) -> str:
    """The years whose labels these may be, with what to type."""
    return " or ".join(
        f'{year}: --regions "{text}"'
        for year, text in PUBLISHED.items()
        if labels <= {0}.union(*read_regions(text).values())
    )


def labels_of(mask: Array, regions: Regions) -> Array:
    """Predicted regions (R, ...) bool as labels (...) uint8.

    Regions are painted over each other, the one with most labels first. A region's voxels get the
    smallest of its labels that lies in no region painted later, or its smallest label where all
    do: then the labels alone cannot tell it from the smaller ones. For regions nested in each
    other, :func:`masks_of` gives the mask back, except that a voxel of an inner region counts as
    one of the outer ones even where their masks say no.
    """
    order = sorted(regions, key=lambda name: -len(regions[name]))
    place = {name: number for number, name in enumerate(regions)}
    painted = np.zeros(mask.shape[1:], np.uint8)
    for number, name in enumerate(order):
        later = {label for other in order[number + 1 :] for label in regions[other]}
        labels = sorted(regions[name])
        painted[mask[place[name]]] = next((x for x in labels if x not in later), labels[0])
    return painted


def masks_of(labels: Array, regions: Regions) -> Array:
    """(R, ...) bool: which voxels have a label of each region."""
    return np.stack([np.isin(labels, members) for members in regions.values()])


# --- finding and checking ------------------------------------------------------------------------


def load_folder(
    folder: Path,
    regions: Regions,
    *,
    allow_missing: bool = False,
    labelled: bool = True,
    workers: int = 0,
    phantom: bool = False,
    progress: bool = False,
) -> BratsData:
    """Find the cases and check every one: all files read to the end, all voxels looked at.

    Args:
        folder: in one of the layouts above.
        regions: name -> labels; no other label but 0 may occur.
        allow_missing: accept cases without some modality files. One must be there, the
            segmentation always, and no file that looks like the missing one, misnamed.
        labelled: False accepts cases without a segmentation, and looks at none.
        workers: threads (decompressing releases Python's lock); 0 is one. Hundreds of cases take
            minutes.
        phantom: copied to the result.
        progress: show a bar on stderr.

    Raises:
        ValueError: nothing is found, or at least one case cannot be used. All problems are
            collected, each with case and file, and the first 20 shown.
    """
    folder = Path(folder)
    found = _case_folders(folder)
    check = partial(
        _check_case, folder, regions=regions, allow_missing=allow_missing, labelled=labelled
    )
    checked = thread_map(
        check, found, max_workers=max(workers, 1), desc="checking cases", unit="case",
        disable=not progress,
    )  # fmt: skip
    twice = [name for name, count in Counter(path.name for path in found).items() if count > 1]
    problems = [
        f"{name}: there are two cases of this name, in {' and '.join(GRADES)}; rename one"
        for name in twice
    ]
    problems += [problem for _, _, complaints in checked for problem in complaints]
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:PROBLEMS_SHOWN])
        more = len(problems) - PROBLEMS_SHOWN
        raise ValueError(
            f"{folder}: {len(problems)} problem(s) in {len(found)} cases, to be solved before "
            f"training:{shown}" + (f"\n  and {more} more" if more > 0 else "")
        )
    labels = set[int]().union(*(present for _, present, _ in checked))
    for name, members in regions.items():
        if labelled and not labels.intersection(members):
            text = ", ".join(map(str, members))
            warnings.warn(
                f"{folder}: no case has a voxel of region {name} (labels {text}); "
                "are these the regions of this data?",
                stacklevel=2,
            )
    cases = sorted((case for case, _, _ in checked if case), key=lambda case: case.name)
    digest = hashlib.sha256("".join(f"{case.name} {case.digest}\n" for case in cases).encode())
    return BratsData(str(folder), tuple(cases), dict(regions), digest.hexdigest(), phantom)


def _case_folders(folder: Path) -> list[Path]:
    """Folders of cases, whatever state a failed download, or an archive, left them in."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; give the one that holds the cases")
    inside = sorted(folder.iterdir())
    grades = [path for path in inside if path.name in GRADES and path.is_dir()]
    candidates = [path for path in inside if path not in grades]
    candidates += [path for grade in grades for path in sorted(grade.iterdir())]
    found = [path for path in candidates if _may_be_case(path)]
    if not found:
        names = ", ".join(path.name + "/" * path.is_dir() for path in inside[:8]) or "nothing"
        raise ValueError(
            f"{folder}: no cases; expected CASE/CASE_{{t1,t1ce,t2,flair,seg}}.nii[.gz] in it or in "
            "its folders HGG and LGG, or CASE/CASE-{t1n,t1c,t2w,t2f,seg}.nii[.gz]; "
            f"found {names}{' ...' if len(inside) > 8 else ''}"
        )
    return found


def _may_be_case(path: Path) -> bool:
    if path.name.startswith((".", "__")) or not path.is_dir():
        return False
    inside = list(path.iterdir())
    return not inside or any(_may_be_volume(each) for each in inside)


def _may_be_volume(path: Path) -> bool:
    """Also ``one_t1.nii.gz.part``; in the folder ``one`` also ``one_t1.zip`` and ``one.zip``."""
    name, case = path.name.lower(), re.escape(path.parent.name.lower())
    own = re.match(rf"{case}([-_]|\.(zip|tar|gz|tgz|part))", name) and path.is_file()
    return bool(own) or ".nii" in name


def _check_case(
    root: Path, folder: Path, *, regions: Regions, allow_missing: bool, labelled: bool
) -> tuple[Case | None, set[int], list[str]]:
    """The case (None if it has problems), its labels, and its problems."""
    where = folder.relative_to(root)
    files, problems = _files_of(folder, where, allow_missing, labelled)
    reference: tuple[str, _Image] | None = None
    labels: set[int] = set()
    digests = {}
    # Segmentation first: what differs from it is most often the file that is wrong.
    for role in sorted(files, key=lambda role: role != SEGMENTATION):
        path = files[role]
        try:
            image = _read_image(path)
            if role == SEGMENTATION:
                labels = _check_labels(image.array, regions)
            else:
                _check_intensities(image.array)
            if reference is not None:
                _check_geometry(image, reference[1], reference[0])
        except (OSError, ValueError) as error:
            reason = error.strerror or error if isinstance(error, OSError) else error
            problems.append(f"{where / path.name}: {reason}")
            continue
        digests[role] = image.sha256
        reference = reference or (path.name, image)
    if problems or reference is None:
        return None, labels, problems
    _, image = reference
    segmentation = files.pop(SEGMENTATION, None)
    spacing = tuple(np.linalg.norm(image.affine[:3, :3], axis=0).tolist())
    patient = re.sub(r"(?i)^(brats1[789]_.+)_\d+$|^(brats-.+)-\d{3}$", r"\1\2", folder.name)
    shape: tuple[int, int, int] = image.array.shape
    case = Case(folder.name, patient, files, segmentation, shape, spacing, _digest(digests))
    return case, labels, problems


def _files_of(
    folder: Path, where: Path, allow_missing: bool, labelled: bool
) -> tuple[dict[str, Path], list[str]]:
    """The case's files by role, in the order of ENDINGS, and what is wrong with their names."""
    volumes = sorted(path.name for path in folder.iterdir() if _may_be_volume(path))
    files: dict[str, Path] = {}
    problems = []
    newer, packed = folder.name.startswith("BraTS-"), ".nii.gz"
    for role, endings in ENDINGS.items():
        # The letters' case is no matter: BraTS itself has published a few files as t2W.
        pattern = rf"(?i){re.escape(folder.name)}([-_])({'|'.join(endings)})(\.nii(\.gz)?)"
        matching = [match for name in volumes if (match := re.fullmatch(pattern, name))]
        if len(matching) > 1:
            listed = " and ".join(match[0] for match in matching)
            problems.append(f"{where}: more than one file for {role}, {listed}; keep one")
        if matching:
            files[role] = folder / matching[0][0]
            newer, packed = matching[0][1] == "-", matching[0][3]
    strange = [name for name in volumes if folder / name not in files.values()]
    wanted = ENDINGS if labelled else MODALITIES
    files = {role: path for role, path in files.items() if role in wanted}
    for role in (role for role in wanted if role not in files):
        # A part of the name, between what is neither letter nor digit, says the role.
        alike = [x for x in strange if set(ENDINGS[role]) & set(re.split("[\\W_]", x.lower()))]
        if role == SEGMENTATION:
            advice = "fetch it; a case without one can only be segmented (--model)"
        elif not allow_missing:
            advice = "fetch it, or allow missing modalities (--allow-missing)"
        elif not set(files) - {SEGMENTATION}:
            advice = "at least one modality is needed"
        elif alike:  # allowed to be missing, but it seems not to be
            advice = "give its file this name, or move what only looks like it out of the folder"
        else:
            continue
        also = ", ".join(alike or strange)
        hint = f"; there is also {also}: is it misnamed, packed or not complete?" if also else ""
        kind = "segmentation" if role == SEGMENTATION else f"{role} file"
        name = f"{folder.name}{'_-'[newer]}{ENDINGS[role][newer]}{packed}"
        problems.append(f"{where / name}: missing {kind}; {advice}{hint}")
    return files, problems


def _check_labels(array: Array, regions: Regions) -> set[int]:
    labels, known = set(np.unique(array).tolist()), {0}.union(*regions.values())
    unknown = sorted(labels - known)
    if odd := [label for label in unknown if not float(label).is_integer()]:
        raise ValueError(
            f"has labels that are not whole numbers, such as {odd[0]:g}; fetch it again, or "
            "resample it with nearest neighbour: others interpolate between labels"
        )
    if unknown:
        listed = ", ".join(f"{label:g}" for label in unknown[:5]) + ", ..." * (len(unknown) > 5)
        raise ValueError(
            f"unknown label {listed}; the regions know {', '.join(map(str, sorted(known)))}; "
            f"give the data's regions, {_published(labels) or '--regions'}"
        )
    return labels


def _check_intensities(array: Array) -> None:
    with np.errstate(over="ignore"):  # beyond float32: becomes inf
        bad = array.size - int(np.isfinite(array.astype(np.float32)).sum())
    if bad:
        raise ValueError(f"{bad} voxels are NaN or infinite; fetch it again, or set them to 0")
    if array.min() == array.max():
        value = float(array.min())
        raise ValueError(f"is {value:g} everywhere; fetch it again, or remove it as missing")


def _check_geometry(image: "_Image", reference: "_Image", name: str) -> None:
    shape = np.array(reference.array.shape)
    corners = np.vstack([np.indices((2, 2, 2)).reshape(3, 8) * (shape[:, None] - 1), np.ones(8)])
    # Column by column, how far a corner of this volume is from the reference's, in its voxels.
    moved = np.abs(np.linalg.solve(reference.affine, image.affine @ corners) - corners).max()
    if image.array.shape != reference.array.shape:
        found = f"shape {image.array.shape} differs from {reference.array.shape} of {name}"
    elif moved > AFFINE_TOLERANCE:
        found = f"affine differs from that of {name} by up to {moved:.3g} voxels"
    else:
        return
    raise ValueError(f"{found}; the files of a case must be registered to each other")


# --- reading one file ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Image:
    array: Array  # (D, H, W), scaled as the header says, turned to ORIENTATION
    affine: npt.NDArray[np.float64]  # (4, 4), voxel -> mm
    sha256: str  # of the file


def _read_image(path: Path) -> _Image:
    """Read a NIfTI file to the last byte of its gzip trailer, which nibabel alone would not.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is empty, cut off, damaged, not NIfTI, or not one 3-D volume of real
            numbers. The message lacks the path.
    """
    if path.is_dir():  # as Kaggle unpacks BraTS
        inside = ", ".join(sorted(each.name for each in path.iterdir())) or "nothing"
        raise ValueError(f"is a folder that holds {inside}; put the file itself in its place")
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if path.name.lower().endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except EOFError:
            raise ValueError("is cut off: its gzip stream has no end; fetch it again") from None
        except (OSError, zlib.error) as error:
            raise ValueError(f"is damaged or no gzip file ({error}); fetch it again") from None
    elif content.startswith(b"\x1f\x8b"):
        raise ValueError("is compressed with gzip; rename it to .nii.gz, or decompress it")
    kinds: tuple[Any, ...] = (nibabel.Nifti1Image, nibabel.Nifti2Image)
    kind = next((kind for kind in kinds if kind.header_class.may_contain_header(content)), None)
    if kind is None:
        raise ValueError(f"is no NIfTI file ({len(content)} bytes); convert it, or fetch it again")
    try:
        image = kind.from_bytes(content)
        dtype, shape, affine = image.get_data_dtype(), image.shape, image.affine
        needed = image.dataobj.offset + math.prod(map(int, shape)) * dtype.itemsize
    except MemoryError:
        raise
    except Exception as error:  # a damaged header raises nearly anything in nibabel
        raise ValueError(f"has a damaged NIfTI header ({error}); fetch it again") from error
    if len(shape) < 3 or min(shape) < 1 or max(shape[3:], default=1) > 1 or dtype.kind not in "iuf":
        raise ValueError(
            f"has shape {tuple(shape)} and type {dtype}; expected one volume of three dimensions "
            "and of real numbers"
        )
    if len(content) < needed:
        raise ValueError(f"is cut off: {len(content)} bytes of {needed}; fetch it again")
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine) < 4:
        raise ValueError(f"has an affine without inverse, {affine.tolist()}; fetch it again")
    turned = image.as_reoriented(_turn(_orientations.aff2axcodes(affine), ORIENTATION))
    array = np.asarray(turned.dataobj)
    return _Image(array.reshape(array.shape[:3]), turned.affine, sha256)


_orientations: Any = nibabel.orientations  # without type hints


def _turn(start: Sequence[str], end: Sequence[str]) -> Any:
    """For ``as_reoriented``: from these axis codes to those."""
    return _orientations.ornt_transform(*map(_orientations.axcodes2ornt, (start, end)))


def _digest(files: Mapping[str, str]) -> str:
    lines = [f"{role} {files[role]}\n" for role in ENDINGS if role in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_volumes(case: Case) -> dict[str, Array]:
    """The available modalities' volumes and ``"seg"``, labels if any: (D, H, W) in ORIENTATION.

    Raises:
        OSError: a file is gone.
        ValueError: a file is not what it was when the case was checked.
    """
    images = {}
    seg = {SEGMENTATION: case.segmentation} if case.segmentation is not None else {}
    for role, path in {**case.files, **seg}.items():
        try:
            images[role] = _read_image(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if _digest({role: image.sha256 for role, image in images.items()}) != case.digest:
        raise ValueError(
            f"case {case.name}: its files have changed since they were checked; start again"
        )
    return {role: image.array for role, image in images.items()}


# --- writing a segmentation ----------------------------------------------------------------------


def write_segmentation(path: Path, mask: Tensor | Array, regions: Regions, case: Case) -> None:
    """Write predicted regions as :func:`labels_of` them, on the grid and in the orientation of the
    case's own files.

    Args:
        path: ends in ``.nii`` or ``.nii.gz``; written atomically, as unsigned bytes.
        mask: (R, D, H, W) bool in ORIENTATION, regions in the order of ``regions``.
        regions: name -> labels, 1 to 255.
        case: gives shape, affine, orientation codes and units: those of its segmentation, or of
            its first modality.

    Raises:
        ValueError: the mask has another shape.
    """
    array = np.asarray(mask)
    if array.shape != (len(regions), *case.shape) or array.dtype != bool:
        raise ValueError(
            f"mask for case {case.name}: got {array.dtype} {array.shape}, "
            f"expected bool {(len(regions), *case.shape)}: region and voxel axes of the case"
        )
    source: Any = nibabel.load(case.grid)
    header = source.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0
    back = _turn(ORIENTATION, _orientations.aff2axcodes(source.affine))
    painted = _orientations.apply_orientation(labels_of(array, regions), back)
    content = type(source)(painted, source.affine, header).to_bytes()
    if path.name.endswith(".gz"):
        content = gzip.compress(content, mtime=0)  # no time: equal masks give equal files
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
