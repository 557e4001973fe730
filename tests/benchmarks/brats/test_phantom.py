"""The phantom: files, geometry, what each modality shows, and what is written when."""

import os
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from benchmarks.brats.cases import REGIONS
from benchmarks.brats.phantom import SEQUENCES, write_phantoms

SIZE = (64, 64, 56)
SMALL = (24, 28, 22)
# Mean AUC of WT, TC and ET on real cases of BraTS, as the module's docstring has them.
REAL = {
    "t1": (0.58, 0.58, 0.61),
    "t1ce": (0.70, 0.91, 0.98),
    "t2": (0.85, 0.86, 0.84),
    "flair": (0.97, 0.95, 0.95),
}

Case = dict[str, np.ndarray[Any, Any]]


def read(root: Path, number: int) -> dict[str, Any]:
    name = f"Phantom_{number:03d}"
    return {
        kind: nibabel.load(root / name / f"{name}_{kind}.nii.gz") for kind in (*SEQUENCES, "seg")
    }


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.gz")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dozen, the first of the docstring's two."""
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), cases=12, size=SIZE, seed=0)


@pytest.fixture(scope="module")
def dozen(root: Path) -> list[Case]:
    return [
        {kind: np.asarray(image.dataobj) for kind, image in read(root, number).items()}
        for number in range(12)
    ]


@pytest.fixture(scope="module")
def voxel(root: Path) -> float:
    """Volume in cm^3."""
    return float(np.prod(read(root, 0)["t1"].header.get_zooms())) / 1000


def region(case: Case, name: str) -> np.ndarray[Any, Any]:
    return np.isin(case["seg"], REGIONS[name])


# --- geometry ------------------------------------------------------------------------------------


def test_a_case_is_laid_out_as_in_brats(root: Path) -> None:
    case = read(root, 11)
    assert len(list((root / "Phantom_011").iterdir())) == len(case) == 5
    for kind, image in case.items():
        assert image.shape == SIZE
        assert image.get_data_dtype() == (np.uint8 if kind == "seg" else np.int16)
        assert np.array_equal(image.affine, case["t1"].affine)
        assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
        assert image.header.get_xyzt_units()[0] == "mm"
        assert np.allclose(image.get_qform(), image.get_sform(), atol=1e-4)
        assert np.ptp(image.header.get_zooms()) == 0


@pytest.mark.parametrize("size", [(16, 16, 16), (20, 64, 16)])
def test_any_size_holds_a_brain_with_a_tumour(tmp_path: Path, size: tuple[int, ...]) -> None:
    case = read(write_phantoms(tmp_path, cases=1, size=size, seed=4), 0)
    assert case["t1"].shape == size
    assert np.count_nonzero(case["t1"].dataobj) > 100
    assert np.any(case["seg"].dataobj)


def test_the_brain_is_one_piece_and_all_else_exactly_zero(dozen: list[Case], voxel: float) -> None:
    for case in dozen:
        brain = case["t1"] > 0
        for name in SEQUENCES:
            assert np.array_equal(case[name] != 0, brain)
            assert case[name].min() == 0
        assert not np.any(case["seg"][~brain])
        assert 900 < brain.sum() * voxel < 1500  # cm^3
        assert ndimage.label(brain)[1] == 1
        assert brain[1:-1, 1:-1, 1:-1].sum() == brain.sum(), "cut off by the edge of the grid"


def test_regions_are_plausible_and_vary(dozen: list[Case], voxel: float) -> None:
    assert {int(label) for case in dozen for label in np.unique(case["seg"])} == {0, 1, 2, 4}
    volumes = {
        name: np.array([region(case, name).sum() * voxel for case in dozen]) for name in REGIONS
    }
    assert volumes["WT"].min() > 10 and volumes["WT"].max() < 250
    assert volumes["TC"].min() > 1 and volumes["TC"].max() < 120
    assert 50 < volumes["WT"].mean() < 130
    assert volumes["WT"].std() > 15
    right = [np.nonzero(region(case, "TC"))[0].mean() < SIZE[0] / 2 for case in dozen]
    assert 2 <= sum(right) <= 10
    for case in dozen:  # they fill clearly less of their surroundings than a ball does
        whole = region(case, "WT")
        ball = ndimage.distance_transform_edt(whole).max() ** 3 * 4 / 3 * np.pi
        assert ball < 0.65 * whole.sum()  # the largest ball that fits


def test_one_or_two_of_a_dozen_do_not_enhance(tmp_path: Path) -> None:
    root = write_phantoms(tmp_path, cases=24, size=(16, 16, 16), seed=1)
    empty = [4 not in np.asarray(read(root, number)["seg"].dataobj) for number in range(24)]
    for dozen in np.reshape(empty, (2, 12)):
        assert 1 <= dozen.sum() <= 2
    assert len({int(dozen.argmax()) for dozen in np.reshape(empty, (2, 12))}) > 1, "a fixed place"


