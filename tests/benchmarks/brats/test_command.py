"""The BraTS benchmark: inference, the loss, training, sessions that are cut off, the command.

What it reads, splits, generates and reports is tested in files of their own. The cases here are
phantoms of 20 x 20 x 16 voxels: on them everything runs, and nothing is learnt.
"""

import dataclasses
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from monai.inferers.utils import sliding_window_inference
from numpy.testing import assert_allclose
from torch import Tensor

from benchmarks.brats import __main__ as brats
from benchmarks.brats import training as training_module
from benchmarks.brats.__main__ import main
from benchmarks.brats.cases import MODALITIES, REGIONS, load_folder
from benchmarks.brats.inference import case_logits, load_model, mean_of, model_file
from benchmarks.brats.phantom import write_phantoms
from benchmarks.brats.presets import PRESETS, Config, paper, quick, released
from benchmarks.brats.splits import read_split
from benchmarks.brats.training import Training, loss_of, loss_sums
from benchmarks.brats.volumes import Prepared, make_dataset, training_batches
from benchmarks.runs.checkpoint import load_checkpoint, save_checkpoint
from benchmarks.runs.methods import METHODS
from benchmarks.runs.session import Diverged
from benchmarks.sentiment import __main__ as sentiment
from benchmarks.sentiment.training import Training as SentimentTraining
from gradsplit import modality_combinations
from reference_models.unet3d import DynamicSharingUNet3d, UNet3dConfig
from tests.benchmarks.brats.cases import REAL, write
from tests.reference import Row, decouple, decouple_window, gmd_loop

ROOT = Path(__file__).parents[3]
COMBINATIONS = modality_combinations(MODALITIES)
SINGLES = COMBINATIONS[-4:]
SIZE = (20, 20, 16)
TINY = ["--crop", "16", "--width", "8", "--batch-size", "2", "--validate-every", "1"]
NO_CUDA = "torch sees no CUDA device"

Sample = dict[str, Any]


class Silent:
    """A progress bar that shows nothing."""

    disable = True

    def update(self, steps: int) -> None: ...


# --- data ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six complete cases."""
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), cases=6, size=SIZE, seed=0)


@pytest.fixture(scope="module")
def split(folder: Path) -> Path:
    """Four cases to train on, so that a batch size of 2 makes two steps; one each for the rest."""
    names = [f"Phantom_{number:03d}" for number in range(6)]
    path = folder.parent / "split.json"
    path.write_text(json.dumps({"train": names[:4], "valid": names[4:5], "test": names[5:]}))
    return path


@pytest.fixture(scope="module")
def incomplete(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same cases; only 000 (train) and 004 (valid) have all modalities."""
    copy = tmp_path_factory.mktemp("incomplete") / "cases"
    shutil.copytree(folder, copy)
    lacking = {"001": ["t1ce"], "002": ["flair", "t2"], "003": ["t1", "t1ce", "flair"],
               "005": ["t1", "t2"]}  # fmt: skip
    for number, names in lacking.items():
        for name in names:
            (copy / f"Phantom_{number}/Phantom_{number}_{name}.nii.gz").unlink()
    return copy


def prepare(folder: Path, split: Path, *, allow_missing: bool = False) -> Prepared:
    data = load_folder(folder, REGIONS, allow_missing=allow_missing)
    parts = read_split(data, split)
    datasets = {
        name: make_dataset(cases, REGIONS, normalisation="zscore", cache="memory")
        for name, cases in parts.items()
    }
    return Prepared(data, parts, datasets)


@pytest.fixture(scope="module")
def prepared(folder: Path, split: Path) -> Prepared:
    return prepare(folder, split)


@pytest.fixture(scope="module")
def lacking(incomplete: Path, split: Path) -> Prepared:
    return prepare(incomplete, split, allow_missing=True)


def small(**changes: Any) -> Config:
    """A step on one combination; deterministic and quick."""
    return Config(**{"crop": 16, "epochs": 1, "combinations": "k=1", "validate_every": 1,
                     "threads": 1, **changes})  # fmt: skip


def batches_of(prepared: Prepared, size: int = 2, epoch: int = 0) -> list[Sample]:
    found = training_batches(
        prepared.datasets["train"], crop=16, batch_size=size, seed=0, epoch=epoch
    )
    return list(found)


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but not drawn, which would take longer than all the rest."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).touch())


# --- inference -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> DynamicSharingUNet3d:
    """With norms that differ between modalities, as after training."""
    torch.manual_seed(3)
    network = DynamicSharingUNet3d(UNet3dConfig(width=8))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return network.eval()


def sample_of(shape: Sequence[int], missing: Sequence[str] = (), seed: int = 0) -> Sample:
    """A head that fills a box inside the volume, off centre; some of its voxels are 0.

    T1 is cut off at one side, T2 at another: the head is what any modality shows.
    """
    generator = torch.Generator().manual_seed(seed)
    volume = torch.zeros(4, *shape)
    inner = volume[:, 2:, : shape[1] - 3, 1 : shape[2] - 1]
    inner[:] = torch.randn(inner.shape, generator=generator)
    inner[torch.rand(inner.shape, generator=generator) < 0.2] = 0.0
    inner[0, :3], inner[2, :, -2:] = 0.0, 0.0
    available = torch.tensor([name not in missing for name in MODALITIES])
    volume[~available] = 0.0
    return {"volume": volume, "available": available, "name": "case"}


def expected_logits(
    model: DynamicSharingUNet3d, sample: Sample, combination: Sequence[str]
) -> Tensor:
    """The network run for this combination alone, by MONAI's inferer on the box of the head."""
    volume = sample["volume"]
    places = (volume != 0).any(0).nonzero()
    low, high = places.min(0).values.tolist(), (places.max(0).values + 1).tolist()
    box = tuple(map(slice, low, high))

    def predictor(windows: Tensor) -> Tensor:
        logits: Tensor = model(windows, available=tuple(combination))
        return logits

    with torch.no_grad():
        inside = sliding_window_inference(
            volume[(slice(None), *box)][None], 16, 1, predictor, overlap=0.25, mode="gaussian"
        )
    assert isinstance(inside, Tensor)
    whole = torch.full((inside.shape[1], *volume.shape[1:]), -torch.inf)
    whole[(slice(None), *box)] = inside[0]
    return whole


@pytest.mark.parametrize(
    ("shape", "combinations"),
    [
        ((20, 20, 16), COMBINATIONS),
        ((9, 12, 21), COMBINATIONS[3:6]),  # smaller than the crop in two directions
        ((35, 17, 18), COMBINATIONS[:1] + SINGLES[1:2]),
    ],
)
def test_one_pass_gives_what_the_network_gives_per_combination(
    model: DynamicSharingUNet3d, shape: tuple[int, ...], combinations: list[tuple[str, ...]]
) -> None:
    sample = sample_of(shape)
    logits = case_logits(model, sample, small())
    assert list(logits) == list(MODALITIES)
    for combination in combinations:
        found = mean_of(logits, combination)
        expected = expected_logits(model, sample, combination)
        assert found.shape == (3, *shape)
        assert torch.equal(found.isneginf(), expected.isneginf())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_outside_of_the_head_nothing_is_predicted(model: DynamicSharingUNet3d) -> None:
    logits = case_logits(model, sample_of((20, 20, 16)), small())
    mask = mean_of(logits, MODALITIES) > 0
    inside = torch.zeros(20, 20, 16, dtype=torch.bool)
    inside[2:, :17, 1:15] = True
    assert mask[:, inside].any(), "else this shows nothing"
    assert not mask[:, ~inside].any()
    assert all(one[:, ~inside].isneginf().all() for one in logits.values())


def test_a_volume_of_zeros_is_segmented(model: DynamicSharingUNet3d) -> None:
    sample = {"volume": torch.zeros(4, 17, 5, 16), "available": torch.tensor([True] * 4)}
    logits = case_logits(model, sample, small())
    assert all(one.shape == (3, 17, 5, 16) and one.isfinite().all() for one in logits.values())


@pytest.mark.parametrize("missing", [["t1"], ["t1ce", "flair"], ["t1", "t1ce", "t2"]])
def test_what_lies_in_a_missing_modality_has_no_influence(
    model: DynamicSharingUNet3d, missing: list[str]
) -> None:
    sample = sample_of((20, 20, 16), missing)
    expected = case_logits(model, sample, small())
    assert list(expected) == [name for name in MODALITIES if name not in missing]
    for content in (math.nan, math.inf, 7.0):
        volume = sample["volume"].clone()
        volume[~sample["available"]] = content
        found = case_logits(model, {**sample, "volume": volume}, small())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_cases_do_not_influence_each_other(model: DynamicSharingUNet3d) -> None:
    sample = sample_of((20, 20, 16))
    alone = case_logits(model, sample, small())
    case_logits(model, sample_of((9, 12, 21), ["t2"], seed=1), small())
    case_logits(model, sample_of((20, 20, 16), seed=2), small())
    again = case_logits(model, sample, small())
    assert all(torch.equal(alone[name], again[name]) for name in alone)


def test_inference_leaves_the_model_as_it_is_and_no_graph(model: DynamicSharingUNet3d) -> None:
    before = weights_of(model)
    logits = case_logits(model, sample_of((16, 16, 16)), small())
    assert not any(one.requires_grad for one in logits.values())
    assert_same_weights(before, weights_of(model))


def test_inference_in_half_precision_returns_float32(model: DynamicSharingUNet3d) -> None:
    sample = sample_of((20, 20, 16))
    exact = case_logits(model, sample, small())["t2"]
    half = case_logits(model, sample, small(amp="bf16"))["t2"]
    assert half.dtype == torch.float32
    inside = exact.isfinite()
    assert not torch.equal(half, exact)
    difference = (half[inside] - exact[inside]).norm() / exact[inside].norm()
    assert difference < 0.05


# --- the loss ------------------------------------------------------------------------------------


def dice_by_hand(logits: np.ndarray[Any, Any], label: np.ndarray[Any, Any]) -> float:
    """1 - (2 sum pt + 1) / (sum p + sum t + 1) per region over the batch; mean over regions."""
    p = 1 / (1 + np.exp(-logits))
    axes = (0, 2, 3, 4)
    dice = (2 * (p * label).sum(axes) + 1) / (p.sum(axes) + label.sum(axes) + 1)
    return float((1 - dice).mean())


def segmentation_loss(kind: str, logits: Tensor, label: Tensor) -> Tensor:
    return loss_of(loss_sums(kind, logits, label))


def test_dice_loss_of_certain_predictions() -> None:
    truth = torch.zeros(2, 2, 1, 1, 4)
    truth[0, 0, 0, 0, :3] = 1  # region 0: three voxels in sample 0, none in sample 1
    predicted = torch.zeros_like(truth)
    predicted[0, 0, 0, 0, 2:] = 1  # one right, one wrong
    predicted[1, 0, 0, 0, 0] = 1  # wrong
    logits = 200.0 * predicted - 100.0
    # Region 0: 1 - (2 * 1 + 1) / (3 + 3 + 1) = 4/7. Region 1 is empty and predicted so: 0.
    found = segmentation_loss("dice", logits, truth)
    assert_allclose(float(found), (4 / 7 + 0) / 2, rtol=1e-6)
    # Three of sixteen voxels are wrong (sample 0: two of truth missed, one too many; sample 1: one)
    wrong = float((predicted != truth).sum())
    both = segmentation_loss("dice+bce", logits, truth)
    assert wrong == 4
    assert_allclose(float(both), 2 / 7 + 100 * wrong / 16, rtol=1e-6)


@pytest.mark.parametrize("kind", ["dice", "dice+bce"])
def test_the_loss_is_the_formula(kind: str) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(3, 2, 4, 5, 6)
    label = (torch.rand(3, 2, 4, 5, 6) < 0.3).to(torch.uint8)
    x, t = logits.double().numpy(), label.double().numpy()
    expected = dice_by_hand(x, t)
    if kind == "dice+bce":
        p = 1 / (1 + np.exp(-x))
        expected += -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    assert_allclose(float(segmentation_loss(kind, logits, label)), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dice", "dice+bce"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_half_precision_logits_is_computed_in_float32(
    kind: str, dtype: torch.dtype
) -> None:
    # In fp16 the sum of 80,000 probabilities is infinite.
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 40, 40, 50).to(dtype).requires_grad_()
    label = torch.ones(1, 1, 40, 40, 50, dtype=torch.uint8)
    found = segmentation_loss(kind, logits, label)
    assert found.dtype == torch.float32
    assert_allclose(
        float(found.detach()), float(segmentation_loss(kind, logits.detach().float(), label))
    )
    found.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


