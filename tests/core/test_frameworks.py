"""``opt.joint(losses)``: one scalar that a framework may scale, divide and call backward on.

Every framework trains the same small model, as its users would; the weights must be those of a
plain torch loop written by hand: exactly in mixed precision, to 1e-12 in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from gradsplit import ModalityDecoupledOptimizer
from tests.reference import Row, Snapshot, TwoTowers, decouple, grads, same

# What frameworks warn about is theirs, but nobody who uses joint is told to use it.
pytestmark = pytest.mark.filterwarnings("ignore", "error:.*joint")

SEEDS, UNSEEN = range(8), 20
Losses = dict[str, Tensor | None]


@pytest.fixture(autouse=True)
def traceless() -> Iterator[None]:
    """Accelerate and the Trainer keep their precision and window in globals and the environment."""
    with mock.patch.dict(os.environ):
        yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


class Model(TwoTowers):
    """The losses of one micro-batch, named by its seed; every fourth lacks modality b."""

    def forward(self, seed: int | Tensor, **_: Any) -> Losses:
        losses = {name: loss.to(self.a.weight) for name, loss in self.losses(int(seed)).items()}
        return losses | {"b": None, "a+b": None} if int(seed) % 4 == 1 else losses


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def close(model: nn.Module, expected: list[Tensor], atol: float) -> None:
    torch.testing.assert_close(values(model), expected, rtol=0, atol=atol)


def joint(opt: Any, losses: Losses) -> Tensor:
    return opt.joint(losses)


def mean(opt: Any, losses: Losses) -> Tensor:
    return torch.stack([loss for loss in losses.values() if loss is not None]).mean()


@dataclasses.dataclass
class Run:
    """One training: what is asked of the framework, and what it is given."""

    window: int = 1
    clip: float | None = None
    scheduled: bool = False
    dtype: torch.dtype | None = None  # of autocast; None: float64 throughout
    loss: Callable[[Any, Losses], Tensor] = joint
    rule: str = "gmd"
    folder: Path = Path()
    evaluated: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = Model().to(torch.float32 if self.dtype else torch.float64)
        self.base = SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.opt = ModalityDecoupledOptimizer(self.base, rule=self.rule)
        # In half precision the first step overflows and is skipped.
        half = self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=half)

    def scheduler(self, opt: Optimizer) -> StepLR:
        return StepLR(opt, step_size=2, gamma=0.5 if self.scheduled else 1.0)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None)


def by_hand(run: Run, merge: Callable[[list[Row]], Row] = decouple) -> list[Tensor]:
    """In float64 plain torch and the oracle; mixed, ``opt.backward``, whose rounding is joint's."""
    twin = dataclasses.replace(run)
    parameters = list(twin.model.parameters())
    opt = twin.opt if run.dtype else twin.base
    scheduler = twin.scheduler(opt)
    for step, seed in enumerate(SEEDS, start=1):
        with twin.autocast():
            losses = twin.model(seed)
        parts = {name: x / run.window for name, x in losses.items() if x is not None}
        if run.dtype:
            twin.opt.backward({name: twin.scaler.scale(part) for name, part in parts.items()})
        else:
            options = {"retain_graph": True, "allow_unused": True}
            rows = [list(torch.autograd.grad(x, parameters, **options)) for x in parts.values()]
            for p, g in zip(parameters, merge(rows), strict=True):
                if g is not None:
                    p.grad = g if p.grad is None else p.grad + g
        if step % run.window == 0:
            if run.clip:
                twin.scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(parameters, run.clip)
            twin.scaler.step(opt)
            twin.scaler.update()
            scheduler.step()
            opt.zero_grad()
    return values(twin.model)


def averaged(rows: list[Row]) -> Row:
    """What plain backward of the mean loss would add to ``.grad``."""
    return decouple(rows, merge=lambda jacobian: jacobian.sum(0))


# --- the frameworks, as their users write them ----------------------------------------------------


