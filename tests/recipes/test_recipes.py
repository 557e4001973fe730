"""Every file of docs/recipes trains as a plain loop written by hand, and runs as a script."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import runpy
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import your_model
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader
from your_model import Model, samples

from tests.recipes.by_hand import by_hand, rows
from tests.reference import decouple_window

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"

pytestmark = pytest.mark.filterwarnings("ignore", "error:.*joint")


def adamw(model: nn.Module) -> list[Optimizer]:
    return [AdamW(model.parameters(), lr=1e-2)]


@dataclasses.dataclass
class Case:
    """What a recipe does, in the words of ``by_hand``."""

    name: str
    hand: dict[str, Any] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    bases: Callable[[nn.Module], list[Optimizer]] = adamw
    prepare: Callable[[nn.Module], object] = lambda model: None
    dtype: torch.dtype = torch.float64
    within: float = 1e-10


def two_bases(model: nn.Module) -> list[Optimizer]:
    matrices = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=1e-2)
    return [matrices, AdamW([p for p in model.parameters() if p.dim() != 2], lr=1e-3)]


def head_and_encoders(model: Model) -> list[Optimizer]:
    return [AdamW(model.head.parameters(), lr=1e-2), SGD(model.encoders.parameters(), lr=1e-2)]


def tie(model: Model) -> None:
    model.encoders["audio"] = nn.Sequential(model.encoders["audio"], nn.Linear(16, 16))
    model.encoders["audio"][1].weight = model.head[1].weight


def freeze_text(model: Model, step: int) -> None:
    model.encoders["text"].requires_grad_(step not in (3, 4, 5))


def adapt(model: Model) -> None:
    peft = importlib.import_module("peft")
    peft.get_peft_model(model, importlib.import_module("peft_lora").CONFIG)


def timm_scheduler(base: Optimizer) -> SimpleNamespace:
    scheduler = importlib.import_module("timm.scheduler").CosineLRScheduler
    cosine, steps = scheduler(base, t_initial=8, warmup_t=2, t_in_epochs=False), count(1)
    return SimpleNamespace(step=lambda: cosine.step_update(next(steps)))


def timm_adamw(model: Model) -> list[Optimizer]:
    vectors = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.05}]
    return [AdamW(groups, lr=1e-2)]


SINGLE = {"dtype": torch.float32, "within": 1e-4}
HALVED = {"scheduler": functools.partial(StepLR, step_size=2, gamma=0.5)}
JOINT = {"joint": True, "window": 2}
CLIP = {"clip": 1.0}
LINEAR = {"scheduler": lambda base: LambdaLR(base, lambda step: 1 - step / 4)}

CASES = [
    Case("plain_torch", CLIP | {"scheduler": lambda o: OneCycleLR(o, 1e-2, total_steps=8)}),
    Case("micro_batches", {"window": 4}),
    Case(
        "grad_scaler",
        CLIP | {"dtype": torch.float16, "scaler": torch.amp.GradScaler("cpu")},
        bases=head_and_encoders,
        **SINGLE,
    ),
    Case("bfloat16", {"dtype": torch.bfloat16}, **SINGLE),
    Case("activation_checkpointing"),
    Case("compile_per_loss"),
    Case("compile_shared_forward", {"scope": range(4, 10)}),
    Case("weight_tying", prepare=tie),
    Case("freezing", {"before": freeze_text}),
    Case("two_bases", bases=two_bases),
    Case("lightning_automatic", CLIP | JOINT | HALVED, ("lightning",)),
    Case("lightning_manual", CLIP | {"window": 2}, ("lightning",)),
    Case("lightning_fabric", CLIP, ("lightning",)),
    Case("accelerate_loop", CLIP | JOINT | HALVED, ("accelerate",)),
    Case("hugging_face_trainer", CLIP | JOINT | LINEAR, ("transformers", "accelerate")),
    Case("monai_trainer", {}, ("monai", "ignite")),
    Case("ignite_trainer", JOINT, ("ignite",)),
    Case("skorch_net", CLIP, ("skorch",)),
    Case("fastai_learner", CLIP, ("fastai",), **SINGLE),
    Case("timm_factory", {"scheduler": timm_scheduler}, ("timm",), bases=timm_adamw),
    Case("peft_lora", {}, ("peft",), prepare=adapt),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_trains_as_by_hand(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run as a script, it has the weights of the loop, and prints a report of three losses."""
    for package in case.needs:
        pytest.importorskip(package, reason=f"needs {package}")
    torch.set_default_dtype(case.dtype)
    model, twin, data = fresh()
    monkeypatch.setattr(your_model, "Model", lambda: model)
    monkeypatch.setattr(your_model, "samples", lambda: data)
    torch.manual_seed(1)
    runpy.run_path(str(RECIPES / f"{case.name}.py"), run_name="__main__")
    torch.manual_seed(1)
    case.prepare(twin)
    by_hand(twin, data, case.bases(twin), **case.hand)
    same_weights(model, twin, case.within)
    assert "text+audio" in capsys.readouterr().out


def same_weights(ours: nn.Module, theirs: nn.Module, within: float = 1e-10) -> None:
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=within)


def fresh() -> tuple[Model, Model, list[dict[str, Tensor]]]:
    """Two equal models, and data."""
    torch.manual_seed(0)
    model = Model()
    return model, copy.deepcopy(model), samples()


