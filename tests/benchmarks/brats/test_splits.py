"""Splits of BraTS cases: laws of the folds, files of names, the released protocol."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.brats.cases import REGIONS, BratsData, Case
from benchmarks.brats.splits import acn_split, read_split, split_cases


def data_of(names: list[str], patients: list[str] | None = None, folder: str = "data") -> BratsData:
    """Cases in the order given; nothing is on disk."""
    cases = [
        Case(name, patient, {}, Path(folder, name, f"{name}_seg.nii"), (1, 1, 1), (1, 1, 1), "")
        for name, patient in zip(names, patients or names, strict=True)
    ]
    return BratsData("somewhere", tuple(cases), REGIONS, "", False)


def names_of(split: dict[str, list[Case]]) -> dict[str, list[str]]:
    return {name: [case.name for case in cases] for name, cases in split.items()}


# --- k-fold --------------------------------------------------------------------------------------


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[tuple[str, str]], int]:
    """(name, patient) of some cases, patients with up to three, in any order; a number of folds."""
    scans = draw(st.lists(st.integers(1, 3), min_size=3, max_size=25))
    cases = [(f"p{p}_{s}", f"p{p}") for p, count in enumerate(scans) for s in range(count)]
    return draw(st.permutations(cases)), draw(st.integers(3, min(10, len(scans))))


@given(cohort=cohorts(), seed=st.integers(0, 2**32 - 1))
def test_laws_of_the_folds(cohort: tuple[list[tuple[str, str]], int], seed: int) -> None:
    cases, folds = cohort
    data, sorted_data = (data_of(*map(list, zip(*c, strict=True))) for c in (cases, sorted(cases)))
    everyone = {patient for _, patient in cases}
    splits = [split_cases(data, seed=seed, folds=folds, fold=fold) for fold in range(folds)]
    for fold, split in enumerate(splits):
        listed = names_of(split)
        assert list(listed) == ["train", "valid", "test"]
        assert sorted(sum(listed.values(), [])) == sorted(name for name, _ in cases)
        assert all(part and part == sorted(part) for part in listed.values())
        train, valid, test = ({case.patient for case in part} for part in split.values())
        assert not (train & valid or train & test or valid & test)
        assert len(everyone) // folds <= len(test) <= -(-len(everyone) // folds)
        assert valid == {case.patient for case in splits[(fold + 1) % folds]["test"]}
        again = split_cases(sorted_data, seed=seed, folds=folds, fold=fold)
        assert names_of(again) == listed


def test_the_seed_decides() -> None:
    data = data_of([f"case{number:02}" for number in range(20)])
    # Pinned: results that were published must be found again.
    assert names_of(split_cases(data, seed=0, folds=5, fold=0)) == {
        "train": [f"case{n:02}" for n in (0, 2, 3, 4, 5, 7, 9, 11, 12, 14, 15, 16)],
        "valid": ["case06", "case10", "case13", "case17"],
        "test": ["case01", "case08", "case18", "case19"],
    }
    assert split_cases(data, seed=1, folds=5, fold=0) != split_cases(data, seed=0, folds=5, fold=0)


@pytest.mark.parametrize(
    ("folds", "fold", "message"),
    [
        (4, 0, "somewhere: 3 patients cannot fill 4 folds"),
        (2, 0, "fold 0 of 2: expected at least 3 folds"),
        (3, 3, "fold 3 of 3: expected"),
        (3, -1, "fold -1 of 3: expected"),
    ],
)
def test_folds_that_cannot_be(folds: int, fold: int, message: str) -> None:
    data = data_of(["a_1", "a_2", "b", "c"], ["a", "a", "b", "c"])
    with pytest.raises(ValueError, match=message):
        split_cases(data, seed=0, folds=folds, fold=fold)


def test_two_patients_are_not_told_to_take_fewer_folds() -> None:
    with pytest.raises(ValueError, match=r"2 patient\(s\) cannot fill .*; add patients, or list"):
        split_cases(data_of(["a_1", "a_2", "b"], ["a", "a", "b"]), seed=0, folds=3, fold=0)


# --- from a file ---------------------------------------------------------------------------------


def read(tmp_path: Path, content: Any) -> dict[str, list[str]]:
    data = data_of(["d", "a_2", "b", "a_1", "c"], ["d", "a", "b", "a", "c"])
    path = tmp_path / "split.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return names_of(read_split(data, path))


def test_a_file_of_names(tmp_path: Path) -> None:
    split = read(tmp_path, {"test": ["c"], "valid": ["b"], "train": ["a_2", "a_1"]})
    assert split == {"train": ["a_1", "a_2"], "valid": ["b"], "test": ["c"]}  # d is left out
    assert list(split) == ["train", "valid", "test"]
    assert read(tmp_path, {"train": ["b"]}) == {"train": ["b"], "valid": [], "test": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ([], "expected {"),
        ({"train": "b"}, "expected {"),
        ({"train": [1]}, "not among the cases of somewhere: 1"),
        ({"train": ["b"], "validation": ["c"]}, "expected {"),
        ({"train": [], "test": ["b"]}, "train is empty"),
        ({"train": ["b", "e", "f"]}, "not among the cases of somewhere: e, f"),
        ({"train": ["b"], "test": ["b", "c"]}, "listed twice: b"),
        ({"train": ["b", "b"]}, "listed twice: b"),
        ({"train": ["b", "a_1"], "test": ["a_2"]}, "patient a has cases in train and test"),
    ],
)
def test_a_file_that_cannot_be_meant(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path / 'split.json'}: ")
    assert message in str(caught.value)


# --- the released protocol -----------------------------------------------------------------------


def brats_2018(count: int = 285, prefix: str = "Brats18_") -> BratsData:
    """Names in which sorting by path and by name differ: 75 LGG names lie between the HGG ones."""
    names = [f"{prefix}TCIA{number:03}_1" for number in range(count)]
    folders = ("LGG" if number % 4 == 1 and number < 300 else "HGG" for number in range(count))
    made = [data_of([name], folder=folder) for name, folder in zip(names, folders, strict=True)]
    cases = [case for data in made for case in data.cases]
    return BratsData("2018", tuple(cases), REGIONS, "", False)


def test_released_protocol() -> None:
    data = brats_2018()
    split = acn_split(data)
    assert [len(part) for part in split.values()] == [228, 0, 57]
    # As the released loader does it, given the sorted paths.
    paths = sorted(str(case.segmentation.parent) for case in data.cases)
    numbers = np.arange(285)
    state = np.random.get_state()
    np.random.seed(0)
    np.random.shuffle(numbers)
    np.random.set_state(state)
    first = np.split(numbers, 5)[0]
    assert names_of(split)["test"] == sorted(Path(paths[number]).name for number in first)
    backwards = BratsData("2018", data.cases[::-1], REGIONS, "", False)
    assert names_of(acn_split(backwards)) == names_of(split)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: brats_2018(284), "got 284 cases"),
        (lambda: brats_2018(prefix="BraTS19_"), "got 285 cases, 0 named so"),
        (lambda: data_of([f"Brats18_{n}_1" for n in range(285)]), "285 named so and 0 in these"),
    ],
)
def test_released_protocol_needs_its_data(make: Callable[[], BratsData], found: str) -> None:
    with pytest.raises(
        ValueError, match=r"285 training cases of BraTS 2018.*--split FILE"
    ) as error:
        acn_split(make())
    assert found in str(error.value)
