"""Data so small that on them everything runs and nothing is learnt; finished runs of them."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks.brats.__main__ import main as brats
from benchmarks.brats.phantom import write_phantoms
from benchmarks.brats.volumes import Prepared
from benchmarks.sentiment.__main__ import main as sentiment
from benchmarks.sentiment.data import SentimentData, load_file, synthetic_layout
from tests.benchmarks.brats.tiny import prepare
from tests.benchmarks.running import SMALL, TINY, run


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but not drawn, which would take longer than all the rest."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).touch())


# --- sentiment -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def utterances(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 of each split of the synthetic set, as a pickle."""
    layout = {
        split: {key: values[:24] for key, values in part.items()}
        for split, part in synthetic_layout().items()
    }
    path = tmp_path_factory.mktemp("data") / "small.pkl"
    path.write_bytes(pickle.dumps(layout))
    return path


@pytest.fixture(scope="session")
def sentiment_data(utterances: Path) -> SentimentData:
    return load_file(utterances, 50)


@pytest.fixture(scope="session")
def sentiment_options(utterances: Path) -> list[str]:
    return ["--data", str(utterances), "--methods", "full,sum,gmd,pcgrad,balance", *SMALL,
            "--combinations", "k=3", "--seeds", "2", "--epochs", "2"]  # fmt: skip


@pytest.fixture(scope="session")
def sentiment_run(sentiment_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sentiment") / "out"
    run(sentiment, *sentiment_options, "--out", out)
    return out


# --- BraTS ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six complete cases."""
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), cases=6, size=(20, 20, 16), seed=0)


@pytest.fixture(scope="session")
def split(phantoms: Path) -> Path:
    """Four cases to train on, so that a batch size of 2 makes two steps; one each for the rest."""
    names = [f"Phantom_{number:03d}" for number in range(6)]
    path = phantoms.parent / "split.json"
    path.write_text(json.dumps({"train": names[:4], "valid": names[4:5], "test": names[5:]}))
    return path


@pytest.fixture(scope="session")
def incomplete(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same cases; only 000 (train) and 004 (valid) have all modalities."""
    copy = tmp_path_factory.mktemp("incomplete") / "cases"
    shutil.copytree(phantoms, copy)
    lacking = {"001": ["t1ce"], "002": ["flair", "t2"], "003": ["t1", "t1ce", "flair"],
               "005": ["t1", "t2"]}  # fmt: skip
    for number, names in lacking.items():
        for name in names:
            (copy / f"Phantom_{number}/Phantom_{number}_{name}.nii.gz").unlink()
    return copy


@pytest.fixture(scope="session")
def prepared(phantoms: Path, split: Path) -> Prepared:
    return prepare(phantoms, split)


@pytest.fixture(scope="session")
def lacking(incomplete: Path, split: Path) -> Prepared:
    return prepare(incomplete, split, allow_missing=True)


@pytest.fixture(scope="session")
def brats_options(phantoms: Path, split: Path) -> list[str]:
    return ["--data", str(phantoms), "--split", str(split), *TINY, "--batch-size", "2",
            "--methods", "sum,pcgrad", "--combinations", "k=3", "--epochs", "2"]  # fmt: skip


@pytest.fixture(scope="session")
def brats_run(brats_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With segmentations in ../segmentations."""
    out = tmp_path_factory.mktemp("brats") / "out"
    run(brats, *brats_options, "--out", out, "--predict", out.parent / "segmentations")
    return out