# --- presets -------------------------------------------------------------------------------------


def test_the_paper_preset_is_the_papers_method() -> None:
    config = paper()
    assert (config.preset, config.methods) == ("paper", ("sum", "gmd"))
    assert (config.combinations, config.scope, config.reduction) == ("k=5", "shared", "sum")


def test_the_released_preset_is_what_the_released_code_runs() -> None:
    config = released()
    assert config.preset == "released"
    assert "pcgrad" in config.methods
    assert (config.combinations, config.scope, config.reduction) == ("all", "all", "released")
    assert (config.optimizer, config.lr, config.weight_decay) == ("adam", 8e-4, 1e-5)
    assert (config.schedule, config.epochs, config.batch_size) == ("poly", 600, 4)
    assert (config.normalisation, config.split, config.loss) == ("minmax", "acn", "dice")
    assert config.crop == 128
    assert config.accumulate == 1


def test_presets_are_found_by_name() -> None:
    assert {"quick": quick, "paper": paper, "released": released} == PRESETS
    assert all(make().preset == name for name, make in PRESETS.items())
    assert quick() == Config()


def documented(make: Callable[[], Config]) -> dict[str, str]:
    """Hyperparameter -> value, from the table in the preset's docstring."""
    lines = inspect.cleandoc(make.__doc__ or "").splitlines()
    rules = [number for number, line in enumerate(lines) if line.startswith("====")]
    starts = [match.start() for match in re.finditer("=+", lines[rules[0]])]
    found: dict[str, str] = {}
    for line in lines[rules[1] + 1 : rules[2]]:
        name, value, _ = (
            line[low:high].strip() for low, high in zip(starts, [*starts[1:], None], strict=True)
        )
        name = name or next(reversed(found))
        found[name] = f"{found.get(name, '')} {value}".strip()
    return found


@pytest.mark.parametrize("make", PRESETS.values(), ids=PRESETS)
def test_a_presets_docstring_says_what_it_sets(make: Callable[[], Config]) -> None:
    config, said = make(), documented(make)
    combinations = {"all": "all 15", "k=5": "k = 5 sampled"}[config.combinations]
    loss = {"dice": "soft Dice, smooth 1", "dice+bce": "soft Dice + BCE"}[config.loss]
    optimizer = {"adam": "Adam", "adamw": "AdamW"}[config.optimizer]
    expected = {
        "rule": rf"{config.methods[1]} \(and {config.methods[0]}\)",
        "combinations": combinations,
        "scope": config.scope,
        "reduction": config.reduction,
        "loss": re.escape(loss),
        "schedule": f"{config.schedule} 0.9",
        "batch, crop": rf"{config.batch_size} crops of {config.crop}\^3",
        "width": str(config.width),
        "epochs": rf"{config.epochs}\b.*",
        "normalisation": {"zscore": "z-score, 1-99 %", "minmax": "min-max"}[config.normalisation],
        "split": {
            "acn": "ACN fold 0, 228/57",
            "folds": f"fold {config.fold} of {config.folds or 5}",
        }[config.split],
        "seeds": str(config.seeds),
    }
    # Everything else has one meaning in every preset, and no table needs a row for it.
    unmentioned = set(expected) - set(said)
    assert unmentioned <= ({"rule", "seeds"} if make is quick else set())
    assert set(said) == set(expected) - unmentioned | {"optimizer"}
    for name in set(expected) & set(said):
        assert re.fullmatch(expected[name], said[name]), name
    match = re.fullmatch(r"(\w+), lr (\S+), weight decay (\S+)", said["optimizer"])
    assert match is not None
    assert match[1] == optimizer
    assert (float(match[2]), float(match[3])) == (config.lr, config.weight_decay)


@pytest.mark.parametrize("make", PRESETS.values(), ids=PRESETS)
def test_a_preset_reaches_the_optimizer(prepared: Prepared, make: Callable[[], Config]) -> None:
    config = dataclasses.replace(make(), crop=16)
    method = config.methods[-1]
    training = Training(config, prepared, method, 0)
    base = training.optimizer.base
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    assert type(base) is kind
    assert [group["lr"] for group in base.param_groups] == [config.lr]
    assert [group["weight_decay"] for group in base.param_groups] == [config.weight_decay]
    held = {id(p) for group in base.param_groups for p in group["params"]}
    assert held == {id(p) for p in training.model.parameters()}
    assert training.model.config.width == config.width
    said = repr(training.optimizer)
    assert f"rule={method!r}, scope={config.scope!r}, reduction={config.reduction!r}" in said
    assert len(training.sampler()) == {"all": 15, "k=5": 5}[config.combinations]


# --- training ------------------------------------------------------------------------------------


def watched(
    training: Training, rates: list[float] | None = None
) -> tuple[list[Sample], list[float]]:
    """The batches that the training's steps get from now on, and each step's learning rate."""
    batches: list[Sample] = []
    rates = [] if rates is None else rates
    step = training.step

    def spy(window: Sequence[Sample]) -> float:
        batches.extend(window)
        return step(window)

    training.step = spy  # type: ignore[method-assign]
    base = training.optimizer.base
    base.register_step_pre_hook(lambda *_: rates.append(base.param_groups[0]["lr"]))
    return batches, rates


def test_methods_start_alike_and_see_the_same_crops(prepared: Prepared) -> None:
    seen: dict[str, list[Tensor]] = {}
    for method in METHODS:
        training = Training(small(epochs=2), prepared, method, 1)
        start = list(weights_of(training.model).values())
        batches, _ = watched(training)
        training.train_epoch(Silent())
        training.train_epoch(Silent())
        assert [len(batch["name"]) for batch in batches] == [2, 2, 2, 2]
        seen[method] = start + [batch[key] for batch in batches for key in ("volume", "label")]
    for other in seen.values():
        assert all(torch.equal(a, b) for a, b in zip(seen["full"], other, strict=True))
    first, second = torch.cat(seen["full"][-8:-4:2]), torch.cat(seen["full"][-4::2])
    assert not torch.equal(first.sort(0).values, second.sort(0).values), "each epoch has its crops"


