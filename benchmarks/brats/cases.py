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
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from torch import Tensor
from tqdm import tqdm

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

MODALITIES = ("t1", "t1ce", "t2", "flair")
REGIONS: dict[str, tuple[int, ...]] = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
REGIONS_2023 = "WT=1,2,3 TC=1,3 ET=3"
REGIONS_2024 = f"{REGIONS_2023} RC=4"  # gliomas after treatment: RC is the resection cavity

SEGMENTATION = "seg"
# How file names end: before 2023, and since.
SUFFIXES = (
    {"t1": "t1", "t1ce": "t1ce", "t2": "t2", "flair": "flair", SEGMENTATION: "seg"},
    {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f", SEGMENTATION: "seg"},
)
NIFTI = (".nii", ".nii.gz")
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
        name, equals, listed = part.partition("=")
        numbers = listed.split(",")
        if not name or not equals or not all(re.fullmatch("[0-9]+", each) for each in numbers):
            raise ValueError(
                f"regions {text!r}: {part!r} is not NAME=LABEL,LABEL,...; "
                f"give them like {REGIONS_2023!r}"
            )
        labels = tuple(sorted(map(int, numbers)))
        if not 1 <= labels[0] <= labels[-1] <= 255 or len(set(labels)) < len(labels):
            raise ValueError(f"regions {text!r}: labels of {name!r} must differ and be 1 to 255")
        if name in regions:
            raise ValueError(f"regions {text!r}: {name!r} is there twice")
        if labels in regions.values():
            raise ValueError(f"regions {text!r}: {name!r} has the labels of another region")
        regions[name] = labels
    if not regions:
        raise ValueError(f"regions {text!r}: none given; give them like {REGIONS_2023!r}")
    return regions


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
    problems = _duplicates(folder, found)
    check = partial(
        _check_case, folder, regions=regions, allow_missing=allow_missing, labelled=labelled
    )
    cases: list[Case] = []
    labels: set[int] = set()
    with (
        ThreadPoolExecutor(max(workers, 1)) as pool,
        tqdm(total=len(found), desc="checking cases", unit="case", disable=not progress) as bar,
    ):
        for case, present, complaints in pool.map(check, found):
            bar.update()
            problems += complaints
            labels |= present
            if case is not None:
                cases.append(case)
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:PROBLEMS_SHOWN])
        more = len(problems) - PROBLEMS_SHOWN
        rest = f"\n  and {more} more" if more > 0 else ""
        raise ValueError(
            f"{folder}: {len(problems)} problem(s) in {len(found)} cases, "
            f"to be solved before training:{shown}{rest}"
        )
    for name, members in regions.items():
        if labelled and not labels.intersection(members):
            text = ", ".join(map(str, members))
            warnings.warn(
                f"{folder}: no case has a voxel of region {name} (labels {text}); "
                "are these the regions of this data?",
                stacklevel=2,
            )
    cases.sort(key=lambda case: case.name)
    digest = hashlib.sha256()
    for case in cases:
        digest.update(f"{case.name} {case.digest}\n".encode())
    return BratsData(str(folder), tuple(cases), dict(regions), digest.hexdigest(), phantom)


