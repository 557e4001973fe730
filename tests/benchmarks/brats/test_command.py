"""The BraTS benchmark from the command line: what it refuses, a dry run, runs, segmentations."""

import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from benchmarks.brats import __main__ as brats
from benchmarks.brats.__main__ import main
from benchmarks.brats.cases import MODALITIES, REGIONS, load_folder
from benchmarks.brats.inference import (
    case_logits,
    load_about,
    load_model,
    mean_of,
    model_file,
    save_model,
)
from benchmarks.brats.presets import Config
from benchmarks.brats.volumes import Prepared
from gradsplit import modality_combinations
from reference_models.unet3d import DynamicSharingUNet3d, UNet3dConfig
from tests.benchmarks.brats.cases import REAL, write
from tests.benchmarks.brats.tiny import prepare, small
from tests.benchmarks.running import (
    OF_GRADIENTS,
    TINY,
    WRITTEN,
    Capsys,
    cut_off,
    outcome,
    printed,
    refused,
    run,
)

COMBINATIONS = ["+".join(names) for names in modality_combinations(MODALITIES)]
PICTURES = sorted(["cases.png", "dice.png", *OF_GRADIENTS])
SHORT = [*TINY, "--batch-size", "2", "--combinations", "k=2", "--epochs", "1"]


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fold", "9"], "--split: fold 9 of 5: expected"),
        (["--folds", "2"], "--split: fold 0 of 2: expected at least 3 folds"),
        (["--folds", "7"], "6 patients cannot fill 7 folds"),
        (["--split", "acn"], "--split: "),
        (["--split", "nowhere.json"], "--split: cannot use "),
        (["--split", {"train": ["Phantom_000"]}], "--split: no case in test"),
        (["--split", {"train": ["Phantom_0"], "test": ["x"]}], "--split: "),
        (["--regions", "WT=1,2"], "unknown label 4; the regions know 0, 1, 2; give the data's"),
    ],
)
def test_what_does_not_fit_the_data_is_named(
    phantoms: Path, tmp_path: Path, capsys: Capsys, arguments: list[Any], message: str
) -> None:
    if isinstance(arguments[1], dict):
        (tmp_path / "split.json").write_text(json.dumps(arguments[1]))
        arguments = ["--split", tmp_path / "split.json"]
    out = tmp_path / "out"
    assert message in refused(main, capsys, "--data", phantoms, *arguments, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("check", [["--check"], []])
def test_a_damaged_case_is_named_before_anything_is_trained(
    tmp_path: Path, phantoms: Path, capsys: Capsys, check: list[str]
) -> None:
    copy, out = tmp_path / "cases", tmp_path / "out"
    shutil.copytree(phantoms, copy)
    damaged = copy / "Phantom_002/Phantom_002_flair.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    (copy / "Phantom_004/Phantom_004_t1ce.nii.gz").unlink()
    path = copy / "Phantom_001/Phantom_001_seg.nii.gz"
    image: Any = nibabel.load(path)
    labels = np.asarray(image.dataobj).astype(np.uint8)
    labels[labels == 4] = 3  # as of 2023
    write(path, labels, image.affine)
    said = refused(main, capsys, "--data", copy, "--folds", "3", "--out", out, *check)
    assert "--data: " in said
    assert "Phantom_002/Phantom_002_flair.nii.gz: is cut off" in said
    assert "Phantom_004/Phantom_004_t1ce.nii.gz: missing t1ce file" in said
    assert "--allow-missing" in said
    assert "Phantom_001/Phantom_001_seg.nii.gz: unknown label 3" in said
    assert '--regions "WT=1,2,3 TC=1,3 ET=3"' in said
    assert not out.exists()


def test_folders_that_cannot_be_written(
    tmp_path: Path, phantoms: Path, split: Path, capsys: Capsys
) -> None:
    there = ["--data", phantoms, "--split", split]
    for option in ("--out", "--predict"):
        assert f"{option}: cannot use {split}" in refused(main, capsys, *there, option, split)
    cache = ["--cache", "disk", "--cache-folder", split, "--out", tmp_path / "out"]
    assert "--cache: cannot use " in refused(main, capsys, *there, *cache)
    assert "--cache-folder: cannot use " in refused(main, capsys, "--cache-folder", split)
    assert not (tmp_path / "out").exists()


def test_what_is_no_model(brats_run: Path, phantoms: Path, tmp_path: Path, capsys: Capsys) -> None:
    arguments = ["--data", phantoms, "--predict", tmp_path / "out"]
    for name, message in (("results.json", "not a model that"), ("none.safetensors", "cannot use")):
        said = refused(main, capsys, *arguments, "--model", brats_run / name)
        assert "--model: " in said and message in said and str(brats_run / name) in said
    assert not list(tmp_path.iterdir())


# --- a dry run -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--methods", "sum,gmd", "--combinations", "singles"],
            "2 (sum, gmd; seeds 1), 7 epochs of 2 steps, 4 losses each",
        ),
        (
            ["--methods", "full", "--accumulate", "2", "--cache", "none"],
            "1 (full; seeds 1), 7 epochs of 1 steps, 1 losses each",
        ),
    ],
)
def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(
    tmp_path: Path,
    brats_options: list[str],
    phantoms: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capsys,
    more: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    run(main, *brats_options, "--epochs", "7", *more, "--check")
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["data"].startswith(f"6 cases in {phantoms}, all read and checked")
    assert said["voxels"] == "20 x 20 x 16; 0 cases lack a modality"
    assert said["regions"] == "WT = {1,2,4}, TC = {1,4}, ET = {4}"
    assert said["split"] == "train 4, valid 1, test 1"
    count = sum(p.numel() for p in DynamicSharingUNet3d(UNet3dConfig(width=8)).parameters())
    assert said["parameters"].startswith(f"{count:,}, of which ")
    assert said["trainings"] == expected
    assert re.search(r"activations \d+ MB; gradients at most \(m \+ 1\) n = \d+ MB", said["memory"])
    assert "s a step" in said["time"]
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_full_tries_incomplete_cases(incomplete: Path, split: Path) -> None:
    run(main, "--data", incomplete, "--split", split, *TINY, "--batch-size", "1",
        "--allow-missing", "--methods", "full", "--check")  # fmt: skip


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--check"], "benchmarks.brats: the loss"),
        (["--batch-size", "2"], "benchmarks.brats: sum, seed 0, epoch 1: the loss"),
        # One step: its loss is a number, but what it leads to predicts NaN.
        (["--batch-size", "4"], "benchmarks.brats: sum, seed 0, epoch 1: a score"),
    ],
)
def test_divergence_is_an_error_that_says_what_to_do(
    tmp_path: Path, brats_options: list[str], capsys: Capsys, more: list[str], said: str
) -> None:
    arguments = [*brats_options, "--lr", "1e30", "--methods", "sum", *more]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert f"{said} is not a finite number; try a lower --lr" in capsys.readouterr().err


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_writes_all_files(brats_run: Path, phantoms: Path, split: Path) -> None:
    trained = [
        f"{kind}-{name}-seed0.safetensors"
        for kind in ("best", "last")
        for name in ("sum", "pcgrad")
    ]
    assert sorted(os.listdir(brats_run)) == sorted([*trained, *PICTURES, *WRITTEN])
    for picture in PICTURES:
        assert (brats_run / picture).read_bytes().startswith(b"\x89PNG")
    for name in trained:
        assert load_model(brats_run / name)(torch.zeros(1, 4, 16, 16, 16)).shape[:2] == (1, 3)

    found = outcome(brats_run)
    assert found["data"]["sha256"] == load_folder(phantoms, REGIONS).digest
    assert found["data"]["phantom"] is False, "--data was given"
    assert found["splits"] == json.loads(split.read_text())
    assert found["config"]["methods"] == ["sum", "pcgrad"]
    assert set(found["config"]) == {field.name for field in dataclasses.fields(Config)}
    assert [(run["method"], run["seed"]) for run in found["runs"]] == [("sum", 0), ("pcgrad", 0)]
    for one in found["runs"]:
        assert len(one["history"]) == 2
        assert set(one["test"]["Phantom_005"]) == set(COMBINATIONS)


