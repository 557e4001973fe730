"""BraTS folders: what is found, what is refused and in which words, what is written back."""

import gzip
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.brats.cases import (
    MODALITIES,
    REGIONS,
    BratsData,
    Case,
    labels_of,
    load_folder,
    masks_of,
    read_regions,
    read_volumes,
    write_segmentation,
)
from tests.benchmarks.brats.cases import AFFINE, NEW, REAL, SHAPE, Array, arrays, write, write_case

REGIONS_2023 = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}


def load(folder: Path) -> BratsData:
    return load_folder(folder, REGIONS)


def problems(folder: Path, **options: bool) -> list[str]:
    """The problems that loading the folder reports, one a line."""
    with pytest.raises(ValueError) as caught:
        load_folder(folder, REGIONS, **options)
    first, *rest = str(caught.value).split("\n")
    assert first.startswith(f"{folder}: ")
    return [line.strip() for line in rest]


def problem(folder: Path, **options: bool) -> str:
    (line,) = problems(folder, **options)
    return line


# --- layouts -------------------------------------------------------------------------------------


def test_brats_2018_layout(tmp_path: Path) -> None:
    write_case(tmp_path / "HGG/Brats18_TCIA08_167_1", 1)
    write_case(tmp_path / "LGG/Brats18_2013_0_1", 2)
    (tmp_path / "survival_data.csv").write_text("BraTS18ID,Age,Survival\n")
    data = load(tmp_path)
    assert [case.name for case in data.cases] == ["Brats18_2013_0_1", "Brats18_TCIA08_167_1"]
    assert [case.patient for case in data.cases] == ["Brats18_2013_0", "Brats18_TCIA08_167"]
    case = data.cases[1]
    folder = tmp_path / "HGG/Brats18_TCIA08_167_1"
    assert dict(case.files) == {
        name: folder / f"Brats18_TCIA08_167_1_{name}.nii.gz" for name in MODALITIES
    }
    assert tuple(case.files) == MODALITIES
    assert case.segmentation == folder / "Brats18_TCIA08_167_1_seg.nii.gz"
    assert case.shape == SHAPE
    assert case.spacing == (1.0, 2.0, 1.5)
    assert (data.source, data.regions, data.phantom) == (str(tmp_path), REGIONS, False)


def test_brats_2023_layout(tmp_path: Path) -> None:
    contents = arrays()
    contents["seg"][contents["seg"] == 4] = 3
    for number in (1, 0):
        name = f"BraTS-GLI-00005-00{number}"
        write_case(tmp_path / name, contents, separator="-", names=NEW)
    data = load_folder(tmp_path, REGIONS_2023)
    assert [case.name for case in data.cases] == ["BraTS-GLI-00005-000", "BraTS-GLI-00005-001"]
    assert {case.patient for case in data.cases} == {"BraTS-GLI-00005"}
    files = {role: path.name for role, path in data.cases[0].files.items()}
    assert files == {role: f"BraTS-GLI-00005-000-{NEW[role]}.nii.gz" for role in MODALITIES}


def test_patient_of_a_case_name(tmp_path: Path) -> None:
    patients = {
        "Brats17_CBICA_AAB_1": "Brats17_CBICA_AAB",
        "BraTS19_TMC_06290_2": "BraTS19_TMC_06290",
        "BraTS2021_00000": "BraTS2021_00000",
        "BraTS20_Training_355": "BraTS20_Training_355",
        "BraTS-MET-00012-003": "BraTS-MET-00012",
        "openms_07": "openms_07",
    }
    for name in patients:
        write_case(tmp_path / name, ending=".nii")
    assert {case.name: case.patient for case in load(tmp_path).cases} == patients


def test_links_are_followed_and_unrelated_things_left_alone(tmp_path: Path) -> None:
    store = write_case(tmp_path / "store/one")
    data = tmp_path / "data"
    data.mkdir()
    (data / "one").symlink_to(store)
    (data / ".hidden").mkdir()
    (data / "__MACOSX").mkdir()
    (data / "logs").mkdir()
    (data / "logs/logs.txt").write_text("loss 0.3")
    (data / "one/notes.txt").write_text("motion")
    write(data / "one/one_brainmask.nii.gz", np.ones((3, 3, 3), np.uint8))
    assert [case.name for case in load(data).cases] == ["one"]


