"""The U-Net in training: its loss, its presets, a step, incomplete cases, the best epoch."""

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from benchmarks.brats.cases import MODALITIES, REGIONS
from benchmarks.brats.inference import case_logits, load_about, load_model, mean_of, model_file
from benchmarks.brats.presets import PRESETS, Config, paper, quick, released
from benchmarks.brats.training import Training, loss_of, loss_sums
from benchmarks.brats.volumes import Prepared, training_batches
from benchmarks.runs.checkpoint import load_checkpoint, save_checkpoint
from benchmarks.runs.session import Diverged
from gradsplit import modality_combinations
from reference_models.unet3d import DynamicSharingUNet3d
from tests.benchmarks.brats.tiny import prepare, small, weights_of
from tests.benchmarks.running import Silent
from tests.reference import Row, decouple, decouple_window, gmd_loop

COMBINATIONS = modality_combinations(MODALITIES)
SINGLES = COMBINATIONS[-4:]

Sample = dict[str, Any]


def batches_of(prepared: Prepared, size: int = 2) -> list[Sample]:
    found = training_batches(prepared.datasets["train"], crop=16, batch_size=size, seed=0, epoch=0)
    return list(found)


def assert_same_weights(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]


# --- the loss ------------------------------------------------------------------------------------


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
    assert_allclose(float(segmentation_loss("dice", logits, truth)), (4 / 7 + 0) / 2, rtol=1e-6)
    # Four of sixteen voxels are wrong: two of truth missed and one too many, and one.
    both = segmentation_loss("dice+bce", logits, truth)
    assert_allclose(float(both), 2 / 7 + 100 * 4 / 16, rtol=1e-6)


@pytest.mark.parametrize("kind", ["dice", "dice+bce"])
def test_the_loss_is_the_formula(kind: str) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(3, 2, 4, 5, 6)
    label = (torch.rand(3, 2, 4, 5, 6) < 0.3).to(torch.uint8)
    x, t, axes = logits.double().numpy(), label.double().numpy(), (0, 2, 3, 4)
    p = 1 / (1 + np.exp(-x))
    dice = (2 * (p * t).sum(axes) + 1) / (p.sum(axes) + t.sum(axes) + 1)
    expected = (1 - dice).mean()
    if kind == "dice+bce":
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
    exact = segmentation_loss(kind, logits.detach().float(), label)
    assert_allclose(float(found.detach()), float(exact))
    found.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


# --- presets -------------------------------------------------------------------------------------

MADE = {"quick": quick, "paper": paper, "released": released}


def test_the_presets_are_the_papers_method_and_what_the_released_code_runs() -> None:
    config = PRESETS["paper"]
    assert config.methods == ("sum", "gmd")
    assert (config.combinations, config.scope, config.reduction) == ("k=5", "shared", "sum")
    config = PRESETS["released"]
    assert "pcgrad" in config.methods
    assert (config.combinations, config.scope, config.reduction) == ("all", "all", "released")
    assert (config.optimizer, config.lr, config.weight_decay) == ("adam", 8e-4, 1e-5)
    assert (config.epochs, config.batch_size, config.accumulate) == (600, 4, 1)
    assert (config.normalisation, config.split, config.loss) == ("minmax", "acn", "dice")
    assert config.crop == 128


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