def test_incomplete_cases_from_end_to_end(
    tmp_path: Path, incomplete: Path, split: Path, no_pictures: None, capsys: Capsys
) -> None:
    there = ["--data", incomplete, "--split", split, *SHORT, "--methods", "gmd"]
    said = refused(main, capsys, *there, "--out", tmp_path / "out")
    assert "Phantom_001/Phantom_001_t1ce.nii.gz: missing t1ce file" in said

    lacking = "4 cases lack a modality (t1 2, t1ce 2, t2 2, flair 2)"
    run(main, *there, "--allow-missing", "--check")
    assert f"20 x 20 x 16; {lacking}" in capsys.readouterr().out
    out, masks = tmp_path / "out", tmp_path / "masks"
    run(main, *there, "--allow-missing", "--out", out, "--predict", masks)
    assert f"{incomplete}: of 6 cases, {lacking}" in capsys.readouterr().err
    (found,) = outcome(out)["runs"]
    assert set(found["test"]["Phantom_005"]) == {"t1ce", "flair", "t1ce+flair"}
    data = prepare(incomplete, split, allow_missing=True)
    check_segmentation(masks / "gmd-seed0/Phantom_005.nii.gz", out, "gmd", data)


def test_one_region_on_cases_of_another_kind(tmp_path: Path, no_pictures: None) -> None:
    """As ../shared/data/openms: one label, sizes that differ, an oblique affine, floats."""
    generator = np.random.default_rng(0)
    affine = np.array([[-0.9, 0.1, 0, 3], [0.1, -1.1, 0, 239], [0, 0.2, 3, -7], [0, 0, 0, 1]])
    for number, shape in enumerate([(18, 13, 16), (16, 21, 9), (17, 17, 17)]):
        name = f"patient_{number}"
        (tmp_path / "cases" / name).mkdir(parents=True)
        lesion = np.zeros(shape, np.uint8)
        lesion[5:11, 4:9, 2:7] = 1
        for role in (*MODALITIES, "seg"):
            noise = generator.normal(5, 1, shape).astype(np.float32) + lesion
            array = lesion if role == "seg" else noise
            write(tmp_path / f"cases/{name}/{name}_{role}.nii.gz", array, affine)
    out, masks = tmp_path / "out", tmp_path / "masks"
    run(main, "--data", tmp_path / "cases", "--regions", "lesion=1", *SHORT, "--methods", "sum",
        "--out", out, "--predict", masks)  # fmt: skip
    found = outcome(out)
    assert found["data"]["regions"] == {"lesion": [1]}
    counts = {name: len(cases) for name, cases in found["splits"].items()}
    assert counts == {"train": 1, "valid": 1, "test": 1}, "three folds: there are three patients"
    (tested,) = found["splits"]["test"]
    assert set(found["runs"][0]["test"][tested]["t2"]) == {"lesion"}
    assert "lesion sum" in (out / "table.md").read_text()
    image: Any = nibabel.load(masks / f"sum-seed0/{tested}.nii.gz")
    assert_allclose(image.affine, affine, atol=1e-6)
    assert set(np.unique(np.asarray(image.dataobj))) <= {0, 1}


