"""Train, validation and test cases: k-fold by patient, a list in a file, or the released protocol.

All three give ``{"train": [...], "valid": [...], "test": [...]}``: lists of cases, sorted by name,
in which no patient is in two.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.brats.cases import GRADES, BratsData, Case

__all__ = ["SPLITS", "acn_split", "read_split", "split_cases"]

SPLITS = ("train", "valid", "test")

Split = dict[str, list[Case]]


def split_cases(data: BratsData, *, seed: int, folds: int, fold: int) -> Split:
    """Fold ``fold`` of ``folds`` is the test split, the next one (after the last, the first) valid.

    The patients, sorted by name and shuffled from the seed, fill the folds evenly, each with all
    its cases. Over all ``fold`` every patient is tested once.

    Raises:
        ValueError: fewer than 3 patients or folds, no such fold, or fewer patients than folds.
    """
    patients = sorted({case.patient for case in data.cases})
    if len(patients) < 3:
        raise ValueError(
            f"{data.source}: {len(patients)} patient(s) cannot fill train, validation and test; "
            "add patients, or list the cases of two for train and test in a file (--split FILE)"
        )
    if folds < 3 or not 0 <= fold < folds:
        raise ValueError(
            f"fold {fold} of {folds}: expected at least 3 folds, as test, validation and training "
            "need one each, and a fold from 0 to folds - 1"
        )
    if len(patients) < folds:
        raise ValueError(
            f"{data.source}: {len(patients)} patients cannot fill {folds} folds; "
            "ask for fewer folds (at least 3) or add patients"
        )
    # RandomState's numbers are promised never to change; those of newer generators are not.
    order = np.random.RandomState(seed).permutation(len(patients))
    role = {}
    for number, part in enumerate(np.array_split(order, folds)):
        for index in part:
            role[patients[index]] = {0: "test", 1: "valid"}.get((number - fold) % folds, "train")
    return _split(data, {case.name: role[case.patient] for case in data.cases})


def read_split(data: BratsData, path: Path) -> Split:
    """A JSON file ``{"train": [names], "valid": [names], "test": [names]}``.

    ``valid`` and ``test`` may be empty or absent. Cases that are in no list are left out.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not of this form, ``train`` is empty, a name is unknown or listed twice,
            or a patient has cases in two splits.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    formed = isinstance(content, dict) and set(content) <= set(SPLITS)
    if not formed or not all(isinstance(names, list) for names in content.values()):
        raise ValueError(f'{path}: expected {{"train": [names], "valid": [...], "test": [...]}}')
    if not content.get("train"):
        raise ValueError(f"{path}: train is empty or not there; list the cases to train on")
    listed = [(str(name), split) for split in SPLITS for name in content.get(split, [])]
    times, known = Counter(name for name, _ in listed), {case.name for case in data.cases}
    twice = [name for name in times if times[name] > 1]
    unknown = [name for name in times if name not in known]
    if twice or unknown:
        problem = "listed twice" if twice else f"not among the cases of {data.source}"
        raise ValueError(f"{path}: {problem}: {', '.join((twice or unknown)[:10])}")
    role = dict(listed)
    try:
        return _split(data, role)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def acn_split(data: BratsData) -> Split:
    """Fold 0 of 5 as GMD's released loader, taken from ACN, draws it: 228 train, 57 test, no valid.

    The rule: number the 285 training cases of BraTS 2018 in the order in which they are found,
    shuffle the numbers with NumPy's generator, seeded 0, and test on the first 57. (The function
    has 42 as its default seed; GMD's call ``split_dataset(root, 5, 0)``, meant to choose fold 0,
    hands that 0 to the parameter ``seed``, and fold 0 is the default.)

    Their order is that of ``glob``, which depends on the file system and is not published. Here it
    is that of the sorted paths, HGG before LGG, so the shuffle is theirs and the membership is
    known to be theirs only where their file system listed the folders in sorted order. If you
    have their list, give it to :func:`read_split` (--split FILE).

    Raises:
        ValueError: the data is not the training set of BraTS 2018, in its folders HGG and LGG.
    """
    ordered = sorted(data.cases, key=lambda case: (_grade(case), case.name))
    graded = [case for case in ordered if _grade(case) in GRADES]
    named = [case for case in ordered if case.name.lower().startswith("brats18_")]
    if not len(ordered) == len(graded) == len(named) == 285:
        raise ValueError(
            f"{data.source}: the released protocol divides the 285 training cases of BraTS 2018, "
            f"Brats18_* in HGG and LGG; got {len(ordered)} cases, {len(named)} named so and "
            f"{len(graded)} in these folders; use k-fold or --split FILE"
        )
    numbers = np.random.RandomState(0).permutation(285)
    tested = {ordered[number].name for number in numbers[:57]}
    return _split(data, {case.name: "test" if case.name in tested else "train" for case in ordered})


def _grade(case: Case) -> str:
    return case.grid.parent.parent.name


def _split(data: BratsData, role: Mapping[str, str]) -> Split:
    """Cases by split; ``role`` is case name -> split."""
    split: Split = {name: [] for name in SPLITS}
    seen: dict[str, str] = {}
    for case in sorted(data.cases, key=lambda case: case.name):
        if case.name not in role:
            continue
        name = role[case.name]
        if seen.setdefault(case.patient, name) != name:
            raise ValueError(
                f"patient {case.patient} has cases in {seen[case.patient]} and {name}; "
                "what is tested must not be trained on: move them into one split"
            )
        split[name].append(case)
    return split
