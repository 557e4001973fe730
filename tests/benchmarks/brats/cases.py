"""Small NIfTI cases for the tests of the BraTS benchmark, written with nibabel."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

REAL = Path(__file__).parents[4] / "shared/data/openms"
OLD = ("t1", "t1ce", "t2", "flair")
NEW = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f", "seg": "seg"}
SHAPE = (5, 6, 7)
AFFINE = np.array([[-1.0, 0, 0, 3], [0, -2, 0, 239], [0, 0, 1.5, -7], [0, 0, 0, 1]])


def arrays(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> dict[str, Array]:
    """A skull-stripped case: int16 modalities, zero outside a box; labels 1, 2 and 4 inside it."""
    random = np.random.default_rng(seed)
    inside = tuple(slice(1, size - 1) for size in shape)
    made: dict[str, Array] = {}
    for name in OLD:
        made[name] = np.zeros(shape, np.int16)
        made[name][inside] = random.integers(1, 900, made[name][inside].shape)
    made["seg"] = np.zeros(shape, np.uint8)
    made["seg"][inside] = random.choice([0, 1, 2, 4], made["seg"][inside].shape)
    made["seg"][2, 2, 2:5] = [1, 2, 4]  # every label occurs
    return made


def write_case(
    folder: Path,
    contents: Mapping[str, Array] | int = 0,
    *,
    separator: str = "_",
    ending: str = ".nii.gz",
    names: Mapping[str, str] | None = None,
) -> Path:
    """Write ``arrays(contents)``, or the arrays given, as FOLDER/NAME_{t1,...}.nii.gz."""
    folder.mkdir(parents=True)
    if isinstance(contents, int):
        contents = arrays(contents)
    for role, array in contents.items():
        suffix = (names or {}).get(role, role)
        write(folder / f"{folder.name}{separator}{suffix}{ending}", array)
    return folder


def write(path: Path, array: Array, affine: Array = AFFINE) -> None:
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