def test_phantoms_say_that_they_are_and_full_alone_has_no_gradient_pictures(
    tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brats, "PHANTOM_SIZE", (20, 20, 16))
    cache, out = tmp_path / "cache", tmp_path / "out"
    run(main, "--phantoms", "3", "--cache", "disk", "--cache-folder", cache, *SHORT,
        "--methods", "full", "--out", out)  # fmt: skip
    titles = [line for line in (out / "table.md").read_text().splitlines() if line[:1] == "#"]
    assert all("PHANTOM" in title for title in titles) and len(titles) >= 4
    found = outcome(out)
    assert found["data"]["phantom"] is True
    assert Path(found["data"]["source"]).is_relative_to(cache)
    models = [f"{kind}-full-seed0.safetensors" for kind in ("best", "last")]
    assert sorted(os.listdir(out)) == sorted([*models, "cases.png", "dice.png", *WRITTEN])


# --- segmentations -------------------------------------------------------------------------------


def check_segmentation(path: Path, out: Path, method: str, data: Prepared) -> None:
    """That labels are those of the best model's masks, on the case's own grid."""
    image: Any = nibabel.load(path)
    (case,) = data.split["test"]
    source: Any = nibabel.load(case.segmentation)
    assert image.shape == source.shape
    assert_allclose(image.affine, source.affine)
    assert image.get_data_dtype() == np.uint8
    labels = torch.from_numpy(np.asarray(image.dataobj))
    assert set(labels.unique().tolist()) <= {0, 1, 2, 4}
    model = load_model(model_file(out, "best", method, 0))
    logits = case_logits(model, data.datasets["test"][0], small())
    whole, core, enhancing = mean_of(logits, list(logits)) > 0
    assert torch.equal(labels == 4, enhancing)
    assert torch.equal((labels == 1) | (labels == 4), core | enhancing)
    assert torch.equal(labels > 0, whole | core | enhancing)