def lightning(run: Run, epochs: int = 1, checkpoint: Path | None = None) -> Any:
    pl = pytest.importorskip("lightning.pytorch", reason="needs lightning")
    from lightning.pytorch.plugins.precision import MixedPrecision

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = run.model

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            opt = self.optimizers(use_pl_optimizer=False)
            assert opt is run.opt
            # The proxy serves as well.
            return run.loss(opt if batch_idx % 2 else self.optimizers(), self.inner(batch))

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            run.evaluated.append(float(run.loss(run.opt, self.inner(batch))))

        def configure_optimizers(self) -> Any:
            return [run.opt], [{"scheduler": run.scheduler(run.opt), "interval": "step"}]

    options: dict[str, Any] = {"precision": "bf16-mixed" if run.dtype else "32-true"}
    if run.dtype is torch.float16:
        options = {"plugins": MixedPrecision("16-mixed", "cpu", run.scaler)}
    trainer = pl.Trainer(
        **options,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=run.clip,
        accumulate_grad_batches=run.window,
        default_root_dir=run.folder,
    )
    trainer.fit(Module(), DataLoader(SEEDS), DataLoader([UNSEEN]), ckpt_path=checkpoint)
    return trainer


def fabric(run: Run) -> None:
    package = pytest.importorskip("lightning.fabric", reason="needs lightning")
    from lightning.fabric.plugins.precision import MixedPrecision

    options: dict[str, Any] = {"precision": "bf16-mixed" if run.dtype else "32-true"}
    if run.dtype is torch.float16:
        options = {"plugins": MixedPrecision("16-mixed", "cpu", run.scaler)}
    fab = package.Fabric(accelerator="cpu", **options)
    scheduler = run.scheduler(run.opt)
    model, opt = fab.setup(run.model, run.opt)
    assert opt.optimizer is run.opt
    for step, seed in enumerate(SEEDS, start=1):
        fab.backward(run.loss(opt if step % 2 else opt.optimizer, model(seed)) / run.window)
        if step % run.window == 0:
            if run.clip:
                fab.clip_gradients(model, opt, max_norm=run.clip, error_if_nonfinite=False)
            opt.step()
            scheduler.step()
            opt.zero_grad()


def accelerate(run: Run) -> None:
    package = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerator = package.Accelerator(
        cpu=True,
        gradient_accumulation_steps=run.window,
        mixed_precision="bf16" if run.dtype else "no",  # its fp16 is silently off on a CPU
    )
    model, opt, loader, scheduler = accelerator.prepare(
        run.model, run.opt, DataLoader(SEEDS), run.scheduler(run.opt)
    )
    assert opt.optimizer is run.opt
    for seed in loader:
        with accelerator.accumulate(model):
            accelerator.backward(run.loss(opt.optimizer, model(seed)))
            if run.clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), run.clip)
            opt.step()
            scheduler.step()
            opt.zero_grad()


def hugging_face(run: Run, own: bool = True, resume: str | None = None, **arguments: Any) -> Any:
    """``own``: the optimizer is handed over; otherwise the Trainer makes the base."""
    package = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

    class Trainer(package.Trainer):
        loss_is_scaled_for_ga = False  # else windows are summed where forward takes **kwargs

        def create_optimizer(self, model: Any = None) -> Optimizer:
            if self.optimizer is None:
                run.opt = ModalityDecoupledOptimizer(super().create_optimizer(model))
                self.optimizer = run.opt
            return self.optimizer

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
        ) -> Any:
            loss = run.loss(self.optimizer.optimizer, model(**inputs))
            return (loss, {"loss": loss}) if return_outputs else loss

    trainer = Trainer(
        model=run.model,
        args=package.TrainingArguments(
            output_dir=run.folder,
            use_cpu=True,
            bf16=run.dtype is not None,
            num_train_epochs=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=run.window,
            max_grad_norm=run.clip or 0.0,
            train_sampling_strategy="sequential",
            label_names=["labels"],  # without labels evaluate() computes no loss
            disable_tqdm=True,
            report_to="none",
            **{"save_strategy": "no"} | arguments,
        ),
        train_dataset=[{"seed": seed, "labels": seed} for seed in SEEDS],
        eval_dataset=[{"seed": UNSEEN, "labels": UNSEEN}],
        optimizers=(run.opt if own else None, run.scheduler(run.opt) if own else None),
        optimizer_cls_and_kwargs=None if own else (SGD, {"lr": 0.05, "momentum": 0.9}),
    )
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.optimizer.optimizer is run.opt
    run.evaluated.append(trainer.evaluate()["eval_loss"])
    return trainer