def test_nothing_found_says_what_was_expected_and_what_is_there(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "archive/BraTS2021_00000").parent
    with pytest.raises(ValueError, match=r"no cases; expected CASE/CASE_.*found archive/$"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"found BraTS2021_00000_flair.nii.gz, .*_t2.nii.gz$"):
        load(folder / "BraTS2021_00000")
    with pytest.raises(ValueError, match="there is no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found nothing"):
        load(tmp_path / "empty")


def test_a_case_or_file_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    write_case(tmp_path / "HGG/one")
    write(write_case(tmp_path / "LGG/one") / "one_t2.nii", arrays()["t2"])
    assert problems(tmp_path) == [
        "one: there are two cases of this name, in HGG and LGG; rename one",
        "LGG/one: more than one file for t2, one_t2.nii and one_t2.nii.gz; keep one",
    ]


@pytest.mark.parametrize("ending", [".nii.gz.part", ".nii.zip", ".zip", ".nii.gz.crdownload"])
def test_a_case_of_unusable_files_is_named(tmp_path: Path, ending: str) -> None:
    write_case(tmp_path / "fine", 1)
    folder = write_case(tmp_path / "one")
    for path in folder.iterdir():
        path.rename(folder / path.name.replace(".nii.gz", ending))
    lines = problems(tmp_path)
    assert len(lines) == 5
    for role in (*MODALITIES, "seg"):
        (line,) = (line for line in lines if line.startswith(f"one/one_{role}.nii.gz: missing"))
        assert line.endswith(
            f"; there is also one_{role}{ending}: is it misnamed, packed or not complete?"
        )


def test_capital_letters_are_read(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "BraTS-GLI-00008-100", separator="-", names=NEW)
    for path in folder.iterdir():
        path.rename(folder / path.name.replace("t2w", "t2W").replace(".nii.gz", ".NII.GZ"))
    (case,) = load(tmp_path).cases
    assert case.files["t2"].name == "BraTS-GLI-00008-100-t2W.NII.GZ"
    np.testing.assert_array_equal(read_volumes(case)["t2"], arrays()["t2"])
    write_segmentation(tmp_path / "out.nii", masks_of(arrays()["seg"], REGIONS), REGIONS, case)


# --- missing files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "file", "options"),
    [
        ("LGG/one", "one_t2.nii", {"ending": ".nii"}),
        ("A-000", "A-000-t2w.nii.gz", {"separator": "-", "names": NEW}),
    ],
)
def test_a_missing_modality_is_named_as_its_year_names_it(
    tmp_path: Path, case: str, file: str, options: Any
) -> None:
    (write_case(tmp_path / case, **options) / file).unlink()
    line = problem(tmp_path)
    assert line.startswith(f"{case}/{file}: missing t2 file; fetch it, or allow missing")
    assert "--allow-missing" in line
    (found,) = load_folder(tmp_path, REGIONS, allow_missing=True).cases
    assert tuple(found.files) == ("t1", "t1ce", "flair")
    assert list(read_volumes(found)) == ["t1", "t1ce", "flair", "seg"]


@pytest.mark.parametrize(
    "name", ["one_T2-1.nii.gz", "t2.nii.gz", "one_t2.nii.gz.part", "two-t2w.nii"]
)
def test_a_misnamed_modality_is_not_taken_for_a_missing_one(tmp_path: Path, name: str) -> None:
    folder = write_case(tmp_path / "one")
    (folder / "one_t2.nii.gz").rename(folder / name)
    (folder / "one_flair.nii.gz").unlink()
    line = problem(tmp_path, allow_missing=True)
    assert line.startswith("one/one_t2.nii.gz: missing t2 file; give its file this name, or move")
    assert f"; there is also {name}: is it misnamed" in line
    (folder / name).rename(folder / "one_brainmask.nii.gz")
    assert load_folder(tmp_path, REGIONS, allow_missing=True).lacking() == (
        "1 case lacks a modality (t2 1, flair 1)"
    )