def test_the_table_scores_what_is_written(brats_run: Path, prepared: Prepared) -> None:
    predicted = brats_run.parent / "segmentations"
    files = sorted(str(path.relative_to(predicted)) for path in predicted.rglob("*.*"))
    assert files == [f"{method}-seed0/Phantom_005.nii.gz" for method in ("pcgrad", "sum")]
    truth: Any = nibabel.load(prepared.split["test"][0].segmentation)
    for one in outcome(brats_run)["runs"]:
        path = predicted / f"{one['method']}-seed0/Phantom_005.nii.gz"
        check_segmentation(path, brats_run, one["method"], prepared)
        written: Any = nibabel.load(path)
        scored = one["test"]["Phantom_005"]["+".join(MODALITIES)]
        for region, labels in REGIONS.items():
            mask, target = (np.isin(image.dataobj, labels) for image in (written, truth))
            dice = 2 * (mask & target).sum() / (mask.sum() + target.sum())
            assert_allclose(scored[region]["dice"], dice)


def test_a_finished_run_segments_later(brats_run: Path, prepared: Prepared, tmp_path: Path) -> None:
    out, masks = tmp_path / "out", tmp_path / "later/masks"
    shutil.copytree(brats_run, out)
    # The best model may happen to be the last one, too: make sure that it is not.
    path = model_file(out, "best", "pcgrad", 0)
    weights = load_model(path).state_dict()
    save_model(path, {**weights, "head.bias": weights["head.bias"] + 0.2}, load_about(path))
    before = sorted(os.listdir(out))
    run(main, "--resume", out, "--predict", masks)
    same = []
    for method in ("sum", "pcgrad"):
        name = f"{method}-seed0/Phantom_005.nii.gz"
        check_segmentation(masks / name, out, method, prepared)
        earlier = brats_run.parent / "segmentations" / name
        same.append((masks / name).read_bytes() == earlier.read_bytes())
    assert same == [True, False]
    assert sorted(os.listdir(out)) == before