def test_rim_around_core_and_oedema_around_the_rim(dozen: list[Case]) -> None:
    checked = 0
    for case in dozen:
        flair = case["flair"]  # in which nothing is as dark as fluid, which oedema spares
        fluid = (flair > 0) & (flair < 0.4 * np.median(flair[flair > 0]))
        assert fluid.sum() > 100
        assert (case["seg"][fluid] == 2).mean() < 0.02
        core, enhancing = region(case, "TC"), region(case, "ET")
        necrosis = core & ~enhancing
        if enhancing.sum() < 100 or necrosis.sum() < 100:
            continue
        checked += 1
        inwards = ndimage.distance_transform_edt(core)  # from the surface of the core
        assert inwards[enhancing].mean() < inwards[necrosis].mean() - 0.3
        shell = ndimage.binary_dilation(necrosis) & ~necrosis
        assert enhancing[shell].mean() > 0.5
        around = ndimage.binary_dilation(core) & ~core & (case["t1"] > 0)
        assert (case["seg"][around] == 2).mean() > 0.4
    assert checked >= 6


# --- what the modalities show --------------------------------------------------------------------


def test_a_modality_shows_a_region_as_well_as_in_brats(dozen: list[Case]) -> None:
    """Area under the ROC curve of single voxels; a classifier learns one sign for all cases."""
    found = {}
    for name, area in product(SEQUENCES, REGIONS):
        values = []
        for case in dozen:
            brain = case[name] > 0
            inside = region(case, area)[brain]
            if inside.any():
                values.append(roc_auc_score(inside, case[name][brain]))
        value = float(np.mean(values))
        assert (value < 0.5) == (name == "t1"), "dark on T1 and bright elsewhere"
        found[name, area] = max(value, 1 - value)
        assert found[name, area] == pytest.approx(REAL[name][list(REGIONS).index(area)], abs=0.1)
    assert max(SEQUENCES, key=lambda name: found[name, "WT"]) == "flair"
    assert max(SEQUENCES, key=lambda name: found[name, "ET"]) == "t1ce"
    assert found["flair", "WT"] > found["t2", "WT"] > found["t1ce", "WT"]


def test_only_normalisation_makes_cases_comparable(dozen: list[Case]) -> None:
    for name in SEQUENCES:
        medians = [np.median(case[name][case[name] > 0]) for case in dozen]
        assert max(medians) > 2 * min(medians)


# --- determinism and reuse -----------------------------------------------------------------------


def test_a_case_depends_on_seed_number_and_size_alone(tmp_path: Path) -> None:
    few = content(write_phantoms(tmp_path / "few", cases=1, size=SMALL, seed=5))
    many = content(write_phantoms(tmp_path / "many", cases=2, size=SMALL, seed=5))
    assert len(few) == 5
    assert few == {name: many[name] for name in few}
    assert len(set(many.values())) == 10
    # Other arguments go to other folders.
    other = content(write_phantoms(tmp_path / "few", cases=1, size=SMALL, seed=6))
    assert other.keys() == few.keys()
    assert not set(other.values()) & set(few.values())
    # Byte 4 to 7 of gzip: when it was compressed. Two runs within a second would not show it.
    assert {file[4:8] for file in many.values()} == {bytes(4)}


def test_another_size_is_another_scan_of_the_same_patient(
    tmp_path: Path, dozen: list[Case], voxel: float
) -> None:
    image = read(write_phantoms(tmp_path, cases=1, size=(52, 52, 44), seed=0), 0)["seg"]
    there = np.count_nonzero(image.dataobj) * float(np.prod(image.header.get_zooms())) / 1000
    assert there == pytest.approx(region(dozen[0], "WT").sum() * voxel, rel=0.15)


def test_an_interrupted_folder_is_completed_and_a_complete_case_left_alone(tmp_path: Path) -> None:
    root = write_phantoms(tmp_path, cases=3, size=SMALL, seed=0)
    before = content(root)
    for path in [*root.glob("Phantom_002/*"), root / "Phantom_001/Phantom_001_seg.nii.gz"]:
        path.unlink()
    (root / "Phantom_002").rmdir()
    kept = root / "Phantom_000/Phantom_000_t1.nii.gz"
    os.utime(kept, ns=(7, 7))
    assert write_phantoms(tmp_path, cases=3, size=SMALL, seed=0) == root
    assert content(root) == before
    assert kept.stat().st_mtime_ns == 7