def test_seeds_differ_in_weights_and_crops(prepared: Prepared) -> None:
    trainings = [Training(small(), prepared, "sum", seed) for seed in (0, 1)]
    weights = [next(training.model.parameters()) for training in trainings]
    assert not torch.equal(*weights)
    seen = [watched(training)[0] for training in trainings]
    for training in trainings:
        training.train_epoch(Silent())
    assert not torch.equal(seen[0][0]["volume"], seen[1][0]["volume"])
    names = [[name for batch in batches for name in batch["name"]] for batches in seen]
    assert sorted(names[0]) == sorted(names[1]) == [f"Phantom_00{n}" for n in range(4)]


def test_the_crops_do_not_depend_on_the_number_of_workers(prepared: Prepared) -> None:
    found = []
    for workers in (0, 2):
        training = Training(small(workers=workers), prepared, "sum", 0)
        training.train_epoch(Silent())
        found.append(weights_of(training.model))
    assert_same_weights(*found)


@pytest.mark.parametrize(("combinations", "rows"), [("singles", 4), ("k=5", 5)])
def test_what_is_trained_on(prepared: Prepared, combinations: str, rows: int) -> None:
    training = Training(small(combinations=combinations), prepared, "gmd", 0)
    training.train_epoch(Silent())
    records = training.merges.stacked()
    assert records["gramians"].shape == (2, rows, rows)
    assert records["weights"].shape == records["trained"].shape == (2, rows)
    drawn = [set(row) for row in records["trained"].tolist()]
    assert all(len(row) == rows and row <= set(range(15)) for row in drawn)
    if combinations == "singles":
        assert drawn == [{11, 12, 13, 14}] * 2
    else:
        assert drawn[0] != drawn[1]


def test_all_combinations_are_trained_on_in_one_step(prepared: Prepared) -> None:
    training = Training(small(combinations="all"), prepared, "gmd", 0)
    training.step(batches_of(prepared)[:1])
    assert training.merges.stacked()["trained"].tolist() == [list(range(15))]


def test_sampled_combinations_are_the_same_for_every_method(prepared: Prepared) -> None:
    drawn = []
    for method in ("sum", "gmd", "pcgrad"):
        training = Training(small(combinations="k=2"), prepared, method, 0)
        training.train_epoch(Silent())
        drawn.append(training.merges.stacked()["trained"])
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_full_trains_on_all_modalities_only(prepared: Prepared) -> None:
    training = Training(small(combinations="k=5"), prepared, "full", 0)
    training.train_epoch(Silent())
    assert training.merges.stacked()["trained"].tolist() == [[0], [0]]
    assert COMBINATIONS[0] == MODALITIES


def rows_of(
    training: Training, batch: Sample, combinations: Sequence[tuple[str, ...]]
) -> list[Row]:
    """Gradients of each combination's loss by torch alone, one forward per combination."""
    rows: list[Row] = []
    label = batch["label"].float()
    for combination in combinations:
        logits = training.model(batch["volume"], available=combination)
        p = logits.sigmoid()
        axes = (0, 2, 3, 4)
        dice = (2 * (p * label).sum(axes) + 1) / (p.sum(axes) + label.sum(axes) + 1)
        bce = -(label * p.log() + (1 - label) * (1 - p).log()).mean()
        loss = (1 - dice).mean() + bce
        gradients = torch.autograd.grad(loss, list(training.model.parameters()), allow_unused=True)
        rows.append(list(gradients))
    return rows


def disagree(model: DynamicSharingUNet3d, batches: Sequence[Sample] = ()) -> None:
    """Every second voxel is tumour; T1 sees it everywhere and the others hardly any: a conflict."""
    for batch in batches:
        batch["label"][:] = torch.arange(16) % 2
    with torch.no_grad():
        model.head.weight.abs_()
        model.head.bias.fill_(-2.0)
        for name, parameter in model.decoder[-1].norm2.named_parameters():
            if "bias" in name:
                parameter.fill_(3.0 if "t1" in name.split(".") else -1.0)


def assert_gradients(training: Training, expected: Row) -> None:
    found = [parameter.grad for parameter in training.model.parameters()]
    assert [g is None for g in found] == [g is None for g in expected]
    flat = torch.cat([g.flatten().double() for g in found if g is not None])
    exact = torch.cat([g.flatten().double() for g in expected if g is not None])
    assert float((flat - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize(
    ("method", "scope", "reduction"),
    [
        ("sum", "shared", "sum"),
        ("sum", "shared", "mean"),
        ("sum", "all", "released"),
        ("gmd", "shared", "sum"),
        ("gmd", "all", "mean"),
    ],
)
def test_a_step_takes_the_merged_gradient(
    prepared: Prepared, method: str, scope: str, reduction: str
) -> None:
    config = small(combinations="singles", scope=scope, reduction=reduction)
    training = Training(config, prepared, method, 0)
    batch = batches_of(prepared)[0]
    disagree(training.model, [batch])
    rows = rows_of(training, batch, SINGLES)
    merge: Any = gmd_loop if method == "gmd" else lambda jacobian: jacobian.sum(0)
    expected = decouple(rows, merge, scope, reduction)
    if method == "gmd":
        plain = decouple(rows, lambda jacobian: jacobian.sum(0), scope, reduction)
        moved = [
            (a - b).abs().max() for a, b in zip(expected, plain, strict=True)
            if a is not None and b is not None
        ]  # fmt: skip
        assert max(moved) > 0, "there is a conflict, else this shows nothing"
    training.step([batch])
    assert_gradients(training, expected)


@pytest.mark.parametrize("missing", [[], [0]])
@pytest.mark.parametrize("method", ["sum", "gmd"])
def test_a_loss_of_several_micro_batches_is_the_mean_over_those_that_have_it(
    prepared: Prepared, method: str, missing: list[int]
) -> None:
    config = small(combinations="singles", accumulate=2, reduction="sum")
    training = Training(config, prepared, method, 0)
    window = batches_of(prepared)
    disagree(training.model, window)
    window[1]["available"][:, missing] = False  # of SINGLES, the same numbers
    micro: list[Any] = [
        {
            str(number): None if number in gone else rows_of(training, batch, [combination])[0]
            for number, combination in enumerate(SINGLES)
        }
        for batch, gone in zip(window, ([], missing), strict=True)
    ]
    merge: Any = gmd_loop if method == "gmd" else lambda jacobian: jacobian.sum(0)
    mean_loss = training.step(window)
    assert_gradients(training, decouple_window(micro, merge, "shared", "sum"))

    separate = Training(config, prepared, method, 0)
    disagree(separate.model)
    losses = [separate.losses(batch, SINGLES) for batch in window]
    means = [
        np.mean(
            [float(loss.detach()) for some in losses if (loss := some[combination]) is not None]
        )
        for combination in SINGLES
    ]
    assert_allclose(mean_loss, np.mean(means), rtol=1e-5)


def test_accumulation_makes_fewer_steps_and_keeps_the_remainder(prepared: Prepared) -> None:
    training = Training(small(batch_size=1, accumulate=3, epochs=2), prepared, "sum", 0)
    batches, rates = watched(training)
    training.train_epoch(Silent())
    assert training.steps_per_epoch == len(rates) == 2  # three micro-batches, and one
    assert len(batches) == 4
    assert len(training.merges.stacked()["weights"]) == 2


@pytest.mark.parametrize("schedule", ["poly", "cosine", "constant"])
def test_the_learning_rate_anneals_over_all_steps(prepared: Prepared, schedule: str) -> None:
    config = small(schedule=schedule, epochs=3, lr=3e-4, optimizer="adam")
    training = Training(config, prepared, "sum", 0)
    _, rates = watched(training)
    for epoch in range(3):
        training.train_epoch(Silent())
        if epoch == 1:  # cut off here
            state = training.state_dict()
            training = Training(config, prepared, "sum", 0)
            training.load_state_dict(state)
            watched(training, rates)
    part = np.arange(7) / 6
    factors = {
        "poly": (1 - part) ** 0.9,
        "cosine": (1 + np.cos(np.pi * part)) / 2,
        "constant": np.ones(7),
    }
    assert_allclose(rates, 3e-4 * factors[schedule][:6], rtol=1e-6)
    final = training.optimizer.param_groups[0]["lr"]
    assert_allclose(final, 3e-4 * factors[schedule][6], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("schedule", ["poly", "cosine"])
def test_the_last_step_of_a_long_run_is_small(prepared: Prepared, schedule: str) -> None:
    config = small(schedule=schedule, epochs=300, lr=1e-3)
    training = Training(config, prepared, "sum", 0)
    rates = []
    for _ in range(300 * training.steps_per_epoch):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.optimizer.step()
        training.schedule.step()
    assert rates[0] == 1e-3
    assert all(np.diff(rates) < 0)
    assert rates[-1] < 1e-5


def test_clipping_limits_the_merged_gradient(prepared: Prepared) -> None:
    moved = {}
    for clip in (None, 1e-3, 1e6):
        config = small(clip_norm=clip, optimizer="sgd", lr=1.0, weight_decay=0.0,
                       combinations="k=3")  # fmt: skip
        training = Training(config, prepared, "gmd", 0)
        before = weights_of(training.model)
        training.step(batches_of(prepared)[:1])
        after = weights_of(training.model)
        moved[clip] = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert_allclose(float(moved[1e-3].norm()), 1e-3, rtol=1e-3)
    assert torch.equal(moved[None], moved[1e6])
    assert torch.nn.functional.cosine_similarity(moved[None], moved[1e-3], dim=0) > 0.999


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_step_in_half_precision(prepared: Prepared, amp: str) -> None:
    window = batches_of(prepared)[:1]
    # Between the gradient's norm and that of the scaled gradient: it must be unscaled first.
    changes = {"optimizer": "sgd", "lr": 0.1, "clip_norm": 10.0}
    exact = Training(small(**changes), prepared, "gmd", 0)
    training = Training(small(amp=amp, **changes), prepared, "gmd", 0)
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 256.0}
                                    if amp == "fp16" else {})  # fmt: skip
    before = weights_of(training.model)
    assert_allclose(training.step(window), exact.step(window), rtol=0.02)
    after, expected = weights_of(training.model), weights_of(exact.model)
    assert training.skipped == 0
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert all(tensor.isfinite().all() for tensor in after.values())
    # The same direction; where each kind of rounding falls is another matter.
    steps = [
        torch.cat([(end[name] - before[name]).flatten() for name in before])
        for end in (after, expected)
    ]
    assert torch.nn.functional.cosine_similarity(*steps, dim=0) > 0.95
    assert_allclose(float(steps[0].norm()), float(steps[1].norm()), rtol=0.1)
    found, exactly = training.merges.stacked()["gramians"], exact.merges.stacked()["gramians"]
    assert_allclose(found.diagonal(dim1=1, dim2=2), exactly.diagonal(dim1=1, dim2=2), rtol=0.2)


def test_gradients_in_bf16_on_a_cpu_do_not_depend_on_what_the_memory_held(
    prepared: Prepared,
) -> None:
    # With oneDNN on CPUs that know bf16, torch 2.13's gradient of a conv3d's weight does, where the
    # volume is 2 voxels deep: with a crop of up to 32 one of the network's levels is.
    training = Training(small(amp="bf16", optimizer="sgd", lr=1e-12), prepared, "full", 0)
    batch = batches_of(prepared, size=1)[0]
    for _ in range(5):
        junk = [torch.full((2**power,), 1e30) for power in range(8, 22)]
        del junk
        training.step([batch])
    squares = training.merges.stacked()["gramians"].flatten()
    assert_allclose(squares, squares[:1].expand(5), rtol=1e-3)


def test_a_step_that_overflows_is_skipped_and_counted(prepared: Prepared) -> None:
    config = small(amp="fp16", epochs=2)
    training = Training(config, prepared, "gmd", 0)
    state = {**training.scaler.state_dict(), "scale": 2.0**60}
    training.scaler.load_state_dict(state)
    before = weights_of(training.model)
    loss = training.step(batches_of(prepared)[:1])
    assert 0 < loss < 3, "the loss itself is a number"
    assert_same_weights(before, weights_of(training.model))
    assert training.skipped == 1
    assert training.scaler.get_scale() == 2.0**59
    training.scaler.load_state_dict({**state, "scale": 64.0})
    training.step(batches_of(prepared)[1:])
    assert training.skipped == 1
    assert len(training.merges.stacked()["gramians"]) == 1, "angles of a skipped step mean nothing"
    continued = Training(config, prepared, "gmd", 0)
    continued.load_state_dict(training.state_dict())
    assert continued.scaler.state_dict() == training.scaler.state_dict()
    assert continued.scaler.get_scale() == 64.0
    assert continued.skipped == 1


@pytest.mark.parametrize("passed_over", [True, False])
def test_a_schedule_waits_for_the_first_step(
    prepared: Prepared, passed_over: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """And makes up for it: torch warns of none that runs ahead, and the end is where it was."""
    training = Training(small(amp="fp16", epochs=4, lr=1e-3), prepared, "gmd", 0)
    scale = {**training.scaler.state_dict(), "scale": 2.0**60}
    rates = []
    for number, batch in enumerate(batches_of(prepared) + batches_of(prepared, epoch=1)):
        training.scaler.load_state_dict({**scale, "scale": 64.0} if number > 1 else scale)
        training.step([] if number < 2 and passed_over else [batch])
        rates.append(training.schedule.get_last_lr()[0])
    expected = [1e-3 * (1 - number / 8) ** 0.9 for number in (0, 0, 3, 4)]
    assert_allclose(rates, expected, rtol=1e-6)
    assert not [str(one.message) for one in recwarn if "lr_scheduler" in str(one.message)]


def test_a_training_of_skipped_steps_alone_is_finished(prepared: Prepared) -> None:
    training = Training(small(amp="fp16", batch_size=4), prepared, "gmd", 0)
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 2.0**60})
    training.train_epoch(Silent())
    assert training.skipped == 1
    found = training.finish(lambda: None)
    assert found["result"]["skipped_steps"] == 1