def test_a_missing_segmentation_is_never_allowed_and_a_misnamed_one_pointed_at(
    tmp_path: Path,
) -> None:
    """As in BraTS 2020's case 355."""
    folder = write_case(tmp_path / "BraTS20_Training_355", ending=".nii")
    (folder / "BraTS20_Training_355_seg.nii").rename(folder / "W39_1998.09.19_Segm.nii")
    line = problem(tmp_path, allow_missing=True)
    assert line.startswith("BraTS20_Training_355/BraTS20_Training_355_seg.nii: missing segment")
    assert "W39_1998.09.19_Segm.nii" in line
    assert load_folder(tmp_path, REGIONS, labelled=False).cases[0].segmentation is None


def test_empty_cases_are_not_passed_over(tmp_path: Path) -> None:
    write_case(tmp_path / "one", {"seg": arrays()["seg"]})
    (tmp_path / "two").mkdir()
    lines = problems(tmp_path, allow_missing=True)
    assert len(lines) == 9
    assert all("at least one modality is needed" in line for line in lines if "_seg" not in line)
    assert sum(line.startswith("two/two_") and "missing" in line for line in lines) == 5


# --- damaged and inconsistent files --------------------------------------------------------------


def put(value: float, dtype: type = np.float32) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        changed = array.astype(dtype)
        changed[3, 3, 3] = value
        return changed

    return change


CONTENTS: list[tuple[str, Callable[[Array], Array], str]] = [
    ("seg", put(5, np.uint8), "unknown label 5; the regions know 0, 1, 2, 4"),
    ("seg", put(-1, np.int16), "unknown label -1"),
    ("seg", put(1.5), "not whole numbers, such as 1.5"),
    ("seg", put(np.nan), "not whole numbers, such as nan"),
    ("t1", put(np.nan), "1 voxels are NaN or infinite"),
    ("t1", put(1e39, np.float64), "1 voxels are NaN or infinite"),  # beyond float32
    ("t2", np.zeros_like, "is 0 everywhere"),
    ("t2", lambda x: np.full_like(x, 7), "is 7 everywhere"),
    ("flair", lambda x: x[:-1], "shape (4, 6, 7) differs from (5, 6, 7) of one_seg.nii.gz"),
    ("t1", lambda x: np.stack([x, x], -1), "has shape (5, 6, 7, 2)"),
    ("t1", lambda x: x[0], "has shape (6, 7)"),
    ("t1", lambda x: x.astype(np.complex64), "type complex64; expected"),
]


@pytest.mark.parametrize(("role", "change", "message"), CONTENTS)
def test_contents_that_cannot_be_are_found(
    tmp_path: Path, role: str, change: Callable[[Array], Array], message: str
) -> None:
    write_case(tmp_path / "fine", 1)
    made = arrays()
    write_case(tmp_path / "one", {**made, role: change(made[role])})
    line = problem(tmp_path)
    assert line.startswith(f"one/one_{role}.nii.gz: ")
    assert message in line