@pytest.mark.parametrize("preset", MADE)
def test_a_presets_docstring_says_what_it_sets(preset: str) -> None:
    config, said = MADE[preset](), documented(MADE[preset])
    assert config == PRESETS[preset]
    loss = {"dice": "soft Dice, smooth 1", "dice+bce": "soft Dice + BCE"}[config.loss]
    expected = {
        "rule": rf"{config.methods[1]} \(and {config.methods[0]}\)",
        "combinations": {"all": "all 15", "k=5": "k = 5 sampled"}[config.combinations],
        "scope": config.scope,
        "reduction": config.reduction,
        "loss": re.escape(loss),
        "schedule": "poly 0.9",
        "batch, crop": rf"{config.batch_size} crops of {config.crop}\^3",
        "width": str(config.width),
        "epochs": rf"{config.epochs}\b.*",
        "normalisation": {"zscore": "z-score, 1-99 %", "minmax": "min-max"}[config.normalisation],
        "split": {"acn": "ACN fold 0, 228/57", "folds": f"fold {config.fold} of 5"}[config.split],
        "seeds": str(config.seeds),
    }
    # Everything else has one meaning in every preset, and no table needs a row for it.
    unmentioned = {"rule", "seeds"} if preset == "quick" else set()
    assert set(said) == set(expected) - unmentioned | {"optimizer"}
    for name in set(expected) & set(said):
        assert re.fullmatch(expected[name], said[name]), name
    match = re.fullmatch(r"(\w+), lr (\S+), weight decay (\S+)", said["optimizer"])
    assert match is not None
    assert match[1] == {"adam": "Adam", "adamw": "AdamW"}[config.optimizer]
    assert (float(match[2]), float(match[3])) == (config.lr, config.weight_decay)


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_a_preset_reaches_the_optimizer(prepared: Prepared, config: Config) -> None:
    method = config.methods[-1]
    training = Training(config, prepared, method, 0)
    base = training.optimizer.base
    assert type(base) is {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    (group,) = base.param_groups
    assert (group["lr"], group["weight_decay"]) == (config.lr, config.weight_decay)
    assert {id(p) for p in group["params"]} == {id(p) for p in training.model.parameters()}
    assert training.model.config.width == config.width
    said = repr(training.optimizer)
    assert f"rule={method!r}, scope={config.scope!r}, reduction={config.reduction!r}" in said
    assert len(training.sampler()) == {"all": 15, "k=5": 5}[config.combinations]


# --- a step --------------------------------------------------------------------------------------


def test_the_crops_do_not_depend_on_the_number_of_workers(prepared: Prepared) -> None:
    found = []
    for workers in (0, 2):
        training = Training(small(workers=workers), prepared, "sum", 0)
        training.train_epoch(Silent())
        found.append(weights_of(training.model))
    assert_same_weights(*found)


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


@pytest.mark.parametrize(("method", "missing"), [("sum", []), ("sum", [0]), ("gmd", [0])])
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
    losses = [training.losses(batch, SINGLES) for batch in window]
    merge: Any = gmd_loop if method == "gmd" else lambda jacobian: jacobian.sum(0)
    mean_loss = training.step(window)
    assert_gradients(training, decouple_window(micro, merge, "shared", "sum"))
    means = [
        np.mean([float(loss.detach()) for some in losses if (loss := some[single]) is not None])
        for single in SINGLES
    ]
    assert_allclose(mean_loss, np.mean(means), rtol=1e-5)


def test_the_learning_rate_anneals_over_all_steps(prepared: Prepared) -> None:
    """Of which accumulation makes fewer, and keeps the remainder."""
    config = small(batch_size=1, accumulate=3, epochs=3, lr=3e-4, optimizer="adam")
    rates: list[float] = []

    def begin() -> Training:
        training = Training(config, prepared, "sum", 0)
        base = training.optimizer.base
        base.register_step_pre_hook(lambda *_: rates.append(base.param_groups[0]["lr"]))
        return training

    training = begin()
    assert training.steps_per_epoch == 2  # three micro-batches, and one
    for epoch in range(3):
        training.train_epoch(Silent())
        if epoch == 1:  # cut off here
            state = training.state_dict()
            training = begin()
            training.load_state_dict(state)
    assert len(training.merges.weights) == 6
    rates.append(training.optimizer.param_groups[0]["lr"])
    assert_allclose(rates, 3e-4 * (1 - np.arange(7) / 6) ** 0.9, rtol=1e-6, atol=1e-12)


# --- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_step_in_half_precision(prepared: Prepared, amp: str) -> None:
    window = batches_of(prepared, size=1)[:1]
    exact = Training(small(), prepared, "gmd", 0)
    training = Training(small(amp=amp), prepared, "gmd", 0)
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 256.0}
                                    if amp == "fp16" else {})  # fmt: skip
    assert_allclose(training.step(window), exact.step(window), rtol=0.02)
    assert training.skipped == 0
    after = weights_of(training.model).values()
    assert all(one.dtype == torch.float32 and one.isfinite().all() for one in after)
    # The same direction; where each kind of rounding falls is another matter.
    found, expected = (
        torch.cat([p.grad.flatten() for p in one.model.parameters() if p.grad is not None])
        for one in (training, exact)
    )
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.95
    assert_allclose(float(found.norm()), float(expected.norm()), rtol=0.1)
    norms = [one.merges.state_dict()["gramians"].diagonal(0, 1, 2) for one in (training, exact)]
    assert_allclose(*norms, rtol=0.2)