@pytest.mark.parametrize("amp", [None, "bf16"])
def test_cases_without_segmentations_are_segmented_by_a_model(
    brats_run: Path, phantoms: Path, tmp_path: Path, amp: str | None
) -> None:
    """As in training, unless something else is said: then a model trained in bf16 in float32."""
    cases, out, model = tmp_path / "cases", tmp_path / "out", tmp_path / "model.safetensors"
    shutil.copytree(phantoms, cases)
    for path in cases.glob("*/*_seg.nii.gz"):
        path.unlink()
    trained = model_file(brats_run, "best", "pcgrad", 0)
    about = load_about(trained)
    about["config"]["amp"] = amp or "off"
    save_model(model, load_model(trained).state_dict(), about)
    off = [] if amp is None else ["--amp", "off"]
    run(main, "--data", cases, "--predict", out, "--model", model, *off)
    assert sorted(os.listdir(out)) == [f"Phantom_{number:03d}.nii.gz" for number in range(6)]
    found: Any = nibabel.load(out / "Phantom_005.nii.gz")
    earlier = brats_run.parent / "segmentations/pcgrad-seed0/Phantom_005.nii.gz"
    other: Any = nibabel.load(earlier)
    np.testing.assert_array_equal(found.dataobj, other.dataobj)
    np.testing.assert_array_equal(found.affine, other.affine)
    assert found.get_data_dtype() == np.uint8


@pytest.mark.parametrize("name", ["step", "write_segmentation"])
def test_the_command_that_continues_also_segments(
    tmp_path: Path, brats_options: list[str], no_pictures: None, capsys: Capsys, name: str
) -> None:
    out, masks = tmp_path / "out", tmp_path / "masks"
    arguments = [*brats_options, "--methods", "full", "--epochs", "1", "--predict", masks]
    cut_off(brats.Training if name == "step" else brats, name, 0, main, *arguments, "--out", out)
    again = printed(capsys.readouterr().err)
    run(main, *again[3:])
    assert (masks / "full-seed0/Phantom_005.nii.gz").exists()
    assert "checkpoint.pt" not in os.listdir(out)


# --- real cases, and a GPU -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real cases are not here ({REAL})")
def test_real_cases_from_end_to_end(tmp_path: Path) -> None:
    out, masks = tmp_path / "out", tmp_path / "masks"
    run(main, "--data", REAL, "--regions", "lesion=1", "--methods", "sum", "--combinations", "k=2",
        "--epochs", "2", "--validate-every", "2", "--crop", "64", "--width", "8",
        "--batch-size", "1", "--out", out, "--predict", masks)  # fmt: skip
    found = outcome(out)
    (tested,) = found["splits"]["test"]
    assert len(found["runs"][0]["test"][tested]) == 15
    assert sorted(path.name for path in out.glob("*.png")) == PICTURES
    predicted: Any = nibabel.load(masks / f"sum-seed0/{tested}.nii.gz")
    truth: Any = nibabel.load(REAL / f"{tested}/{tested}_seg.nii.gz")
    assert predicted.shape == truth.shape
    assert_allclose(predicted.affine, truth.affine)
    assert set(np.unique(np.asarray(predicted.dataobj))) <= {0, 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_run_on_cuda(tmp_path: Path, brats_options: list[str], capsys: Capsys, amp: str) -> None:
    out, masks = tmp_path / "out", tmp_path / "masks"
    arguments = [*brats_options, "--device", "cuda", "--amp", amp]
    run(main, *arguments, "--check")
    assert "s a step" in capsys.readouterr().out
    arguments += ["--out", str(out), "--predict", str(masks)]
    cut_off(brats.Training, "step", 3, main, *arguments)
    run(main, "--resume", out, "--predict", masks)
    for one in outcome(out)["runs"]:
        assert len(one["test"]["Phantom_005"]) == 15
        assert all(math.isfinite(entry["train_loss"]) for entry in one["history"])
    for path in out.glob("*.safetensors"):
        assert all(one.device.type == "cpu" for one in load_model(path).parameters())
    assert len(list(masks.rglob("*.nii.gz"))) == 2