@pytest.mark.parametrize("change", ["moved", "flipped", "scaled"])
def test_files_on_other_grids_are_found(tmp_path: Path, change: str) -> None:
    folder = write_case(tmp_path / "one")
    turn = {"moved": [1, 1, 1, 1], "flipped": [-1, 1, 1, 1], "scaled": [1, 1.02, 1, 1]}[change]
    affine = AFFINE @ np.diag(turn)
    affine[0, 3] += 0.5 * (change == "moved")
    write(folder / "one_flair.nii.gz", arrays()["flair"], affine)
    start = "one/one_flair.nii.gz: affine differs from that of one_seg.nii.gz by up to"
    assert problem(tmp_path).startswith(start)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: b"", "is no NIfTI file (0 bytes)"),
        (lambda content: content[: len(content) // 2], "is cut off"),
        (lambda content: content[:-1], "is cut off"),  # of the trailer
        (gzip.decompress, "is damaged or no gzip file"),
        (lambda content: content + b"x", "is damaged or no gzip file"),
        (lambda x: x[:200] + bytes([x[200] ^ 8]) + x[201:], "is damaged or no gzip file"),
        (lambda _: gzip.compress(b"moved to another server"), "is no NIfTI file"),
    ],
)
def test_damaged_files_are_found(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    path = write_case(tmp_path / "one") / "one_t1ce.nii.gz"
    path.write_bytes(change(path.read_bytes()))
    line = problem(tmp_path)
    assert line.startswith(f"one/one_t1ce.nii.gz: {message}")


def test_a_compressed_file_under_the_name_of_another_is_found(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "one")
    (folder / "one_t1.nii.gz").rename(folder / "one_t1.nii")
    assert problem(tmp_path).startswith(
        "one/one_t1.nii: is compressed with gzip; rename it to .nii.gz"
    )


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_file_cut_off_anywhere_is_found(tmp_path: Path, ending: str) -> None:
    path = write_case(tmp_path / "one", ending=ending) / f"one_t1{ending}"
    content = path.read_bytes()
    for length in {*range(0, len(content), 47), len(content) - 1}:
        path.write_bytes(content[:length])
        assert problem(tmp_path).startswith(f"one/one_t1{ending}: "), length


def test_a_damaged_header_is_an_error_and_nothing_else(tmp_path: Path) -> None:
    """Whatever the header's bytes are: a ValueError that names the file, or a usable case."""
    folder = write_case(tmp_path / "one", ending=".nii")
    path = folder / "one_t1.nii"
    content = path.read_bytes()
    refused = 0
    random = np.random.default_rng(0)
    for _ in range(150):
        spoilt = bytearray(content)
        for place in random.integers(0, 352, random.integers(1, 4)):
            spoilt[place] = random.choice([0, 127, 128, 255, random.integers(256)])
        path.write_bytes(spoilt)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(tmp_path)
        except ValueError as error:
            assert "one/one_t1.nii: " in str(error)
            refused += 1
    assert refused > 20


def test_a_broken_link_and_folders_in_place_of_files_as_kaggle_unpacks_them(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "one")
    (folder / "one_t1.nii.gz").unlink()
    (folder / "one_t1.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    (folder / "one_t2.nii.gz").rename(folder / "file")
    (folder / "one_t2.nii.gz").mkdir()
    (folder / "file").rename(folder / "one_t2.nii.gz/scan.nii")
    assert problems(tmp_path) == [
        "one/one_t1.nii.gz: No such file or directory",
        "one/one_t2.nii.gz: is a folder that holds scan.nii; put the file itself in its place",
    ]


def test_all_problems_of_all_cases_are_listed_and_a_long_list_is_cut(tmp_path: Path) -> None:
    for number in range(22):
        folder = write_case(tmp_path / f"{number:02}", {"t1": arrays()["t1"]}, ending=".nii")
        write(folder / f"{number:02}_seg.nii", np.full(SHAPE, number % 2 * 5, np.uint8))
    lines = problems(tmp_path, allow_missing=True)
    assert [line[:13] for line in lines] == [f"{n:02}/{n:02}_seg.nii" for n in range(1, 22, 2)]
    lines = problems(tmp_path)
    assert len(lines) == 21
    assert lines[-1] == f"and {3 * 22 + 11 - 20} more"


def test_rounding_in_the_header_is_no_difference(tmp_path: Path) -> None:
    """One file keeps its orientation as a matrix, the other only as a quaternion of float32."""
    turned = AFFINE.copy()
    c, s = np.cos(0.3), np.sin(0.3)
    turned[:2, :2] = [[-c, s], [s, c]]
    folder = write_case(tmp_path / "one")
    for role, array in arrays().items():
        image = nibabel.Nifti1Image(array, turned)
        image.set_qform(turned, 1)
        image.set_sform(turned, 0 if role == "t1" else 1)
        nibabel.save(image, folder / f"one_{role}.nii.gz")
    (case,) = load(tmp_path).cases
    assert case.spacing == pytest.approx((1, 1, 1.5))


def test_what_occurs_in_the_wild_is_read(tmp_path: Path) -> None:
    """Scaled integers, other byte order, NIfTI-2, labels stored as floats."""
    made = arrays()
    folder = write_case(tmp_path / "one", made, ending=".nii")
    scaled = nibabel.Nifti1Image(made["t1"], AFFINE)
    scaled.header.set_slope_inter(0.5, 10)  # of what is stored
    nibabel.save(scaled, folder / "one_t1.nii")
    swapped = nibabel.Nifti1Header(endianness=">")
    swapped.set_data_dtype(np.dtype(">i2"))
    nibabel.save(nibabel.Nifti1Image(made["t1ce"], AFFINE, swapped), folder / "one_t1ce.nii")
    nibabel.save(nibabel.Nifti2Image(made["t2"], AFFINE), folder / "one_t2.nii")
    write(folder / "one_seg.nii", made["seg"].astype(np.float32))
    (case,) = load(tmp_path).cases
    expected = {**made, "t1": made["t1"] * 0.5 + 10}
    for role, array in read_volumes(case).items():
        np.testing.assert_array_equal(array, expected[role], err_msg=role)


def test_orientations_are_made_one_and_back_again(tmp_path: Path) -> None:
    """Cases as RAS and transposed, one whose files differ, and volumes of shape (X, Y, Z, 1)."""
    made = arrays()
    for case, turns in {
        "mixed": {"t1": "RAS", "t2": "PSL", "flair": "LPS"},
        "ras": dict.fromkeys(made, "RAS"),
        "transposed": dict.fromkeys(made, "SRP"),
    }.items():
        write_case(tmp_path / case, made)
        for role, codes in turns.items():
            image = nibabel.Nifti1Image(made[role][..., None], AFFINE)
            start, end = map(nibabel.orientations.axcodes2ornt, ("LPS", codes))
            turned = image.as_reoriented(nibabel.orientations.ornt_transform(start, end))
            nibabel.save(turned, tmp_path / f"{case}/{case}_{role}.nii.gz")
    for case in load(tmp_path).cases:
        assert (case.shape, case.spacing) == (SHAPE, (1, 2, 1.5))
        volumes = read_volumes(case)
        for role, array in made.items():
            np.testing.assert_array_equal(volumes[role], array, err_msg=f"{case.name} {role}")
        path = tmp_path / "predicted.nii.gz"
        write_segmentation(path, masks_of(volumes["seg"], REGIONS), REGIONS, case)
        written, own = nibabel.load(path), nibabel.load(case.segmentation)
        np.testing.assert_array_equal(written.affine, own.affine)
        np.testing.assert_array_equal(written.dataobj, np.squeeze(own.dataobj))


def test_a_region_that_never_occurs_is_warned_of(tmp_path: Path) -> None:
    made = arrays()
    made["seg"][made["seg"] == 4] = 1
    write_case(tmp_path / "one", made)
    with pytest.warns(UserWarning, match=r"no case has a voxel of region ET \(labels 4\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("labels", "regions", "known", "years"),
    [
        ([1, 2, 3, 4], REGIONS, "unknown label 3; the regions know 0, 1, 2, 4", ["2024"]),
        ([1, 2, 3], REGIONS, "unknown label 3", ["2023", "2024"]),
        ([1, 2, 3, 4], REGIONS_2023, "unknown label 4; the regions know 0, 1, 2, 3", ["2024"]),
        ([1, 2, 4], REGIONS_2023, "unknown label 4", ["until 2022", "2024"]),
    ],
)
def test_unknown_labels_are_explained_by_the_years_that_have_them(
    tmp_path: Path,
    labels: list[int],
    regions: dict[str, tuple[int, ...]],
    known: str,
    years: list[str],
) -> None:
    made = arrays()
    made["seg"] = np.resize(np.array(labels, np.uint8), SHAPE)
    write_case(tmp_path / "BraTS-GLI-00008-100", made, separator="-", names=NEW)
    with pytest.raises(ValueError) as caught:
        load_folder(tmp_path, regions)
    message = str(caught.value)
    assert known in message
    assert [year for year in ("until 2022", "2023", "2024") if f"BraTS {year}" in message] == years
    assert '2024 (GLI): --regions "WT=1,2,3 TC=1,3 ET=3 RC=4"' in message
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a label that is not there
        load_folder(tmp_path, read_regions("WT=1,2,3 TC=1,3 ET=3 RC=4"))


# --- digests -------------------------------------------------------------------------------------


def test_digests_are_of_contents_and_names_not_of_places(tmp_path: Path) -> None:
    for place in "abc":
        write_case(tmp_path / place / "one", 1)
        write_case(tmp_path / place / "two", 2)
    before, same = load(tmp_path / "a"), load_folder(tmp_path / "b", REGIONS, workers=3)
    assert same.digest == before.digest
    assert [case.digest for case in same.cases] == [case.digest for case in before.cases]
    assert before.cases[0].digest != before.cases[1].digest
    # The same bytes as another modality are other data.
    (tmp_path / "b/two/two_t2.nii.gz").unlink()
    (tmp_path / "c/two/two_t1.nii.gz").rename(tmp_path / "c/two/two_t2.nii.gz")
    one, other = (load_folder(tmp_path / x, REGIONS, allow_missing=True) for x in "bc")
    assert len({before.digest, one.digest, other.digest}) == 3
    assert one.cases[0].digest == before.cases[0].digest


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_case(tmp_path / "one")
    load(tmp_path)
    assert capsys.readouterr() == ("", "")
    load_folder(tmp_path, REGIONS, progress=True)
    shown = capsys.readouterr()
    assert "1/1" in shown.err and not shown.out


def test_a_file_that_changes_after_the_check_is_refused(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "one")
    (case,) = load(tmp_path).cases
    np.testing.assert_array_equal(read_volumes(case)["t2"], arrays()["t2"])
    write(folder / "one_t2.nii.gz", arrays(1)["t2"])
    with pytest.raises(ValueError, match="case one: its files have changed since"):
        read_volumes(case)
    (folder / "one_t2.nii.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"one_t2.nii.gz: is damaged or no gzip file"):
        read_volumes(case)


# --- regions -------------------------------------------------------------------------------------


def test_read_regions() -> None:
    assert read_regions("WT=1,2,3 TC=1,3 ET=3") == REGIONS_2023
    assert list(read_regions(" ET=3  WT=3,2,1 ").items()) == [("ET", (3,)), ("WT", (1, 2, 3))]
    assert read_regions("lesion=1") == {"lesion": (1,)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "none given"),
        ("WT", "'WT' is not NAME=LABEL"),
        ("WT=", "'WT=' is not NAME=LABEL"),
        ("WT=1,,2", "'WT=1,,2' is not NAME=LABEL"),
        ("WT=1, 2", "'WT=1,' is not NAME=LABEL"),
        ("WT=1.5", "'WT=1.5' is not NAME=LABEL"),
        ("WT=0,1", "labels of 'WT' must differ and be 1 to 255"),
        ("WT=1,1", "labels of 'WT' must differ and be 1 to 255"),
        ("WT=1 WT=2", "'WT' or its labels are there twice"),
        ("WT=1,2 TC=2,1", "'TC' or its labels are there twice"),
    ],
)
def test_read_regions_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_regions(text)
    assert message in str(caught.value)


# --- writing segmentations -----------------------------------------------------------------------


def case_in(folder: Path) -> Case:
    write_case(folder / "one")
    (case,) = load(folder).cases
    return case


@pytest.mark.parametrize(
    ("regions", "inside", "labels"),
    [
        (REGIONS, ["WT", "WT TC", "WT TC ET", ""], [2, 1, 4, 0]),
        # Inner regions count as outer ones, in any order of the mapping.
        (REGIONS, ["ET", "TC", "ET WT"], [4, 1, 4]),
        ({"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)}, ["ET", "WT", "WT TC"], [4, 2, 1]),
        # A region without a label of its own gets its smallest.
        ({"all": (2, 4), "a": (4,), "b": (2,)}, ["all", "a", "b"], [2, 4, 2]),
    ],
)
def test_regions_are_painted_over_each_other(
    regions: dict[str, tuple[int, ...]], inside: list[str], labels: list[int]
) -> None:
    mask = np.array([[name in here.split() for here in inside] for name in regions])
    assert labels_of(mask, regions).tolist() == labels


@st.composite
def nested_regions(draw: st.DrawFn) -> dict[str, tuple[int, ...]]:
    """Regions each inside the next, in any order of the mapping."""
    labels = draw(st.lists(st.integers(1, 255), min_size=1, max_size=8, unique=True))
    sizes = draw(st.sets(st.integers(1, len(labels)), min_size=1))
    nested = [tuple(sorted(labels[:size])) for size in sizes]
    return {f"r{number}": members for number, members in enumerate(draw(st.permutations(nested)))}


@given(regions=nested_regions(), seed=st.integers(0, 1000))
def test_masks_of_nested_regions_come_back(regions: dict[str, tuple[int, ...]], seed: int) -> None:
    labels = sorted({0}.union(*regions.values()))
    mask = masks_of(np.random.default_rng(seed).choice(labels, SHAPE), regions)
    np.testing.assert_array_equal(masks_of(labels_of(mask, regions), regions), mask)


@pytest.mark.parametrize("codes", [(1, 0), (0, 2), (0, 0)])
def test_geometry_is_the_segmentations_own(tmp_path: Path, codes: tuple[int, int]) -> None:
    affine = np.diag([1.5, 1.5, 3, 1]) + 0.25 * np.eye(4, k=3)
    folder = write_case(tmp_path / "one")
    for role, array in arrays().items():
        image = nibabel.Nifti1Image(array, affine)
        image.header.set_xyzt_units("mm", "sec")
        image.set_qform(affine, codes[0])
        image.set_sform(affine, codes[1])
        nibabel.save(image, folder / f"one_{role}.nii.gz")
    (case,) = load(tmp_path).cases
    write_segmentation(tmp_path / "out.nii.gz", np.zeros((3, *SHAPE), bool), REGIONS, case)
    written, original = nibabel.load(tmp_path / "out.nii.gz"), nibabel.load(case.segmentation)
    np.testing.assert_array_equal(written.affine, original.affine)
    assert written.header.get_zooms() == original.header.get_zooms()
    for field in ("qform_code", "sform_code", "xyzt_units", "pixdim", "quatern_b", "srow_x"):
        np.testing.assert_array_equal(written.header[field], original.header[field])


def test_scaling_of_the_segmentation_is_not_taken_over(tmp_path: Path) -> None:
    case = case_in(tmp_path)
    scaled = nibabel.Nifti1Image(arrays()["seg"].astype(np.int16), AFFINE)
    scaled.header.set_slope_inter(2, -1)
    scaled.header["cal_max"] = 9
    nibabel.save(scaled, case.segmentation)
    truth = arrays()["seg"]
    write_segmentation(tmp_path / "out.nii", masks_of(truth, REGIONS), REGIONS, case)
    written = nibabel.load(tmp_path / "out.nii")
    np.testing.assert_array_equal(np.asarray(written.dataobj), truth)
    assert written.get_data_dtype() == np.uint8
    assert written.header["cal_max"] == 0


def test_equal_masks_give_equal_files_and_nothing_else(tmp_path: Path) -> None:
    case = case_in(tmp_path / "data")
    (tmp_path / "out").mkdir()
    path, mask = tmp_path / "out/a.nii.gz", torch.from_numpy(masks_of(arrays()["seg"], REGIONS))
    write_segmentation(path, mask, REGIONS, case)
    first = path.read_bytes()
    assert first[4:8] == bytes(4)  # where gzip has the time
    write_segmentation(path, mask, REGIONS, case)
    assert path.read_bytes() == first
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.nii.gz"]


def test_a_mask_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    case = case_in(tmp_path)
    for mask in (np.zeros((2, *SHAPE), bool), np.zeros((3, *SHAPE)), np.zeros(SHAPE, bool)):
        with pytest.raises(ValueError, match=r"mask for case one: got .*expected bool \(3, 5, 6"):
            write_segmentation(tmp_path / "out.nii.gz", mask, REGIONS, case)
    assert not (tmp_path / "out.nii.gz").exists()


# --- real cases ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Path:
    if not REAL.is_dir():
        pytest.skip("the three real cases are not in ../shared/data/openms")
    return REAL


def test_real_cases(real: Path) -> None:
    data = load_folder(real, read_regions("lesion=1"), workers=2)
    assert [case.patient for case in data.cases] == ["openms_07", "openms_19", "openms_26"]
    assert {case.shape for case in data.cases} == {(182, 218, 182)}
    assert {case.spacing for case in data.cases} == {(1.0, 1.0, 1.0)}


def test_a_real_case_spoilt(real: Path, tmp_path: Path) -> None:
    folder = tmp_path / "openms_07"
    shutil.copytree(real / "openms_07", folder)
    folder.chmod(0o755)
    path = folder / "openms_07_t2.nii.gz"
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)  # the last field of the trailer
    with pytest.raises(ValueError, match=r"openms_07/openms_07_t2.nii.gz: is cut off"):
        load_folder(tmp_path, read_regions("lesion=1"), workers=2)