def ignite(run: Run) -> None:
    engine = pytest.importorskip("ignite.engine", reason="needs pytorch-ignite")
    from ignite.metrics import Loss

    def loss(predicted: Losses, target: Tensor) -> Tensor:
        return run.loss(run.opt, predicted)

    trainer = engine.create_supervised_trainer(
        run.model, run.opt, loss, gradient_accumulation_steps=run.window
    )
    seeds = torch.tensor(SEEDS)
    trainer.run(DataLoader(TensorDataset(seeds, seeds)), max_epochs=1)
    judge = engine.create_supervised_evaluator(run.model, metrics={"loss": Loss(loss)})
    unseen = torch.tensor([UNSEEN])
    run.evaluated.append(judge.run([(unseen, unseen)]).metrics["loss"])


def monai(run: Run) -> None:
    engines = pytest.importorskip("monai.engines", reason="needs monai")
    pytest.importorskip("ignite", reason="MONAI's trainers need pytorch-ignite")
    trainer = engines.SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader([{"image": seed, "label": seed} for seed in SEEDS]),
        network=run.model,
        optimizer=run.opt,
        loss_function=lambda predicted, target: run.loss(run.opt, predicted),
        decollate=False,
        optim_set_to_none=True,  # else momentum moves what no loss of the batch has reached
        **{"accumulation_steps": run.window} if run.window > 1 else {},
    )
    trainer.logger.setLevel(logging.ERROR)
    trainer.run()


def skorch(run: Run) -> None:
    package = pytest.importorskip("skorch", reason="needs skorch")
    from skorch.callbacks import GradientNormClipping
    from skorch.helper import predefined_split

    class Net(package.NeuralNet):
        def get_loss(self, y_pred: Losses, y_true: Any, *args: Any, **kwargs: Any) -> Tensor:
            return run.loss(self.optimizer_, y_pred)

    def optimizer(groups: Sequence[Any], lr: float) -> Optimizer:
        run.opt = ModalityDecoupledOptimizer(SGD(groups, lr=lr, momentum=0.9))
        return run.opt

    net = Net(
        run.model,
        nn.MSELoss,
        optimizer=optimizer,
        lr=0.05,
        max_epochs=1,
        batch_size=1,
        train_split=predefined_split(package.dataset.Dataset(torch.tensor([UNSEEN]))),
        callbacks=[GradientNormClipping(run.clip)] if run.clip else [],
        verbose=0,
    )
    net.fit(torch.tensor(SEEDS), None)
    run.model = net.module_
    run.evaluated.append(net.history[-1, "valid_loss"])


def grad_scaler(run: Run) -> None:
    """The training scripts of torch's AMP tutorial and of timm (``NativeScaler``)."""
    scheduler = run.scheduler(run.opt)
    for step, seed in enumerate(SEEDS, start=1):
        with run.autocast():
            loss = run.loss(run.opt, run.model(seed)) / run.window
        run.scaler.scale(loss).backward(create_graph=False)
        if step % run.window == 0:
            if run.clip:
                run.scaler.unscale_(run.opt)
                nn.utils.clip_grad_norm_(run.model.parameters(), run.clip)
            run.scaler.step(run.opt)
            run.scaler.update()
            scheduler.step()
            run.opt.zero_grad()


# --- they train as the loop by hand does ----------------------------------------------------------