def _case_folders(folder: Path) -> list[Path]:
    """Folders of cases, whatever state a failed download, or an archive, left them in."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; give the one that holds the cases")
    inside = sorted(folder.iterdir())
    candidates = [path for path in inside if path.name not in GRADES]
    for path in inside:
        if path.name in GRADES and path.is_dir():
            candidates += sorted(path.iterdir())
    found = [path for path in candidates if _may_be_case(path)]
    if not found:
        names = [path.name + "/" * path.is_dir() for path in inside]
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise ValueError(
            f"{folder}: no cases; expected CASE/CASE_{{t1,t1ce,t2,flair,seg}}.nii[.gz] in it or in "
            "its folders HGG and LGG, or CASE/CASE-{t1n,t1c,t2w,t2f,seg}.nii[.gz]; "
            f"found {listed or 'nothing'}"
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


def _duplicates(folder: Path, found: Iterable[Path]) -> list[str]:
    places: dict[str, list[str]] = {}
    for path in found:
        places.setdefault(path.name, []).append(str(path.relative_to(folder)))
    return [
        f"{name}: there are two cases of this name, {' and '.join(paths)}; remove or rename one"
        for name, paths in places.items()
        if len(paths) > 1
    ]


def _check_case(
    root: Path, folder: Path, *, regions: Regions, allow_missing: bool, labelled: bool
) -> tuple[Case | None, set[int], list[str]]:
    """The case (None if it has problems), its labels, and its problems."""
    where = folder.relative_to(root)
    files, problems = _files_of(folder, where, allow_missing, labelled)
    reference: tuple[Path, _Image] | None = None
    labels: set[int] = set()
    digests = {}
    # Segmentation first: what differs from it is most often the file that is wrong.
    for role in (SEGMENTATION, *MODALITIES):
        if role not in files:
            continue
        path = files[role]
        try:
            image = _read_image(path)
            if role == SEGMENTATION:
                labels = _check_labels(image.array, regions)
            else:
                _check_intensities(image.array)
            if reference is not None:
                _check_geometry(image, reference[1], reference[0].name)
        except (OSError, ValueError) as error:
            reason = error.strerror or error if isinstance(error, OSError) else error
            problems.append(f"{where / path.name}: {reason}")
            continue
        digests[role] = image.sha256
        reference = reference or (path, image)
    if problems or reference is None:
        return None, labels, problems
    affine, shape = reference[1].affine, reference[1].array.shape
    spacing = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    case = Case(
        name=folder.name,
        patient=_patient(folder.name),
        files={name: files[name] for name in MODALITIES if name in files},
        segmentation=files.get(SEGMENTATION),
        shape=(shape[0], shape[1], shape[2]),
        spacing=(spacing[0], spacing[1], spacing[2]),
        digest=_digest(digests),
    )
    return case, labels, problems


def _patient(name: str) -> str:
    for pattern in (r"(brats1[789]_.+)_\d+", r"(brats-.+)-\d{3}"):
        if match := re.fullmatch(pattern, name, re.IGNORECASE):
            return match[1]
    return name


def _files_of(
    folder: Path, where: Path, allow_missing: bool, labelled: bool
) -> tuple[dict[str, Path], list[str]]:
    """The case's files by role, and what is wrong with their names."""
    volumes = sorted(path.name for path in folder.iterdir() if _may_be_volume(path))
    prefix = re.escape(folder.name)
    files: dict[str, Path] = {}
    problems = []
    for role in (*MODALITIES, SEGMENTATION):
        endings = "|".join({suffixes[role] for suffixes in SUFFIXES})
        # The letters' case is no matter: BraTS itself has published a few files as t2W.
        pattern = re.compile(rf"{prefix}[-_]({endings})\.nii(\.gz)?", re.IGNORECASE)
        matching = [name for name in volumes if pattern.fullmatch(name)]
        if len(matching) > 1:
            listed = " and ".join(matching)
            problems.append(f"{where}: more than one file for {role}, {listed}; keep one")
        if matching:
            files[role] = folder / matching[0]
    wanted = (*MODALITIES, SEGMENTATION) if labelled else MODALITIES
    missing = [role for role in wanted if role not in files]
    present = [role for role in MODALITIES if role in files]
    strange = sorted(set(volumes) - {path.name for path in files.values()})
    for role in missing:
        alike = _alike(strange, role)
        if role == SEGMENTATION:
            advice = "fetch it; a case without one can only be segmented (--model)"
        elif not allow_missing:
            advice = "fetch it, or allow missing modalities (--allow-missing)"
        elif not present:
            advice = "at least one modality is needed"
        elif alike:  # allowed to be missing, but it seems not to be
            advice = "give its file this name, or move what only looks like it out of the folder"
        else:
            continue
        name = _expected_name(folder.name, role, files.values())
        also = ", ".join(alike or strange)
        hint = f"; there is also {also}: is it misnamed, packed or not complete?" if also else ""
        kind = "segmentation" if role == SEGMENTATION else f"{role} file"
        problems.append(f"{where / name}: missing {kind}; {advice}{hint}")
    return {role: path for role, path in files.items() if role in wanted}, problems


def _alike(names: Iterable[str], role: str) -> list[str]:
    """Those of which a part, between what is neither letter nor digit, says the role."""
    endings = {suffixes[role] for suffixes in SUFFIXES}
    return [name for name in names if endings.intersection(re.split("[^a-z0-9]", name.lower()))]


def _expected_name(case: str, role: str, files: Iterable[Path]) -> str:
    """What the missing file would be called, judged by the case's other files."""
    names = [path.name[len(case) :] for path in files]
    newer = any(re.match("[-_](t1n|t1c|t2w|t2f)[.]", name.lower()) for name in names)
    if not names:
        newer = case.startswith("BraTS-")
    separator = names[0][0] if names else "_-"[newer]
    ending = ".nii" if names and names[0].endswith(".nii") else ".nii.gz"
    return f"{case}{separator}{SUFFIXES[newer][role]}{ending}"