def test_sam_decouples_both_of_its_gradients() -> None:
    pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer")
    model, twin, data = fresh()
    importlib.import_module("sam_base").train(model, data)
    (base,) = adamw(twin)
    parameters = list(twin.parameters())
    for batch in DataLoader(data, batch_size=8):
        first = decouple_window([rows(twin(**batch), twin)])
        before = [p.detach().clone() for p in parameters]
        norm = torch.stack([g.norm() for g in first if g is not None]).norm()
        with torch.no_grad():
            for p, g in zip(parameters, first, strict=True):
                p += 0.0 if g is None else 0.05 * g / norm
        second = decouple_window([rows(twin(**batch), twin)])
        with torch.no_grad():
            for p, old, g in zip(parameters, before, second, strict=True):
                p.copy_(old)
                p.grad = g
        base.step()
    same_weights(model, twin, 1e-8)  # its norm has an epsilon


def test_swa_and_ema() -> None:
    model, twin, data = fresh()
    _, swa, ema = importlib.import_module("swa_ema").train(model, data)
    (base,) = adamw(twin)
    steps: list[Model] = []
    for epoch in range(4):
        # SWALR is half way down a cosine, from 1e-2 to 5e-3 in two epochs.
        base.param_groups[0]["lr"] = 1e-2 if epoch < 3 else 7.5e-3
        by_hand(twin, data, [base], after=lambda model: steps.append(copy.deepcopy(model)))
    moving, mean = copy.deepcopy(steps[0]), copy.deepcopy(steps[-1])
    with torch.no_grad():
        for one in steps[1:]:
            for p, new in zip(moving.parameters(), one.parameters(), strict=True):
                p.lerp_(new, 0.1)
        for p, old in zip(mean.parameters(), steps[-9].parameters(), strict=True):
            p.lerp_(old, 0.5)
    same_weights(ema.module, moving)
    same_weights(swa.module, mean)


def test_resume_goes_on_where_the_first_run_stopped() -> None:
    model, twin, data = fresh()
    recipe = importlib.import_module("resume")
    recipe.train(model, data, epochs=1)
    resumed = Model()
    recipe.train(resumed, data, epochs=3)
    (base,) = adamw(twin)
    for epoch in range(3):
        base.param_groups[0]["lr"] = 1e-2 / 2**epoch
        by_hand(twin, data, [base])
    same_weights(resumed, twin)


@pytest.mark.parametrize("name", ["UPGrad", "MGDA", "GradVac"])
def test_torchjd_weightings_and_what_they_remember(name: str) -> None:
    """As TorchJD's own aggregator of the Jacobian, over two runs: the second resumes."""
    aggregation = pytest.importorskip("torchjd.aggregation", reason="needs torchjd")
    recipe = importlib.import_module("torchjd_weightings")
    model, twin, data = fresh()
    resumed = Model()
    torch.manual_seed(1)
    recipe.train(model, data, getattr(aggregation, f"{name}Weighting")())
    recipe.train(resumed, data, None)
    aggregator = getattr(aggregation, name)()
    (base,) = adamw(twin)
    torch.manual_seed(1)
    for _ in range(2):
        merge = {"merge": lambda j: aggregator(j) if len(j) > 1 else j[0]}
        by_hand(twin, data, [base], scope="all", reduction="sum", **merge)
    same_weights(resumed, twin, 1e-8)


def test_loggers_have_every_scalar(tmp_path: Path) -> None:
    for package in ("tensorboard", "wandb", "mlflow"):
        pytest.importorskip(package, reason=f"needs {package}")
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, _, data = fresh()
    opt = importlib.import_module("loggers").train(model, data)
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    (run,) = MlflowClient().search_runs(["0"])
    names = opt.last.as_scalars().keys()
    assert names <= set(events.Tags()["scalars"]) and names <= run.data.metrics.keys()
    assert list(tmp_path.glob("runs/wandb/offline-run-*/*.wandb"))


def test_accelerate_loads_what_it_has_saved() -> None:
    pytest.importorskip("accelerate", reason="needs accelerate")
    model, twin, data = fresh()
    resumed, recipe = Model(), importlib.import_module("accelerate_loop")
    recipe.train(model, data)
    recipe.train(resumed, data)
    by_hand(twin, data + data, adamw(twin), **CLIP | JOINT | HALVED)
    same_weights(resumed, twin)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun_ddp", "torchrun_fsdp2"])
def test_two_ranks_train_as_one_process(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, RECIPES / f"{name}.py"], check=True, timeout=300)
    model, twin, data = fresh()
    model.load_state_dict(torch.load("model.pt"))
    by_hand(twin, data, adamw(twin))
    same_weights(model, twin, 1e-4)


@pytest.mark.parametrize("name", ["Lion", "AdamW8bit", "AdamWScheduleFree"])
def test_other_bases(name: str) -> None:
    for package in ("bitsandbytes", "lion_pytorch", "schedulefree"):
        pytest.importorskip(package, reason=f"needs {package}")
    torch.set_default_dtype(torch.float32)
    recipe = importlib.import_module("other_bases")
    model, twin, data = fresh()
    recipe.train(model, data, getattr(recipe, name))
    base = getattr(recipe, name)(twin.parameters(), lr=1e-3)
    modes = {mode: getattr(base, mode, lambda: None) for mode in ("train", "eval")}
    modes["train"]()
    by_hand(twin, data, [base])
    modes["eval"]()
    same_weights(model, twin, 1e-4)


def test_the_cases_differ() -> None:
    """Nothing above could pass by ignoring what was asked, or by not decoupling."""
    asked = [{}, CLIP, JOINT, {"window": 2}, HALVED, {"merge": lambda rows: rows.sum(0)}]
    ends = []
    for hand in asked:
        _, twin, data = fresh()
        by_hand(twin, data, adamw(twin), **hand)
        ends.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    apart = torch.cdist(torch.stack(ends), torch.stack(ends)) + torch.eye(len(ends))
    assert apart.min() > 1e-3
