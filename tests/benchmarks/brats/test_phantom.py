"""The phantom: files, geometry, what each modality shows, and what is written when."""

import json
import math
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from benchmarks.brats.phantom import SEQUENCES, TISSUES, Timing, rician, signal, write_phantoms

SIZE = (64, 64, 56)
SMALL = (24, 28, 22)
REGIONS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
# Mean AUC on real cases of BraTS, as the module's docstring has them.
REAL = {
    "t1": {"WT": 0.58, "TC": 0.58, "ET": 0.61},
    "t1ce": {"WT": 0.70, "TC": 0.91, "ET": 0.98},
    "t2": {"WT": 0.85, "TC": 0.86, "ET": 0.84},
    "flair": {"WT": 0.97, "TC": 0.95, "ET": 0.95},
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


# --- files ---------------------------------------------------------------------------------------


def test_a_case_is_laid_out_as_in_brats(root: Path) -> None:
    assert sorted(p.name for p in root.iterdir() if p.is_dir()) == [
        f"Phantom_{number:03d}" for number in range(12)
    ]
    for number in (0, 11):
        case = read(root, number)
        assert len(list((root / f"Phantom_{number:03d}").iterdir())) == len(case) == 5
        for kind, image in case.items():
            assert image.shape == SIZE
            assert image.get_data_dtype() == (np.uint8 if kind == "seg" else np.int16)
            assert np.array_equal(image.affine, case["t1"].affine)
            assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
            assert image.header.get_xyzt_units()[0] == "mm"
            assert np.allclose(image.get_qform(), image.get_sform(), atol=1e-4)


def test_the_field_of_view_holds_a_head_in_cubes(root: Path) -> None:
    zooms = np.array(read(root, 0)["seg"].header.get_zooms())
    assert np.ptp(zooms) == 0
    width, length, height = zooms * SIZE
    assert width >= 140 and 180 <= length < 190 and height >= 135


@pytest.mark.parametrize("size", [(16, 16, 16), (20, 64, 16), (24, 28, 22)])
def test_any_size_holds_a_brain_with_a_tumour(tmp_path: Path, size: tuple[int, ...]) -> None:
    case = read(write_phantoms(tmp_path, cases=1, size=size, seed=4), 0)
    assert case["t1"].shape == size
    assert np.count_nonzero(case["t1"].dataobj) > 100
    assert np.any(case["seg"].dataobj)


# --- geometry ------------------------------------------------------------------------------------


def test_outside_the_brain_is_exactly_zero_in_every_modality(
    dozen: list[Case], voxel: float
) -> None:
    for case in dozen:
        brain = case["t1"] > 0
        for name in SEQUENCES:
            assert np.array_equal(case[name] != 0, brain)
            assert case[name].min() == 0
        assert 900 < brain.sum() * voxel < 1500  # cm^3
        assert ndimage.label(brain)[1] == 1
        inner = brain[1:-1, 1:-1, 1:-1]
        assert inner.sum() == brain.sum(), "cut off by the edge of the grid"


def test_labels_are_those_of_brats_and_lie_within_the_brain(dozen: list[Case]) -> None:
    assert {int(label) for case in dozen for label in np.unique(case["seg"])} == {0, 1, 2, 4}
    for case in dozen:
        assert not np.any(case["seg"][case["t1"] == 0])


def test_volumes_of_the_regions_are_plausible_and_vary(dozen: list[Case], voxel: float) -> None:
    volumes = {
        name: np.array([region(case, name).sum() * voxel for case in dozen]) for name in REGIONS
    }
    assert volumes["WT"].min() > 10 and volumes["WT"].max() < 250
    assert volumes["TC"].min() > 1 and volumes["TC"].max() < 120
    assert 50 < volumes["WT"].mean() < 130
    assert volumes["WT"].std() > 15


def test_one_or_two_of_a_dozen_do_not_enhance(tmp_path: Path) -> None:
    root = write_phantoms(tmp_path, cases=24, size=SMALL, seed=1)
    empty = [4 not in np.asarray(read(root, number)["seg"].dataobj) for number in range(24)]
    for dozen in np.reshape(empty, (2, 12)):
        assert 1 <= dozen.sum() <= 2
    assert len({int(dozen.argmax()) for dozen in np.reshape(empty, (2, 12))}) > 1, "a fixed place"


def test_the_enhancing_rim_surrounds_the_core_and_oedema_surrounds_the_rim(
    dozen: list[Case],
) -> None:
    checked = 0
    for case in dozen:
        core, enhancing = region(case, "TC"), region(case, "ET")
        necrosis = core & ~enhancing
        if enhancing.sum() < 100 or necrosis.sum() < 100:
            continue
        checked += 1
        inwards = ndimage.distance_transform_edt(core)  # from the surface of the core
        assert inwards[enhancing].mean() < inwards[necrosis].mean() - 0.5
        shell = ndimage.binary_dilation(necrosis) & ~necrosis
        assert enhancing[shell].mean() > 0.5
        around = ndimage.binary_dilation(core) & ~core & (case["t1"] > 0)
        assert (case["seg"][around] == 2).mean() > 0.4
    assert checked >= 6


def test_tumours_are_irregular(dozen: list[Case]) -> None:
    """They fill clearly less of their convex surroundings than a ball does."""
    for case in dozen:
        whole = region(case, "WT")
        ball = ndimage.distance_transform_edt(whole).max() ** 3 * 4 / 3 * np.pi
        assert ball < 0.65 * whole.sum()  # the largest ball that fits


def test_tumours_lie_on_either_side(dozen: list[Case]) -> None:
    middle = SIZE[0] / 2
    right = [np.nonzero(region(case, "TC"))[0].mean() < middle for case in dozen]
    assert 2 <= sum(right) <= 10


def test_oedema_spares_fluid(dozen: list[Case]) -> None:
    for case in dozen:
        flair = case["flair"]  # in which nothing is as dark as fluid
        fluid = (flair > 0) & (flair < 0.4 * np.median(flair[flair > 0]))
        assert fluid.sum() > 100
        assert (case["seg"][fluid] == 2).mean() < 0.02


# --- what the modalities show --------------------------------------------------------------------


@pytest.fixture(scope="module")
def signed(dozen: list[Case]) -> dict[str, dict[str, float]]:
    """Modality and region -> mean area under the ROC curve, the voxel's z-score as the feature.

    It is below 0.5 where the region is darker than the rest.
    """
    table: dict[str, dict[str, float]] = {}
    for name in SEQUENCES:
        table[name] = {}
        for area in REGIONS:
            values = []
            for case in dozen:
                brain = case[name] > 0
                score = case[name][brain].astype(np.float64)
                score = (score - score.mean()) / score.std()
                inside = region(case, area)[brain]
                if inside.any():
                    values.append(roc_auc_score(inside, score))
            table[name][area] = float(np.mean(values))
    return table


@pytest.fixture(scope="module")
def curves(signed: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """What a classifier makes of it, which learns one sign for all cases."""
    return {
        name: {area: max(value, 1 - value) for area, value in row.items()}
        for name, row in signed.items()
    }


@pytest.mark.parametrize("area", REGIONS)
@pytest.mark.parametrize("name", REAL)
def test_a_modality_shows_a_region_as_well_as_in_brats(
    curves: dict[str, dict[str, float]], name: str, area: str
) -> None:
    assert curves[name][area] == pytest.approx(REAL[name][area], abs=0.1)


def test_flair_dominates_the_whole_tumour_and_t1ce_the_enhancing(
    curves: dict[str, dict[str, float]],
) -> None:
    assert max(curves, key=lambda name: curves[name]["WT"]) == "flair"
    assert max(curves, key=lambda name: curves[name]["ET"]) == "t1ce"
    for area in REGIONS:
        assert min(curves, key=lambda name: curves[name][area]) == "t1"
    assert curves["flair"]["WT"] > curves["t2"]["WT"] > curves["t1ce"]["WT"]


def test_tumours_are_dark_on_t1_and_bright_elsewhere(signed: dict[str, dict[str, float]]) -> None:
    for name, row in signed.items():
        assert all((value < 0.5) == (name == "t1") for value in row.values())


def test_contrasts_of_the_tumour(dozen: list[Case]) -> None:
    """Medians over the healthy brain, to which each label is compared."""

    def ratio(case: Case, name: str, label: int) -> float:
        healthy = (case["seg"] == 0) & (case[name] > 0)
        return float(np.median(case[name][case["seg"] == label]) / np.median(case[name][healthy]))

    for case in dozen:
        assert ratio(case, "flair", 2) > 1.15
        assert ratio(case, "t2", 2) > 1.15
        if np.count_nonzero(case["seg"] == 4) > 100:
            assert ratio(case, "t1ce", 4) > 1.2
            assert ratio(case, "t1", 4) < ratio(case, "t1ce", 4) - 0.15
            assert ratio(case, "t1ce", 1) < ratio(case, "t1ce", 4)
    assert np.mean([ratio(case, "t1", 1) for case in dozen]) < 0.95


def test_only_normalisation_makes_cases_comparable(dozen: list[Case]) -> None:
    for name in SEQUENCES:
        medians = [np.median(case[name][case[name] > 0]) for case in dozen]
        assert max(medians) > 2 * min(medians)


# --- physics -------------------------------------------------------------------------------------


def test_signal_against_times_worked_by_hand() -> None:
    never, half = 1e9, math.log(2)
    assert signal(Timing(tr=never, te=0), t1=800, t2=80, water=0.7) == pytest.approx(0.7)
    assert signal(Timing(tr=800 * half, te=0), t1=800, t2=80, water=1) == pytest.approx(0.5)
    assert signal(Timing(tr=never, te=80), t1=800, t2=80, water=1) == pytest.approx(1 / math.e)
    nulled = signal(Timing(tr=never, te=0, ti=800 * half), t1=800, t2=80, water=1)
    assert nulled == pytest.approx(0, abs=1e-9)
    assert signal(Timing(tr=never, te=0, ti=0), t1=800, t2=80, water=1) == pytest.approx(-1)


def test_healthy_tissues_are_ordered_as_in_radiology() -> None:
    def ordered(name: str) -> list[str]:
        def shown(kind: str) -> float:
            tissue = TISSUES[kind]
            return float(signal(SEQUENCES[name], t1=tissue.t1, t2=tissue.t2, water=tissue.water))

        return sorted(("white", "grey", "csf"), key=shown, reverse=True)

    assert ordered("t1") == ["white", "grey", "csf"]
    assert ordered("t2") == ["csf", "grey", "white"]
    assert ordered("flair") == ["grey", "white", "csf"]


@pytest.mark.parametrize("amplitude", [0.0, 1.0, 10.0])
def test_noise_is_rician(amplitude: float) -> None:
    sigma = 0.5
    noisy = rician(np.random.default_rng(0), np.full(200_000, amplitude), sigma)
    assert noisy.min() >= 0
    assert np.mean(noisy**2) == pytest.approx(amplitude**2 + 2 * sigma**2, rel=0.01)
    if amplitude == 0:  # Rayleigh
        assert noisy.mean() == pytest.approx(sigma * math.sqrt(math.pi / 2), rel=0.01)
    if amplitude == 10:  # nearly Gaussian
        assert noisy.std() == pytest.approx(sigma, rel=0.02)


# --- determinism and reuse -----------------------------------------------------------------------


def test_a_case_depends_on_seed_number_and_size_alone(tmp_path: Path) -> None:
    few = content(write_phantoms(tmp_path / "few", cases=2, size=SMALL, seed=5))
    many = content(write_phantoms(tmp_path / "many", cases=4, size=SMALL, seed=5))
    assert len(few) == 10
    assert few == {name: many[name] for name in few}
    assert len(set(many.values())) == 20
    other = content(write_phantoms(tmp_path / "few", cases=2, size=SMALL, seed=6))
    assert other.keys() == few.keys()
    assert not set(other.values()) & set(few.values())
    # Byte 4 to 7 of gzip: when it was compressed. Two runs within a second would not show it.
    assert {file[4:8] for file in many.values()} == {bytes(4)}


def test_another_size_is_another_scan_of_the_same_patient(
    tmp_path: Path, dozen: list[Case], voxel: float
) -> None:
    root = write_phantoms(tmp_path, cases=3, size=(52, 52, 44), seed=0)
    for number in range(3):
        image = read(root, number)["seg"]
        whole = np.asarray(image.dataobj) > 0
        there = whole.sum() * float(np.prod(image.header.get_zooms())) / 1000
        assert there == pytest.approx(region(dozen[number], "WT").sum() * voxel, rel=0.15)


def test_a_complete_folder_is_left_as_it_is(tmp_path: Path) -> None:
    root = write_phantoms(tmp_path, cases=2, size=SMALL, seed=0)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_phantoms(tmp_path, cases=2, size=SMALL, seed=0) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_an_interrupted_folder_is_completed(tmp_path: Path) -> None:
    root = write_phantoms(tmp_path, cases=4, size=SMALL, seed=0)
    before = content(root)
    # As left by a run that was killed in case 2: no manifest, which comes last.
    (root / "phantom.json").unlink()
    for path in [*root.glob("Phantom_003/*"), root / "Phantom_002/Phantom_002_seg.nii.gz"]:
        path.unlink()
    (root / "Phantom_003").rmdir()
    os.utime(root / "Phantom_000/Phantom_000_t1.nii.gz", ns=(7, 7))

    assert write_phantoms(tmp_path, cases=4, size=SMALL, seed=0) == root
    assert content(root) == before
    assert (root / "phantom.json").exists()
    kept = root / "Phantom_000/Phantom_000_t1.nii.gz"
    assert kept.stat().st_mtime_ns == 7, "a case that was complete is not made again"


def test_other_arguments_go_to_another_folder(tmp_path: Path) -> None:
    arguments: list[dict[str, Any]] = [
        {"cases": 1, "size": SMALL, "seed": 0},
        {"cases": 2, "size": SMALL, "seed": 0},
        {"cases": 1, "size": SMALL, "seed": 1},
        {"cases": 1, "size": (24, 28, 23), "seed": 0},
    ]
    roots = [write_phantoms(tmp_path, **each) for each in arguments]
    assert len(set(roots)) == len(arguments)
    for root, each in zip(roots, arguments, strict=True):
        assert len(list(root.glob("Phantom_*"))) == each["cases"]
        assert read(root, 0)["t1"].shape == each["size"]


@pytest.mark.parametrize("change", [{"phantom": 0}, {"seed": 9}, None])
def test_a_folder_of_another_generator_is_refused(
    tmp_path: Path, change: dict[str, int] | None
) -> None:
    manifest = write_phantoms(tmp_path, cases=1, size=SMALL, seed=0) / "phantom.json"
    if change is None:
        manifest.write_text("{", encoding="utf-8")
    else:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        manifest.write_text(json.dumps({**content, **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"phantom\.json.*delete it"):
        write_phantoms(tmp_path, cases=1, size=SMALL, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cases": 0}, "cases: expected at least 1, got 0"),
        ({"size": (15, 64, 64)}, r"size: .* at least 16 voxels, got \(15, 64, 64\)"),
        ({"size": (64, 64)}, r"size: expected three numbers"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ],
)
def test_arguments_out_of_range_write_nothing(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_phantoms(tmp_path, **{"cases": 1, "size": SMALL, "seed": 0, **change})
    assert not any(tmp_path.iterdir())