PLAIN, CLIP, WINDOW, STEPLR = {}, {"clip": 0.1}, {"window": 2}, {"scheduled": True}
ALL = CLIP | WINDOW | STEPLR
BF16, FP16 = {"dtype": torch.bfloat16}, {"dtype": torch.float16}
MIXED = [BF16, BF16 | ALL, FP16, FP16 | ALL]
the_trainers_optimizer = functools.partial(hugging_face, own=False, lr_scheduler_type="constant")


def name(value: Any) -> str:
    if isinstance(value, dict):
        return "+".join(str(value[k])[6:] if k == "dtype" else k for k in value) or "plain"
    return getattr(value, "__name__", "the_trainers_optimizer")


@pytest.mark.parametrize(
    ("framework", "asked"),
    [
        (framework, asked)
        for framework, all_asked in {
            lightning: [PLAIN, CLIP, WINDOW, STEPLR, ALL, *MIXED],
            fabric: [PLAIN, ALL, *MIXED],
            accelerate: [PLAIN, WINDOW, ALL, BF16, BF16 | ALL],
            hugging_face: [PLAIN, WINDOW, ALL, BF16, BF16 | ALL],
            the_trainers_optimizer: [CLIP | WINDOW],
            ignite: [PLAIN, WINDOW],
            monai: [PLAIN, WINDOW],
            skorch: [PLAIN, CLIP],
            grad_scaler: [PLAIN, ALL, *MIXED],
        }.items()
        for asked in all_asked
    ],
    ids=name,
)
def test_it_trains_as_by_hand(framework: Any, asked: dict[str, Any], tmp_path: Path) -> None:
    run = Run(**asked, folder=tmp_path)
    framework(run)
    close(run.model, by_hand(run), 0 if run.dtype else 1e-12)
    assert run.opt.last.names == ("a", "b", "a+b")
    if run.scaler.is_enabled():
        assert run.scaler.get_scale() < 2.0**16, "no step was skipped"
    if run.evaluated:
        with torch.no_grad(), run.autocast():
            expected = float(mean(None, run.model(UNSEEN)))
        assert run.evaluated[-1] == pytest.approx(expected, rel=1e-6)


def test_the_cases_differ() -> None:
    """Nothing above could pass by ignoring what was asked, or by not decoupling."""
    ends = [by_hand(Run(**asked)) for asked in (PLAIN, CLIP, WINDOW, STEPLR, ALL)]
    ends.append(by_hand(Run(), averaged))
    flat = torch.stack([torch.cat([v.flatten() for v in end]) for end in ends])
    assert (torch.cdist(flat, flat) + torch.eye(len(ends))).min() > 1e-3