def _check_labels(array: Array, regions: Regions) -> set[int]:
    known = {0}.union(*regions.values())
    unknown = np.unique(array[~np.isin(array, list(known))])
    if unknown.size == 0:
        return {label for label in known if (array == label).any()}
    if not np.isfinite(unknown).all():
        raise ValueError("has labels that are not finite numbers; fetch it again")
    if (unknown % 1 != 0).any():
        example = unknown[unknown % 1 != 0][0]
        raise ValueError(
            f"has labels that are not whole numbers, such as {example:g}; "
            "it may have been interpolated: labels need nearest neighbour"
        )
    found = ", ".join(f"{label:g}" for label in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
    message = f"unknown label {found}; the regions know {', '.join(map(str, sorted(known)))}"
    since_2024 = f'BraTS 2024 (GLI) has labels 1 to 4: give --regions "{REGIONS_2024}"'
    if 3 in unknown and dict(regions) == REGIONS:
        if 4 in array:
            raise ValueError(f"{message}. {since_2024}")
        raise ValueError(
            f"{message}. BraTS has had a label 3 only since 2023: "
            f'give --regions "{REGIONS_2023}". {since_2024}'
        )
    if 4 in unknown and dict(regions) == read_regions(REGIONS_2023):
        raise ValueError(f"{message}. {since_2024}. Until 2022, 4 was ET: leave --regions out")
    raise ValueError(f"{message}; give the data's regions (--regions)")


def _check_intensities(array: Array) -> None:
    with np.errstate(over="ignore"):  # beyond float32: becomes inf
        bad = array.size - int(np.isfinite(array.astype(np.float32)).sum())
    if bad:
        raise ValueError(f"{bad} voxels are NaN or infinite; fetch it again, or set them to 0")
    if array.min() == array.max():
        value = float(array.min())
        raise ValueError(f"is {value:g} everywhere; fetch it again, or remove it as missing")


def _check_geometry(image: "_Image", reference: "_Image", name: str) -> None:
    if image.array.shape != reference.array.shape:
        raise ValueError(
            f"shape {image.array.shape} differs from {reference.array.shape} of {name}; "
            "the files of a case must be registered to each other"
        )
    ends = [(0, size - 1) for size in reference.array.shape]
    corners = np.stack([*np.meshgrid(*ends), np.ones((2, 2, 2))]).reshape(4, 8)
    # Column by column, how far a corner of this volume is from the reference's, in its voxels.
    moved = np.linalg.solve(reference.affine, image.affine @ corners) - corners
    if not np.allclose(moved, 0, atol=AFFINE_TOLERANCE):
        raise ValueError(
            f"affine differs from that of {name} by up to {np.abs(moved).max():.3g} voxels; "
            "the files of a case must be registered to each other"
        )


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
    if not content:
        raise ValueError("is empty (0 bytes); fetch it again")
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
        raise ValueError("is not a NIfTI file; convert it, or fetch it again")
    try:
        image = kind.from_bytes(content)
        dtype, shape = image.header.get_data_dtype(), image.shape
        start = image.dataobj.offset
    except MemoryError:
        raise
    except Exception as error:  # a damaged header raises nearly anything in nibabel
        raise ValueError(f"has a damaged NIfTI header ({error}); fetch it again") from error
    if len(shape) < 3 or min(shape) < 1 or max(shape[3:], default=1) > 1:
        raise ValueError(f"has shape {tuple(shape)}; expected one volume of three dimensions")
    if dtype.kind not in "iuf":
        raise ValueError(f"holds values of type {dtype}; expected real numbers")
    needed = start + math.prod(map(int, shape)) * dtype.itemsize
    if len(content) < needed:
        raise ValueError(f"is cut off: {len(content)} bytes of {needed}; fetch it again")
    affine = np.asarray(image.affine, np.float64)
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine) < 4:
        raise ValueError(f"has an affine without inverse, {affine.tolist()}; fetch it again")
    array = np.asarray(image.dataobj).reshape(shape[:3])
    turn = _turn(_orientations.aff2axcodes(affine), ORIENTATION)
    affine = affine @ _orientations.inv_ornt_aff(turn, array.shape)
    return _Image(_orientations.apply_orientation(array, turn), affine, sha256)


_orientations: Any = nibabel.orientations  # without type hints


def _turn(start: Sequence[str], end: Sequence[str]) -> Any:
    """For ``apply_orientation``: from these axis codes to those."""
    return _orientations.ornt_transform(*map(_orientations.axcodes2ornt, (start, end)))


def _digest(files: Mapping[str, str]) -> str:
    lines = [f"{role} {files[role]}\n" for role in (*MODALITIES, SEGMENTATION) if role in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_volumes(case: Case) -> dict[str, Array]:
    """The available modalities' volumes and ``"seg"``, labels if any: (D, H, W) in ORIENTATION.

    Raises:
        OSError: a file is gone.
        ValueError: a file is not what it was when the case was checked.
    """
    images = {}
    files = dict(case.files)
    if case.segmentation is not None:
        files[SEGMENTATION] = case.segmentation
    for role, path in files.items():
        try:
            images[role] = _read_image(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if _digest({role: image.sha256 for role, image in images.items()}) != case.digest:
        raise ValueError(
            f"case {case.name}: its files have changed since they were checked; start again"
        )
    return {role: image.array for role, image in images.items()}


# --- regions as labels ---------------------------------------------------------------------------


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
        ValueError: the mask has another shape or the path another ending.
    """
    array = np.asarray(mask)
    if array.shape != (len(regions), *case.shape) or array.dtype != bool:
        raise ValueError(
            f"mask for case {case.name}: got {array.dtype} {array.shape}, "
            f"expected bool {(len(regions), *case.shape)}: region and voxel axes of the case"
        )
    if not path.name.endswith(NIFTI):
        raise ValueError(f"{path}: a segmentation's name must end in .nii or .nii.gz")
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