def test_recomputed_activations_and_private_levels_train(
    prepared: Prepared, tmp_path: Path
) -> None:
    window = batches_of(prepared)[:1]
    plain = Training(small(private_encoder_levels=2), prepared, "sum", 0)
    recomputed = Training(small(private_encoder_levels=2, checkpointing=True), prepared, "sum", 0)
    assert recomputed.model.config.activation_checkpointing
    assert len(plain.model.private_encoders["t1"]) == 2
    assert_allclose(recomputed.step(window), plain.step(window), rtol=1e-6)
    for one, two in zip(plain.model.parameters(), recomputed.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
    plain.save_models(tmp_path)
    loaded = load_model(model_file(tmp_path, "last", "sum", 0))
    assert_same_weights(weights_of(loaded), weights_of(plain.model))


@pytest.mark.slow
def test_a_compiled_training_takes_the_same_step(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What another program compiled, whose graphs serve one backward, must not be found here.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    window = batches_of(prepared)[:1]
    plain = Training(small(combinations="k=2"), prepared, "sum", 0)
    compiled = Training(small(combinations="k=2", compile=True), prepared, "sum", 0)
    assert_allclose(compiled.step(window), plain.step(window), rtol=1e-4)
    assert any(tmp_path.iterdir()), "something was compiled"
    drawn = [set(COMBINATIONS[row]) for row in plain.merges.stacked()["trained"][0].tolist()]
    assert drawn[0] & drawn[1], "they share a branch, which two backwards pass"
    assert_gradients(compiled, [parameter.grad for parameter in plain.model.parameters()])
    assert plain.state_dict()["model"].keys() == compiled.state_dict()["model"].keys()


# -- incomplete cases


def test_a_loss_is_that_of_the_samples_that_have_the_combination(lacking: Prepared) -> None:
    training = Training(small(batch_size=4, combinations="all"), lacking, "sum", 0)
    (batch,) = batches_of(lacking, size=4)
    have = dict(zip(batch["name"], batch["available"].tolist(), strict=True))
    assert have["Phantom_003"] == [False, False, True, False], "only T2"
    losses = training.losses(batch, COMBINATIONS)
    assert list(losses) == COMBINATIONS
    for combination, loss in losses.items():
        columns = [MODALITIES.index(name) for name in combination]
        rows = batch["available"][:, columns].all(1)
        assert rows.any() and loss is not None
        logits = training.model(batch["volume"][rows], available=tuple(combination))
        expected = segmentation_loss("dice+bce", logits, batch["label"][rows])
        assert_allclose(float(loss.detach()), float(expected.detach()), rtol=1e-5)

    place = batch["name"].index("Phantom_003")
    alone = {key: value[place : place + 1] for key, value in batch.items()}
    losses = training.losses(alone, COMBINATIONS)
    assert [combination for combination, loss in losses.items() if loss is not None] == [("t2",)]


def test_what_lies_in_a_missing_modality_has_no_influence_on_training(lacking: Prepared) -> None:
    batches = []
    for content in (0.0, math.nan):
        (batch,) = batches_of(lacking, size=4)
        batch["volume"][~batch["available"]] = content
        batches.append(batch)
    assert batches[1]["volume"].isnan().any()
    weights = []
    for batch in batches:
        training = Training(small(batch_size=4, combinations="all"), lacking, "gmd", 0)
        training.step([batch])
        weights.append(weights_of(training.model))
    assert_same_weights(*weights)


def test_records_of_steps_with_missing_rows_are_padded(lacking: Prepared) -> None:
    training = Training(small(combinations="singles", batch_size=1), lacking, "gmd", 0)
    training.train_epoch(Silent())
    records = training.merges.stacked()
    assert records["gramians"].shape == (4, 4, 4)
    there = records["trained"] >= 0
    assert sorted(there.sum(1).tolist()) == [1, 2, 3, 4]
    assert torch.equal(records["weights"].isnan(), ~there)
    pairs = there[:, :, None] & there[:, None, :]
    assert torch.equal(records["gramians"].isnan(), ~pairs)


@pytest.mark.parametrize("method", ["full", "gmd"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_batches_without_any_of_the_combinations_are_passed_over(
    lacking: Prepared, method: str, accumulate: int
) -> None:
    # `full` needs all four modalities, which one of four cases has.
    config = small(batch_size=1, epochs=3, accumulate=accumulate)
    training = Training(config, lacking, method, 0)
    for _ in range(3):
        training.train_epoch(Silent())
    records = training.merges.stacked()
    assert 1 <= len(records["weights"]) <= 12
    assert all(math.isfinite(entry["train_loss"] or 0.0) for entry in training.history)
    assert all(tensor.isfinite().all() for tensor in weights_of(training.model).values())


def test_a_case_is_scored_for_the_combinations_it_has(lacking: Prepared) -> None:
    training = Training(small(combinations="singles"), lacking, "sum", 0)
    training.train_epoch(Silent())
    found = training.finish(lambda: None)["result"]["test"]
    assert list(found) == ["Phantom_005"]
    assert set(found["Phantom_005"]) == {"t1ce", "flair", "t1ce+flair"}


# -- the best epoch


def test_the_epoch_with_the_best_validation_is_tested(prepared: Prepared, tmp_path: Path) -> None:
    config = small(combinations="k=1", epochs=5, lr=0.02, schedule="constant", validate_every=2)
    training = Training(config, prepared, "sum", 2)
    weights = []
    for _ in range(5):
        training.train_epoch(Silent())
        weights.append(weights_of(training.model))
    training.save_models(tmp_path)
    found = training.finish(lambda: None)["result"]
    by_epoch = [entry["valid_dice"] for entry in training.history]
    assert [value is None for value in by_epoch] == [True, False, True, False, False]
    scores = [-1.0 if value is None else value for value in by_epoch]
    best = found["best_epoch"]
    assert best == int(np.argmax(scores)) + 1 < 5, "else this shows nothing"
    assert found["valid_dice"] == max(scores)
    for kind, epoch in (("best", best), ("last", 5)):
        loaded = load_model(model_file(tmp_path, kind, "sum", 2))
        assert_same_weights(weights_of(loaded), weights[epoch - 1])
        assert not loaded.training

    other = Training(config, prepared, "sum", 2)
    other.model.load_state_dict(weights[best - 1])
    scored = found["test"]["Phantom_005"]
    for combination, regions in dice_of(other, "test").items():
        for region, dice in regions.items():
            assert_allclose(scored["+".join(combination)][region]["dice"], dice, rtol=1e-6)
    valid = [dice for regions in dice_of(other, "valid").values() for dice in regions.values()]
    assert len(valid) == 15 * 3
    assert_allclose(found["valid_dice"], np.mean(valid), rtol=1e-6)


def dice_of(training: Training, split: str) -> dict[tuple[str, ...], dict[str, float]]:
    """Hard Dice of the split's only case, by combination and region."""
    sample = training.prepared.datasets[split][0]
    logits = case_logits(training.model, sample, training.config)
    truth = sample["label"] > 0
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for combination in COMBINATIONS:
        mask = mean_of(logits, combination).sigmoid() > 0.5
        for outer, inner in ((1, 2), (0, 1)):  # TC holds ET, WT holds TC
            mask[outer] |= mask[inner]
        both = (mask & truth).sum((1, 2, 3)).tolist()
        total = (mask.sum((1, 2, 3)) + truth.sum((1, 2, 3))).tolist()
        found[combination] = {
            region: 2 * b / t if t else 1.0
            for region, b, t in zip(REGIONS, both, total, strict=True)
        }
    return found


def test_without_validation_the_last_epoch_is_tested(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["Phantom_000"], "test": ["Phantom_005"]}))
    training = Training(small(epochs=2), prepare(folder, path), "sum", 0)
    training.train_epoch(Silent())
    training.train_epoch(Silent())
    last = weights_of(training.model)
    found = training.finish(lambda: None)["result"]
    assert (found["best_epoch"], found["valid_dice"]) == (2, None)
    assert_same_weights(last, weights_of(training.model))


def test_a_test_cut_off_after_a_case_continues_with_the_next(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    tested = ["Phantom_003", "Phantom_004", "Phantom_005"]
    path.write_text(json.dumps({"train": ["Phantom_000"], "test": tested}))
    data = prepare(folder, path)
    training = Training(small(), data, "sum", 0)
    training.train_epoch(Silent())
    states: list[dict[str, Any]] = []

    def save() -> None:
        save_checkpoint(tmp_path / "state.pt", training.state_dict())
        states.append(load_checkpoint(tmp_path / "state.pt"))

    whole = training.finish(save)
    assert [list(state["tested"]) for state in states] == [tested[:1], tested[:2], tested]
    for left, state in ((2, states[0]), (1, states[1])):
        continued = Training(small(), data, "sum", 0)
        continued.load_state_dict(state)
        states.clear()
        found = continued.finish(save)
        assert len(states) == left
        assert found["result"]["test"] == whole["result"]["test"]
        assert found["slices"]["case"] == whole["slices"]["case"]
        assert torch.equal(found["slices"]["volumes"], whole["slices"]["volumes"])
        for name, mask in whole["slices"]["predictions"].items():
            assert torch.equal(found["slices"]["predictions"][name], mask)


def test_a_loss_that_is_no_number_ends_the_training(prepared: Prepared) -> None:
    training = Training(small(optimizer="sgd", lr=1e30, weight_decay=0.0), prepared, "sum", 0)
    with pytest.raises(Diverged, match="the loss is not a finite number"):
        training.train_epoch(Silent())


# --- the command ---------------------------------------------------------------------------------


def stopped(arguments: Sequence[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that is refused."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.partition("error: ")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nonsense"], "--methods: unknown method 'nonsense' (choose from full, sum"),
        (["--methods", "gmd,gmd"], "--methods: 'gmd,gmd' names a method twice"),
        (["--combinations", "k=16"], "--combinations: 'k=16' (choose from all, singles, k=1 to"),
        (["--preset", "best"], "--preset: invalid choice: 'best'"),
        (["--scope", "some"], "--scope: invalid choice: 'some'"),
        (["--loss", "focal"], "--loss: invalid choice: 'focal'"),
        (["--amp", "fp8"], "--amp: invalid choice: 'fp8'"),
        (["--seeds", "0"], "--seeds: must be a whole number of at least 1, got '0'"),
        (["--crop", "0"], "--crop: must be a whole number of at least 1, got '0'"),
        (["--accumulate", "-1"], "--accumulate: must be a whole number of at least 1, got '-1'"),
        (["--lr", "nan"], "--lr: must be a positive number, got 'nan'"),
        (["--clip-norm", "0"], "--clip-norm: must be a positive number, got '0'"),
        (["--fold", "-1"], "--fold: must be a whole number of at least 0, got '-1'"),
        (["--width", "12"], "--width: "),
        (["--private-encoder-levels", "9"], "--private-encoder-levels: "),
        (["--fold", "9"], "fold 9 of 5: expected"),
        (["--folds", "2"], "fold 0 of 2: expected at least 3 folds"),
        (["--folds", "7"], "6 patients cannot fill 7 folds"),
        (["--split", "acn"], "--split: "),
        (["--split", "nowhere.json"], "--split: cannot use "),
        (["--regions", "WT"], "--regions: regions 'WT': 'WT' is not NAME=LABEL"),
        (["--regions", "WT=1,2"], "unknown label 4; the regions know 0, 1, 2; give the data's"),
        (["--device", "abacus"], "--device: 'abacus' cannot be used here"),
        (["--device", "meta"], "--device: 'meta' cannot be used here"),
        (["--data", "nowhere"], "--data: "),
        (["--resume", "nowhere"], "--resume: nowhere holds no checkpoint.pt"),
        (["--resume", "x", "--lr", "1", "--batch-size", "4"], "leave out --lr, --batch-size"),
        (["--resume", "x", "--out", "y"], "leave out --out"),
        (["--resume", "x", "--check"], "leave out --check"),
        (["--model", "x"], "--model: say also --predict OUT and --data FOLDER"),
        (["--model", "x", "--predict", "y"], "as in training; leave out --epochs, --crop"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_named_and_leave_nothing_behind(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = [] if "--resume" in arguments else ["--data", folder, "--epochs", "1", *TINY]
    assert message in stopped([*data, *arguments], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = stopped(["--data", folder, "--device", "cuda", "--check"], capsys)
    assert "--device: 'cuda' cannot be used here" in message


def test_a_folder_without_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = stopped(["--data", tmp_path, "--check"], capsys)
    assert f"--data: {tmp_path}: no cases; expected CASE/CASE_" in message


@pytest.mark.parametrize("check", [["--check"], []])
def test_a_damaged_case_is_named_before_anything_is_trained(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], check: list[str]
) -> None:
    copy = tmp_path / "cases"
    shutil.copytree(folder, copy)
    damaged = copy / "Phantom_002/Phantom_002_flair.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    missing = copy / "Phantom_004/Phantom_004_t1ce.nii.gz"
    missing.unlink()
    out = tmp_path / "out"
    message = stopped(["--data", copy, "--folds", "3", *TINY, "--out", out, *check], capsys)
    assert "--data: " in message
    assert "Phantom_002/Phantom_002_flair.nii.gz: is cut off" in message
    assert "Phantom_004/Phantom_004_t1ce.nii.gz: missing t1ce file" in message
    assert "--allow-missing" in message
    assert not out.exists()


def test_labels_of_2023_are_explained(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "cases"
    shutil.copytree(folder, copy)
    path = copy / "Phantom_001/Phantom_001_seg.nii.gz"
    image: Any = nibabel.load(path)
    labels = np.asarray(image.dataobj).astype(np.uint8)
    labels[labels == 4] = 3
    write(path, labels, image.affine)
    message = stopped(["--data", copy, *TINY, "--out", tmp_path / "out"], capsys)
    assert "Phantom_001/Phantom_001_seg.nii.gz: unknown label 3" in message
    assert '--regions "WT=1,2,3 TC=1,3 ET=3"' in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": ["Phantom_000"], "test": ["Phantom_9"]}, "Phantom_9"),
        ({"train": ["Phantom_000"]}, "no case in test"),
        ({"test": ["Phantom_000"]}, "train is empty"),
        ({"train": ["Phantom_000"], "test": ["Phantom_000"]}, "listed twice: Phantom_000"),
        ([1], "expected {"),
    ],
)
def test_a_bad_split_file(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], content: Any, message: str
) -> None:
    path = tmp_path / "split.json"
    path.write_text(json.dumps(content))
    found = stopped(["--data", folder, "--split", path, "--out", tmp_path / "out"], capsys)
    assert found.startswith("argument --split: ")
    assert message in found
    assert os.listdir(tmp_path) == ["split.json"]


def test_folders_that_cannot_be_written(
    tmp_path: Path, folder: Path, split: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--data", folder, "--split", split, *TINY]
    for option in ("--out", "--predict"):
        assert f"{option}: cannot create {split}" in stopped([*there, option, split], capsys)
    cache = ["--cache", "disk", "--cache-folder", split, "--out", tmp_path / "out"]
    assert "--cache: cannot use " in stopped([*there, *cache], capsys)
    assert "--cache-folder: cannot use " in stopped(["--cache-folder", split], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more",
    [
        ["--methods", "sum,gmd", "--combinations", "singles"],
        ["--methods", "full", "--accumulate", "2", "--cache", "none"],
    ],
)
def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(
    tmp_path: Path,
    folder: Path,
    split: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", str(folder), "--split", str(split), "--epochs", "7", *TINY, *more]
    assert main([*arguments, "--check"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["data"].startswith(f"6 cases in {folder}, all read and checked")
    assert said["voxels"] == "20 x 20 x 16; 0 cases lack a modality"
    assert said["regions"] == "WT = {1,2,4}, TC = {1,4}, ET = {4}"
    assert said["split"] == "train 4, valid 1, test 1"
    count = sum(p.numel() for p in DynamicSharingUNet3d(UNet3dConfig(width=8)).parameters())
    assert said["parameters"].startswith(f"{count:,}, of which ")
    expected = {
        "sum,gmd": "2 (sum, gmd; seeds 1), 7 epochs of 2 steps, 4 losses each",
        "full": "1 (full; seeds 1), 7 epochs of 1 steps, 1 losses each",
    }
    assert said["trainings"] == expected[more[1]]
    assert re.search(r"activations \d+ MB; gradients at most \(m \+ 1\) n = \d+ MB", said["memory"])
    assert "s a step" in said["time"]
    assert not list(tmp_path.iterdir())


def test_a_dry_run_that_diverges_is_an_error_that_says_so(
    folder: Path, split: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(folder), "--split", str(split), *TINY, "--check"]
    assert main([*arguments, "--optimizer", "sgd", "--lr", "1e30"]) == 1
    assert "the loss is not a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "what"), [("2", "the loss"), ("4", "a score")])
def test_divergence_is_an_error_that_says_what_to_do(
    tmp_path: Path, folder: Path, split: Path, capsys: pytest.CaptureFixture[str], size: str,
    what: str,
) -> None:  # fmt: skip
    # Batches of 4 make one step: its loss is a number, but what it leads to predicts NaN.
    arguments = ["--data", str(folder), "--split", str(split), "--methods", "sum", "--epochs", "1"]
    arguments += [*TINY, "--batch-size", size, "--optimizer", "sgd", "--lr", "1e30"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "sum, seed 0, epoch 1" in error
    assert f"{what} is not a finite number; try a lower --lr" in error


# -- a whole run


RUN = ["--methods", "sum,gmd", "--combinations", "k=2", "--epochs", "2", *TINY]
PICTURES = ["before_after.png", "cases.png", "dice.png", "gradients.png"]


def outcome(folder: Path) -> list[dict[str, Any]]:
    """The runs of a finished folder, without the time they took."""
    content = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    runs: list[dict[str, Any]] = content["runs"]
    for run in runs:
        del run["seconds"]
    return runs


def models(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: load_checkpoint(path) for path in sorted(folder.glob("*.pt"))}


def assert_same_run(one: Path, two: Path) -> None:
    """Scores, and the weights of the best and last models, bit for bit; nothing left over."""
    assert outcome(one) == outcome(two)
    left, right = models(one), models(two)
    assert left.keys() == right.keys()
    for name in left:
        assert_same_weights(left[name].pop("model"), right[name].pop("model"))
        assert left[name] == right[name]
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))


@pytest.fixture(scope="module")
def finished(folder: Path, split: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from end to end, with segmentations in ../segmentations."""
    out = tmp_path_factory.mktemp("finished") / "out"
    arguments = ["--data", folder, "--split", split, *RUN, "--out", out]
    arguments += ["--predict", out.parent / "segmentations"]
    assert main(list(map(str, arguments))) == 0
    return out


def test_a_run_writes_all_files(finished: Path, folder: Path, split: Path) -> None:
    trained = [f"{kind}-{name}-seed0.pt" for kind in ("best", "last") for name in ("gmd", "sum")]
    assert sorted(os.listdir(finished)) == sorted([*trained, *PICTURES, "results.json", "table.md"])
    for picture in PICTURES:
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")
    for name in trained:
        model = load_model(finished / name)
        assert model(torch.zeros(1, 4, 16, 16, 16)).shape == (1, 3, 16, 16, 16)

    found = json.loads((finished / "results.json").read_text(), parse_constant=pytest.fail)
    assert found["data"]["sha256"] == load_folder(folder, REGIONS).digest
    assert found["data"]["phantom"] is False, "--data was given"
    assert found["splits"] == json.loads(split.read_text())
    assert found["config"]["methods"] == ["sum", "gmd"]
    assert set(found["config"]) == {field.name for field in dataclasses.fields(Config)}
    assert [(run["method"], run["seed"]) for run in found["runs"]] == [("sum", 0), ("gmd", 0)]
    for run in found["runs"]:
        assert len(run["history"]) == 2
        assert set(run["test"]["Phantom_005"]) == {"+".join(names) for names in COMBINATIONS}


def test_the_table_has_a_row_per_combination(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = (finished / "table.md").read_text()
    blocks = [block.splitlines() for block in table.split("\n\n") if "○" in block and "|" in block]
    assert len(blocks) == 3  # Dice, HD95, the released code's Dice
    found = {run["method"]: run["test"]["Phantom_005"] for run in outcome(finished)}
    for lines, metric, factor in zip(
        blocks, ("dice", "hd95", "soft_dice_released"), (100, 1, 100), strict=True
    ):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        header, circles = rows[0], [row for row in rows if set("".join(row[:4])) <= {"●", "○"}
                                    and row[0]]  # fmt: skip
        assert header == ["T1", "T1ce", "T2", "FLAIR", "WT sum", "WT gmd", "TC sum", "TC gmd",
                          "ET sum", "ET gmd"]  # fmt: skip
        assert len({tuple(row[:4]) for row in circles}) == len(circles) == 15
        for row in circles:
            there = [name for name, cell in zip(MODALITIES, row, strict=False) if cell == "●"]
            for title, cell in zip(header[4:], row[4:], strict=True):
                region, method = title.split()
                value = found[method]["+".join(there)][region][metric]
                assert cell == f"{factor * value:.1f}"


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
    logits = case_logits(
        load_model(model_file(out, "best", method, 0)), data.datasets["test"][0], small()
    )
    masks = mean_of(logits, [name for name in MODALITIES if name in case.files]) > 0
    whole, core, enhancing = masks
    assert torch.equal(labels == 4, enhancing)
    assert torch.equal((labels == 1) | (labels == 4), core | enhancing)
    assert torch.equal(labels > 0, whole | core | enhancing)


def test_segmentations_are_nifti_on_the_grid_of_the_case(
    finished: Path, prepared: Prepared
) -> None:
    predicted = finished.parent / "segmentations"
    files = sorted(path.relative_to(predicted) for path in predicted.rglob("*") if path.is_file())
    assert list(map(str, files)) == [f"{m}-seed0/Phantom_005.nii.gz" for m in ("gmd", "sum")]
    for method in ("sum", "gmd"):
        path = predicted / f"{method}-seed0/Phantom_005.nii.gz"
        check_segmentation(path, finished, method, prepared)


def test_the_table_scores_what_is_written(finished: Path, prepared: Prepared) -> None:
    truth: Any = nibabel.load(prepared.split["test"][0].segmentation)
    for run in outcome(finished):
        path = finished.parent / f"segmentations/{run['method']}-seed0/Phantom_005.nii.gz"
        written: Any = nibabel.load(path)
        for region, labels in REGIONS.items():
            mask, target = (np.isin(image.dataobj, labels) for image in (written, truth))
            dice = 2 * (mask & target).sum() / (mask.sum() + target.sum())
            assert_allclose(run["test"]["Phantom_005"]["+".join(MODALITIES)][region]["dice"], dice)


def test_a_finished_run_segments_later(finished: Path, prepared: Prepared, tmp_path: Path) -> None:
    out, masks = tmp_path / "out", tmp_path / "later/masks"
    shutil.copytree(finished, out)
    # The best model may happen to be the last one, too: make sure that it is not.
    path = model_file(out, "best", "gmd", 0)
    content = load_checkpoint(path)
    content["model"]["head.bias"] += 0.2
    save_checkpoint(path, content)
    before = sorted(os.listdir(out))
    assert main(["--resume", str(out), "--predict", str(masks)]) == 0
    same = []
    for method in ("sum", "gmd"):
        name = f"{method}-seed0/Phantom_005.nii.gz"
        check_segmentation(masks / name, out, method, prepared)
        found = (masks / name).read_bytes()
        same.append(found == (finished.parent / "segmentations" / name).read_bytes())
    assert same == [True, False]
    assert sorted(os.listdir(out)) == before


def test_cases_without_segmentations_are_segmented_by_a_model(
    finished: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases, out = tmp_path / "cases", tmp_path / "out"
    shutil.copytree(folder, cases)
    for path in cases.glob("*/*_seg.nii.gz"):
        path.unlink()
    arguments = ["--data", cases, "--predict", out]
    for model in (finished / "results.json", finished / "nowhere.pt"):
        assert str(model) in stopped([*arguments, "--model", model], capsys)
    assert not out.exists()
    model = finished / "best-gmd-seed0.pt"
    assert main(list(map(str, [*arguments, "--model", model]))) == 0
    assert sorted(os.listdir(out)) == [f"Phantom_{number:03d}.nii.gz" for number in range(6)]
    found: Any = nibabel.load(out / "Phantom_005.nii.gz")
    other: Any = nibabel.load(finished.parent / "segmentations/gmd-seed0/Phantom_005.nii.gz")
    np.testing.assert_array_equal(found.dataobj, other.dataobj)
    np.testing.assert_array_equal(found.affine, other.affine)
    assert found.get_data_dtype() == np.uint8


def test_a_finished_run_prints_its_table(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", str(finished)]) == 0
    said = capsys.readouterr().out
    assert f"{finished} is already finished" in said
    assert (finished / "table.md").read_text() in said
    assert "leave out --lr" in stopped(["--resume", finished, "--lr", "1"], capsys)


def test_a_finished_run_does_not_segment_other_data(
    finished: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # With folds, other cases would also mean another split: what was trained on may be tested.
    copy, out = tmp_path / "cases", tmp_path / "out"
    shutil.copytree(folder, copy)
    shutil.copytree(finished, out)
    content = json.loads((out / "results.json").read_text())
    content["config"]["data"] = str(copy)
    (out / "results.json").write_text(json.dumps(content))
    assert main(["--resume", str(out), "--predict", str(tmp_path / "same")]) == 0
    change_a_voxel(copy / "Phantom_005/Phantom_005_t2.nii.gz")
    message = stopped(["--resume", out, "--predict", tmp_path / "masks"], capsys)
    assert "the data has changed since the run began" in message


def change_a_voxel(path: Path) -> None:
    image: Any = nibabel.load(path)
    array = np.asarray(image.dataobj).copy()
    array[10, 10, 8] += 1
    write(path, array, image.affine)


@pytest.mark.usefixtures("no_pictures")
def test_incomplete_cases_from_end_to_end(
    tmp_path: Path, incomplete: Path, split: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--data", incomplete, "--split", split, *RUN]
    message = stopped([*there, "--out", tmp_path / "out"], capsys)
    assert "Phantom_001/Phantom_001_t1ce.nii.gz: missing t1ce file" in message

    arguments = list(map(str, [*there, "--allow-missing"]))
    assert main([*arguments, "--check"]) == 0
    lacking = "4 cases lack a modality (t1 2, t1ce 2, t2 2, flair 2)"
    assert f"20 x 20 x 16; {lacking}" in capsys.readouterr().out
    out, masks = tmp_path / "out", tmp_path / "masks"
    assert main([*arguments, "--out", str(out), "--predict", str(masks)]) == 0
    assert f"{incomplete}: of 6 cases, {lacking}" in capsys.readouterr().err
    data = prepare(incomplete, split, allow_missing=True)
    for run in outcome(out):
        assert set(run["test"]["Phantom_005"]) == {"t1ce", "flair", "t1ce+flair"}
        path = masks / f"{run['method']}-seed0/Phantom_005.nii.gz"
        check_segmentation(path, out, run["method"], data)


def test_incomplete_cases_are_tried_by_a_dry_run_of_full(
    incomplete: Path, split: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(incomplete), "--split", str(split), *TINY, "--batch-size", "1"]
    arguments += ["--allow-missing", "--methods", "full", "--check"]
    assert main(arguments) == 0


@pytest.mark.usefixtures("no_pictures")
def test_one_region_on_cases_of_another_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    arguments = ["--data", tmp_path / "cases", "--regions", "lesion=1", *RUN,
                 "--methods", "sum", "--out", out, "--predict", masks]  # fmt: skip
    assert main(list(map(str, arguments))) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["data"]["regions"] == {"lesion": [1]}
    assert {name: len(cases) for name, cases in found["splits"].items()} == {
        "train": 1, "valid": 1, "test": 1,
    }, "three folds, as there are three patients"  # fmt: skip
    (tested,) = found["splits"]["test"]
    assert set(found["runs"][0]["test"][tested]["t2"]) == {"lesion"}
    assert "lesion sum" in (out / "table.md").read_text()
    image: Any = nibabel.load(masks / f"sum-seed0/{tested}.nii.gz")
    assert_allclose(image.affine, affine, atol=1e-6)
    assert set(np.unique(np.asarray(image.dataobj))) <= {0, 1}


@pytest.mark.usefixtures("no_pictures")
def test_phantoms_say_that_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brats, "PHANTOM_SIZE", SIZE)
    cache, out = tmp_path / "cache", tmp_path / "out"
    arguments = ["--phantoms", "3", "--folds", "3", "--cache-folder", cache, *RUN]
    arguments += ["--methods", "sum", "--combinations", "k=1", "--epochs", "1", "--out", out]
    assert main(list(map(str, arguments))) == 0
    titles = [line for line in (out / "table.md").read_text().splitlines() if line[:1] == "#"]
    assert all("PHANTOM" in title for title in titles) and len(titles) >= 4
    found = json.loads((out / "results.json").read_text())
    assert found["data"]["phantom"] is True
    assert Path(found["data"]["source"]).is_relative_to(cache)


@pytest.mark.usefixtures("no_pictures")
def test_full_alone_has_no_gradient_pictures(tmp_path: Path, folder: Path, split: Path) -> None:
    arguments = ["--data", folder, "--split", split, *TINY, "--methods", "full", "--epochs", "1"]
    assert main(list(map(str, [*arguments, "--cache", "disk", "--cache-folder", tmp_path / "cache",
                               "--out", tmp_path / "out"]))) == 0  # fmt: skip
    assert sorted(os.listdir(tmp_path / "out")) == [
        "best-full-seed0.pt", "cases.png", "dice.png", "last-full-seed0.pt", "results.json",
        "table.md",
    ]  # fmt: skip


# --- sessions ------------------------------------------------------------------------------------


RESUMED = ["--methods", "full,pcgrad", "--combinations", "k=3", "--epochs", "2", *TINY,
           "--regions", "WT=1,2,4"]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, split: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    arguments = ["--data", folder, "--split", split, *RESUMED, "--out", out]
    assert main(list(map(str, arguments))) == 0
    return out


def cut_off(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int, arguments: Sequence[Any]
) -> None:
    """Run the command with Ctrl-C in the place of call number ``calls`` of ``owner.name``."""
    left = [calls]
    original = getattr(owner, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert main(list(map(str, arguments))) == 130


@pytest.mark.usefixtures("no_pictures")
def test_the_same_command_gives_the_same_numbers(
    uninterrupted: Path, folder: Path, split: Path, tmp_path: Path
) -> None:
    arguments = ["--data", folder, "--split", split, *RESUMED, "--out", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").touch()  # of another run
    assert main(list(map(str, arguments))) == 0
    assert_same_run(tmp_path / "out-2", uninterrupted)
    assert os.listdir(tmp_path / "out") == ["results.json"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("owner", "name", "calls", "kept"),
    [
        pytest.param(Training, "step", 1, (0, None), marks=pytest.mark.slow),
        (Training, "step", 3, (0, 1)),
        pytest.param(Training, "step", 6, (1, 1), marks=pytest.mark.slow),
        # Of the last epoch, before or after it is kept.
        pytest.param(Training, "save_models", 1, (0, None), marks=pytest.mark.slow),
        (training_module, "case_scores", 7, (0, 2)),
        (brats, "write_report", 0, (2, None)),
    ],
    ids=["step1", "step3", "step6", "save_models", "case_scores", "write_report"],
)
def test_a_run_cut_off_anywhere_continues_exactly(
    tmp_path: Path,
    folder: Path,
    split: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    uninterrupted: Path,
    owner: Any,
    name: str,
    calls: int,
    kept: tuple[int, int | None],
) -> None:
    out = tmp_path / "out"
    arguments = ["--data", folder, "--split", split, *RESUMED, "--out", out]
    cut_off(monkeypatch, owner, name, calls, arguments)
    assert "results.json" not in os.listdir(out)
    assert f"-m benchmarks.brats --resume {out}" in capsys.readouterr().err
    checkpoint = load_checkpoint(out / "checkpoint.pt")
    finished, epoch = kept
    assert len(checkpoint["done"]) == finished
    if name != "save_models":
        assert (checkpoint["current"] or {}).get("epoch") == epoch
    torch.manual_seed(12345)  # whatever happened in between
    assert main(["--resume", str(out)]) == 0
    assert_same_run(out, uninterrupted)


@pytest.fixture(scope="module")
def cut_once(folder: Path, split: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cut") / "out"
    arguments = ["--data", folder, "--split", split, *RESUMED, "--out", out]
    with pytest.MonkeyPatch.context() as patch:
        cut_off(patch, Training, "step", 3, arguments)
    return out


@pytest.fixture
def cut(cut_once: Path, tmp_path: Path) -> Path:
    """A copy of a run that was cut off in its first training's second epoch."""
    shutil.copytree(cut_once, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.slow
def test_fp16_is_resumed_with_its_scale(
    tmp_path: Path, folder: Path, split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Starts at a scale that overflows, so that the scale changes from step to step.
    class Scaler(torch.amp.GradScaler):
        def __init__(self, device: str, enabled: bool) -> None:
            super().__init__(device, init_scale=2.0**22, enabled=enabled)

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    arguments = ["--data", folder, "--split", split, *TINY, "--methods", "sum", "--combinations",
                 "k=1", "--batch-size", "1", "--amp", "fp16", "--epochs", "3"]  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(list(map(str, [*arguments, "--out", whole]))) == 0
    (run,) = outcome(whole)
    assert 0 < run["skipped_steps"] < 12, "else this shows nothing"
    cut_off(monkeypatch, Training, "step", 6, [*arguments, "--out", out])
    state = load_checkpoint(out / "checkpoint.pt")["current"]
    assert state["scaler"]["scale"] == 2.0 ** (22 - state["skipped"])
    assert main(["--resume", str(out)]) == 0
    assert_same_run(out, whole)


@pytest.mark.usefixtures("no_pictures")
def test_files_that_a_killed_process_was_writing_are_removed(cut: Path) -> None:
    written = ["checkpoint.pt", "best-full-seed0.pt", "last-full-seed0.pt", "results.json",
               "table.md", "dice.png", "cases.png"]  # fmt: skip
    for name in written:
        stem, suffix = name.split(".")
        (cut / f".{stem}-99999.{suffix}").write_bytes(b"half of it")
    assert main(["--resume", str(cut)]) == 0
    assert not [path for path in os.listdir(cut) if path.startswith(".")]


def test_resuming_with_other_data_is_refused(
    tmp_path: Path,
    folder: Path,
    split: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "cases"
    shutil.copytree(folder, copy)
    out = tmp_path / "out"
    arguments = ["--data", copy, "--split", split, *RESUMED, "--out", out]
    cut_off(monkeypatch, Training, "step", 0, arguments)
    change_a_voxel(copy / "Phantom_001/Phantom_001_t1.nii.gz")
    assert "the data has changed since the run began" in stopped(["--resume", out], capsys)
    shutil.rmtree(copy)
    assert "there is no such folder" in stopped(["--resume", out], capsys)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "text", "cut off"])
def test_resuming_from_a_damaged_checkpoint(
    cut: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = cut / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    message = stopped(["--resume", cut], capsys)
    assert message.startswith(f"argument --resume: {path}: not a checkpoint")


def test_ctrl_c_while_the_data_are_read(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = ["--data", folder, *RESUMED, "--out", out]
    cut_off(monkeypatch, nibabel.Nifti1Image, "from_bytes", 3, arguments)
    assert capsys.readouterr().err.endswith("\ninterrupted\n")
    assert not out.exists()


def test_resuming_a_run_of_another_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SentimentTraining, "train_epoch", interrupted)
        sentiment.main(["--out", str(out)])
    capsys.readouterr()
    assert "--resume: " in stopped(["--resume", out], capsys)


def test_resuming_from_a_model_instead_of_a_checkpoint(
    cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(cut / "last-full-seed0.pt", cut / "checkpoint.pt")
    assert "--resume: " in stopped(["--resume", cut], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_resuming_where_the_device_is_not(
    cut: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = load_checkpoint(cut / "checkpoint.pt")
    content["config"]["device"] = "cuda"
    save_checkpoint(cut / "checkpoint.pt", content)
    assert "cuda" in stopped(["--resume", cut], capsys)

    out = tmp_path / "moved"
    shutil.copytree(finished, out)
    results = json.loads((out / "results.json").read_text())
    results["config"]["device"] = "cuda"
    (out / "results.json").write_text(json.dumps(results))
    message = stopped(["--resume", out, "--predict", tmp_path / "masks"], capsys)
    assert "cuda" in message


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("owner", "name"), [(Training, "step"), (brats, "write_segmentation")], ids=["train", "predict"]
)
def test_the_command_that_continues_also_segments(
    tmp_path: Path,
    folder: Path,
    split: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: Any,
    name: str,
) -> None:
    out, masks = tmp_path / "out", tmp_path / "masks"
    arguments = ["--data", folder, "--split", split, *TINY, "--methods", "full", "--epochs", "1",
                 "--out", out, "--predict", masks]  # fmt: skip
    cut_off(monkeypatch, owner, name, 0, arguments)
    resume = shlex.split(capsys.readouterr().err.strip().splitlines()[-1])
    assert main(resume[3:]) == 0
    assert (masks / "full-seed0/Phantom_005.nii.gz").exists()
    assert "checkpoint.pt" not in os.listdir(out)


# -- in processes of their own


def start(arguments: Sequence[Any]) -> subprocess.Popen[str]:
    # A test run in the background has SIGINT ignored, and would pass that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.brats", *map(str, arguments)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for_epochs(process: subprocess.Popen[str], out: Path, epochs: int) -> None:
    """Until the first training has made so many."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = out / "checkpoint.pt"
        if path.exists():
            current = load_checkpoint(path)["current"]
            if current is not None and current["epoch"] >= epochs:
                return
        time.sleep(0.02)
    raise AssertionError("no checkpoint in time")


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


# An epoch is long against the time it takes to see that another one has ended.
LONG = ["--methods", "gmd", "--combinations", "k=5", "--epochs", "8", "--threads", "1", *TINY]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on POSIX")
def test_ctrl_c_prints_the_command_that_continues_exactly(
    tmp_path: Path, folder: Path, split: Path, processes: list[subprocess.Popen[str]]
) -> None:
    arguments = ["--data", folder, "--split", split, *LONG]
    whole, out = tmp_path / "whole", tmp_path / "cut"
    assert main(list(map(str, [*arguments, "--out", whole]))) == 0
    process = start([*arguments, "--out", out])
    processes.append(process)
    wait_for_epochs(process, out, 2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    resume = shlex.split(error.strip().splitlines()[-1])
    assert resume == [sys.executable, "-m", "benchmarks.brats", "--resume", str(out)]
    again = start(resume[3:])
    processes.append(again)
    _, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on POSIX")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_in_the_middle_of_an_epoch_twice_the_weights_are_the_same(
    tmp_path: Path,
    folder: Path,
    split: Path,
    processes: list[subprocess.Popen[str]],
    workers: str,
) -> None:
    arguments = ["--data", folder, "--split", split, *LONG, "--workers", workers]
    whole, out = tmp_path / "whole", tmp_path / "cut"
    assert main(list(map(str, [*arguments, "--out", whole]))) == 0
    next_command = [*arguments, "--out", out]
    for epochs in (2, 5):
        process = start(next_command)
        processes.append(process)
        wait_for_epochs(process, out, epochs)
        time.sleep(0.3)  # into the next one
        assert process.poll() is None
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert epochs <= load_checkpoint(out / "checkpoint.pt")["current"]["epoch"] < 8
        next_command = ["--resume", out]
    last = start(next_command)
    processes.append(last)
    _, error = last.communicate(timeout=200)
    assert last.returncode == 0, error
    assert_same_run(out, whole)


# --- real cases, and a GPU -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real cases are not here ({REAL})")
def test_real_cases_from_end_to_end(tmp_path: Path) -> None:
    out, masks = tmp_path / "out", tmp_path / "masks"
    arguments = ["--data", REAL, "--regions", "lesion=1", "--methods", "sum",
                 "--combinations", "k=2", "--epochs", "2", "--validate-every", "2", "--crop", "64",
                 "--width", "8", "--batch-size", "1", "--out", out, "--predict", masks]  # fmt: skip
    assert main(list(map(str, arguments))) == 0
    found = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    (tested,) = found["splits"]["test"]
    (run,) = found["runs"]
    assert len(run["test"][tested]) == 15
    assert sorted(path.name for path in out.glob("*.png")) == PICTURES
    predicted: Any = nibabel.load(masks / f"sum-seed0/{tested}.nii.gz")
    truth: Any = nibabel.load(REAL / f"{tested}/{tested}_seg.nii.gz")
    assert predicted.shape == truth.shape
    assert_allclose(predicted.affine, truth.affine)
    assert set(np.unique(np.asarray(predicted.dataobj))) <= {0, 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_run_on_cuda(
    tmp_path: Path, folder: Path, split: Path, monkeypatch: pytest.MonkeyPatch, amp: str
) -> None:
    out, masks = tmp_path / "out", tmp_path / "masks"
    arguments = ["--data", folder, "--split", split, *RUN, "--device", "cuda", "--amp", amp,
                 "--out", out, "--predict", masks]  # fmt: skip
    cut_off(monkeypatch, Training, "step", 3, arguments)
    assert main(["--resume", str(out), "--predict", str(masks)]) == 0
    for run in outcome(out):
        assert len(run["test"]["Phantom_005"]) == 15
        assert all(math.isfinite(entry["train_loss"]) for entry in run["history"])
    for path in out.glob("*.pt"):
        weights = weights_of(load_model(path))
        assert all(tensor.device.type == "cpu" for tensor in weights.values())
    assert len(list(masks.rglob("*.nii.gz"))) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
def test_inference_on_cuda_returns_what_the_cpu_returns(model: DynamicSharingUNet3d) -> None:
    sample = sample_of((20, 20, 16), ["t2"])
    exact = case_logits(model, sample, small())
    try:
        found = case_logits(model.to("cuda"), sample, small(device="cuda"))
    finally:
        model.to("cpu")
    assert found.keys() == exact.keys()
    for name in exact:
        assert found[name].device.type == "cpu"
        torch.testing.assert_close(found[name], exact[name], rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
def test_a_dry_run_on_cuda(folder: Path, split: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(folder), "--split", str(split), *TINY, "--device", "cuda", "--check"]
    assert main(arguments) == 0
    assert "s a step" in capsys.readouterr().out