def test_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, half, resumed = (Run(rule="pcgrad", scheduled=True, folder=tmp_path) for _ in range(3))
    lightning(whole, epochs=2)
    lightning(half, epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    lightning(resumed, epochs=2, checkpoint=tmp_path / "half.ckpt")
    assert same(values(resumed.model), values(whole.model))
    assert not same(values(half.model), values(whole.model))


def test_hugging_face_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed = (Run(2, rule="pcgrad", scheduled=True, folder=tmp_path) for _ in range(2))
    hugging_face(whole, save_strategy="steps", save_steps=1)
    hugging_face(resumed, resume=str(tmp_path / "checkpoint-2"))
    assert same(values(resumed.model), values(whole.model))


@pytest.mark.parametrize(
    "framework",
    [lightning, fabric, accelerate, hugging_face, ignite, monai, skorch, grad_scaler],
    ids=name,
)
def test_who_forgets_joint_is_told_once(framework: Any, tmp_path: Path) -> None:
    """The likeliest mistake: the framework is given the mean of the losses."""
    run = Run(loss=mean, folder=tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        framework(run)
    (message,) = (str(w.message) for w in caught if "joint" in str(w.message))
    assert "backward" in message
    assert run.opt.last is None
    close(run.model, by_hand(run, averaged), 1e-12)


# --- joint alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["words", "tuples", "sequence", "vectors"])
@pytest.mark.parametrize("factor", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_its_backward_is_backward(form: str, factor: float, reduction: str) -> None:
    """Bit for bit, the report included; the value is the mean, or the sum."""

    def formed(losses: dict[str, Any]) -> Any:
        losses = losses | {"c": None}
        if form == "sequence":
            return list(losses.values())
        if form == "vectors":
            return {key: loss and loss.view(1) for key, loss in losses.items()}
        return losses if form == "words" else {tuple(k.split("+")): losses[k] for k in losses}

    results = []
    for way in ("joint", "backward"):
        run = Run()
        opt = ModalityDecoupledOptimizer(run.base, reduction=reduction)
        losses = run.model(0)
        if way == "joint":
            one = opt.joint(formed(losses))
            total = float(sum(losses.values()))
            assert one.shape == () and one.requires_grad
            assert float(one) == pytest.approx(
                total if reduction == "sum" else total / 3, rel=1e-15
            )
            (one * factor).backward()
        else:
            opt.backward(formed({key: loss * factor for key, loss in losses.items()}))
        report = opt.last
        assert report.names == (("0", "1", "2") if form == "sequence" else ("a", "b", "a+b"))
        results.append([grads(run.model), report.gramian, report.weights, report.losses])
    assert same(*results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_grad_mode_it_is_the_plain_value(mode: Any, reduction: str) -> None:
    run = Run()
    opt = ModalityDecoupledOptimizer(run.base, reduction=reduction)
    with mode():
        losses = run.model(0)
        value = opt.joint(losses | {"c": None})
    assert not value.requires_grad and opt.last is None
    total = float(sum(losses.values()))
    assert float(value) == pytest.approx(total if reduction == "sum" else total / 3, rel=1e-15)


@pytest.mark.parametrize("graph", [True, False])
def test_what_it_refuses(graph: bool) -> None:
    run = Run()
    snapshot = Snapshot(run.opt)
    with torch.set_grad_enabled(graph):
        with pytest.raises(TypeError, match="backward"):
            run.opt.joint({"a": run.model(0)["a"], "b": lambda: run.model(0)["b"]})
        for nothing in ({"a": None, "b": None}, [None]):
            with pytest.raises(ValueError, match="None|unavailable"):
                run.opt.joint(nothing)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("retain", [False, True])
def test_a_second_backward_is_refused(retain: bool) -> None:
    run = Run()
    one = run.opt.joint(run.model(0))
    one.backward(retain_graph=retain)
    snapshot = Snapshot(run.opt)
    with pytest.raises(RuntimeError, match="joint"):
        one.backward()
    snapshot.assert_unchanged()


def test_a_torch_closure_may_merge_what_was_accumulated() -> None:
    """Pending rows are refused only where they are still pending after the closure."""
    ours, theirs = Run(), Run()
    for run in (ours, theirs):
        run.opt.accumulate(run.model(0))

    def closure() -> Tensor:
        loss = ours.opt.joint(ours.model(2))
        loss.backward()
        return loss

    theirs.opt.backward(theirs.model(2))
    assert float(ours.opt.step(closure)) == pytest.approx(float(mean(None, theirs.model(2))))
    theirs.opt.step()
    assert same(values(ours.model), values(theirs.model))

    ours.opt.accumulate(ours.model(3))
    called: list[int] = []
    with pytest.raises(RuntimeError, match="accumulate"):
        ours.opt.step(lambda: called.append(1))
    assert called == [1] and same(values(ours.model), values(theirs.model))


@pytest.mark.parametrize("merged", [False, True])
def test_the_second_plain_step_warns_once(merged: bool) -> None:
    run = Run()
    heard = []
    for seed in range(4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (joint if merged and seed == 1 else mean)(run.opt, run.model(seed)).backward()
            run.opt.step()
        heard.append(len(caught))
    assert heard == ([0, 0, 0, 0] if merged else [0, 1, 0, 0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    run = Run()
    expected = decouple(run.model.rows())
    for layer in run.model.trunk:
        recomputed = functools.partial(checkpoint, layer.forward, use_reentrant=reentrant)
        layer.forward = recomputed
    run.opt.joint(run.model(0)).backward()
    torch.testing.assert_close(grads(run.model), expected, rtol=0, atol=1e-12)