def test_gradients_in_bf16_on_a_cpu_do_not_depend_on_what_the_memory_held(
    prepared: Prepared,
) -> None:
    # With oneDNN on CPUs that know bf16, torch 2.13's gradient of a conv3d's weight does, where the
    # volume is 2 voxels deep: with a crop of up to 32 one of the network's levels is.
    training = Training(small(amp="bf16", lr=1e-12), prepared, "full", 0)
    batch = batches_of(prepared, size=1)[0]
    for _ in range(3):
        junk = [torch.full((2**power,), 1e30) for power in range(8, 22)]
        del junk
        training.step([batch])
    squares = training.merges.state_dict()["gramians"].flatten()
    assert_allclose(squares, squares[:1].expand(3), rtol=1e-3)


def overflowing(training: Training, scale: float = 2.0**60) -> None:
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": scale})


def test_a_step_that_overflows_is_skipped_and_counted(prepared: Prepared) -> None:
    config = small(amp="fp16", epochs=2)
    training = Training(config, prepared, "gmd", 0)
    overflowing(training)
    before = weights_of(training.model)
    loss = training.step(batches_of(prepared, size=1)[:1])
    assert loss is not None and 0 < loss < 3, "the loss itself is a number"
    assert_same_weights(before, weights_of(training.model))
    assert training.skipped == 1
    assert training.scaler.get_scale() == 2.0**59
    overflowing(training, 64.0)
    training.step(batches_of(prepared, size=1)[1:2])
    assert training.skipped == 1
    assert len(training.merges.weights) == 1, "angles of a skipped step mean nothing"
    continued = Training(config, prepared, "gmd", 0)
    continued.load_state_dict(training.state_dict())
    assert continued.scaler.state_dict() == training.scaler.state_dict()
    assert (continued.scaler.get_scale(), continued.skipped) == (64.0, 1)


@pytest.mark.parametrize("passed_over", [True, False])
def test_a_schedule_waits_for_the_first_step(
    prepared: Prepared, passed_over: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """And makes up for it: torch warns of none that runs ahead, and the end is where it was."""
    amp = "off" if passed_over else "fp16"
    training = Training(small(amp=amp, epochs=4, lr=1e-3), prepared, "gmd", 0)
    rates = []
    for number, batch in enumerate(batches_of(prepared, size=1)):
        overflowing(training, 64.0 if number > 1 else 2.0**60)
        training.step([] if number < 2 and passed_over else [batch])
        rates.append(training.schedule.get_last_lr()[0])
    expected = [1e-3 * (1 - number / 8) ** 0.9 for number in (0, 0, 3, 4)]
    assert_allclose(rates, expected, rtol=1e-6)
    assert not [str(one.message) for one in recwarn if "lr_scheduler" in str(one.message)]


def test_a_training_of_skipped_steps_alone_is_finished(prepared: Prepared) -> None:
    training = Training(small(amp="fp16", batch_size=4), prepared, "gmd", 0)
    overflowing(training)
    training.train_epoch(Silent())
    assert training.finish(lambda: None)["result"]["skipped_steps"] == 1


def test_recomputed_activations_take_the_same_step(prepared: Prepared) -> None:
    window = batches_of(prepared)[:1]
    plain, recomputed = (
        Training(small(checkpointing=on), prepared, "sum", 0) for on in (False, True)
    )
    assert recomputed.model.config.activation_checkpointing
    assert_allclose(recomputed.step(window), plain.step(window), rtol=1e-6)
    assert_gradients(recomputed, [parameter.grad for parameter in plain.model.parameters()])


def test_a_loss_that_is_no_number_ends_the_training(prepared: Prepared) -> None:
    training = Training(small(lr=1e30), prepared, "sum", 0)
    with pytest.raises(Diverged, match="the loss is not a finite number"):
        training.train_epoch(Silent())


# --- incomplete cases ----------------------------------------------------------------------------


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
    weights = []
    for content in (0.0, math.nan):
        (batch,) = batches_of(lacking, size=4)
        assert not batch["available"].all()
        batch["volume"][~batch["available"]] = content
        training = Training(small(batch_size=4, combinations="singles"), lacking, "gmd", 0)
        training.step([batch])
        weights.append(weights_of(training.model))
    assert_same_weights(*weights)


def test_records_of_steps_with_missing_rows_are_padded_and_a_case_is_scored_for_what_it_has(
    lacking: Prepared,
) -> None:
    training = Training(small(combinations="singles", batch_size=1), lacking, "gmd", 0)
    training.train_epoch(Silent())
    found = training.finish(lambda: None)
    assert set(found["result"]["test"]["Phantom_005"]) == {"t1ce", "flair", "t1ce+flair"}
    records = found["records"]
    assert records["gramians"].shape == (4, 4, 4)
    there = records["trained"] >= 0
    assert sorted(there.sum(1).tolist()) == [1, 2, 3, 4]
    assert torch.equal(records["weights"].isnan(), ~there)
    pairs = there[:, :, None] & there[:, None, :]
    assert torch.equal(records["gramians"].isnan(), ~pairs)


@pytest.mark.parametrize(("method", "accumulate"), [("full", 1), ("gmd", 3)])
def test_batches_without_any_of_the_combinations_are_passed_over(
    lacking: Prepared, method: str, accumulate: int
) -> None:
    # `full` needs all four modalities, which one of four cases has.
    config = small(batch_size=1, epochs=2, accumulate=accumulate)
    training = Training(config, lacking, method, 0)
    for _ in range(2):
        training.train_epoch(Silent())
    steps = len(training.merges.weights)
    assert steps == 2 if method == "full" else 1 <= steps <= 4
    assert all(math.isfinite(entry["train_loss"] or 0.0) for entry in training.history)
    assert all(tensor.isfinite().all() for tensor in weights_of(training.model).values())


# --- the best epoch ------------------------------------------------------------------------------


def dice_of(training: Training, split: str) -> dict[str, dict[str, float]]:
    """Hard Dice of the split's only case, by combination and region."""
    sample = training.prepared.datasets[split][0]
    logits = case_logits(training.model, sample, training.config)
    truth = sample["label"] > 0
    found: dict[str, dict[str, float]] = {}
    for combination in COMBINATIONS:
        mask = mean_of(logits, combination).sigmoid() > 0.5
        for outer, inner in ((1, 2), (0, 1)):  # TC holds ET, WT holds TC
            mask[outer] |= mask[inner]
        both = (mask & truth).sum((1, 2, 3)).tolist()
        total = (mask.sum((1, 2, 3)) + truth.sum((1, 2, 3))).tolist()
        found["+".join(combination)] = {
            region: 2 * b / t if t else 1.0
            for region, b, t in zip(REGIONS, both, total, strict=True)
        }
    return found


def test_the_epoch_with_the_best_validation_is_tested(prepared: Prepared, tmp_path: Path) -> None:
    config = small(epochs=5, lr=0.05, validate_every=2)
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
        path = model_file(tmp_path, kind, "sum", 2)
        loaded, about = load_model(path), load_about(path)
        assert_same_weights(weights_of(loaded), weights[epoch - 1])
        assert not loaded.training
        assert (about["method"], about["seed"], about["epoch"]) == ("sum", 2, epoch)
        assert about["config"] == json.loads(json.dumps(dataclasses.asdict(config)))

    training.model.load_state_dict(weights[best - 1])
    for combination, regions in dice_of(training, "test").items():
        for region, dice in regions.items():
            scored = found["test"]["Phantom_005"][combination][region]["dice"]
            assert_allclose(scored, dice, rtol=1e-6)
    valid = [dice for regions in dice_of(training, "valid").values() for dice in regions.values()]
    assert len(valid) == 15 * 3
    assert_allclose(found["valid_dice"], np.mean(valid), rtol=1e-6)


def test_without_validation_the_last_epoch_is_tested_and_a_test_cut_off_continues(
    phantoms: Path, tmp_path: Path
) -> None:
    path = tmp_path / "split.json"
    tested = ["Phantom_003", "Phantom_004", "Phantom_005"]
    path.write_text(json.dumps({"train": ["Phantom_000"], "test": tested}))
    data = prepare(phantoms, path)
    training = Training(small(epochs=2), data, "sum", 0)
    training.train_epoch(Silent())
    training.train_epoch(Silent())
    last = weights_of(training.model)
    states: list[dict[str, Any]] = []

    def save() -> None:
        save_checkpoint(tmp_path / "state.pt", training.state_dict())
        states.append(load_checkpoint(tmp_path / "state.pt"))

    whole = training.finish(save)
    assert (whole["result"]["best_epoch"], whole["result"]["valid_dice"]) == (2, None)
    assert_same_weights(last, training.best_model)
    assert [list(state["tested"]) for state in states] == [tested[:1], tested[:2], tested]
    for left, state in ((2, states[0]), (1, states[1])):
        continued = Training(small(epochs=2), data, "sum", 0)
        continued.load_state_dict(state)
        states.clear()
        found = continued.finish(save)
        assert len(states) == left
        assert found["result"]["test"] == whole["result"]["test"]
        assert found["slices"]["case"] == whole["slices"]["case"]
        assert torch.equal(found["slices"]["volumes"], whole["slices"]["volumes"])
        for name, mask in whole["slices"]["predictions"].items():
            assert torch.equal(found["slices"]["predictions"][name], mask)
