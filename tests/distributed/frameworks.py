"""Training scripts for two ranks, each as users of its framework write it.

``python -m tests.distributed.frameworks FOLDER LAUNCHER`` trains what :data:`SCRIPTS` lists under
LAUNCHER, which has started it, in every case of :data:`CASES`. Each rank saves what has become of
its parameters and the error that stopped it, if one did.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, DistributedSampler

from gradsplit import ModalityDecoupledOptimizer
from tests.reference import TwoTowers

SEEDS = range(16)  # one a rank and step
Losses = dict[str, Tensor | None]


class Model(TwoTowers):
    """The losses of one sample, named by its seed; some lack b, in one step those of both ranks."""

    def forward(self, seed: int | Tensor, **_: Any) -> Losses:
        losses: Losses = {**self.losses(int(seed))}
        return losses | {"b": None, "a+b": None} if int(seed) % 8 in (1, 4, 6, 7) else losses


@dataclasses.dataclass
class Run:
    """One training: what is asked of the framework, and what it is given."""

    window: int = 1
    clip: float | None = None
    gamma: float = 1.0
    told: bool = True  # the optimizer, of the wrapped model
    folder: Path = Path()

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = Model().double()
        self.base = SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def scheduler(self, opt: Optimizer, factor: int = 1) -> StepLR:
        return StepLR(opt, step_size=2 * factor, gamma=self.gamma)


CASES = {"plain": {}, "all": {"window": 2, "clip": 0.1, "gamma": 0.5}, "untold": {"told": False}}


def lightning(run: Run, automatic: bool) -> None:
    import lightning.pytorch as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = run.model
            self.automatic_optimization = automatic

        def configure_optimizers(self) -> Any:
            told = {"module": self.trainer.strategy.model} if automatic and run.told else {}
            opt = ModalityDecoupledOptimizer(run.base, **told)
            return [opt], [{"scheduler": run.scheduler(opt), "interval": "step"}]

        def train_dataloader(self) -> DataLoader:
            return DataLoader(SEEDS, sampler=DistributedSampler(SEEDS, shuffle=False))

        def on_train_start(self) -> None:
            if run.told and not automatic:
                self.optimizers().module = self.trainer.strategy.model

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            opt = self.optimizers(use_pl_optimizer=False)
            losses = self.inner(batch)
            if automatic:
                return opt.joint(losses)
            if (batch_idx + 1) % run.window:
                opt.accumulate(losses)
                return None
            opt.backward(losses)
            self.clip_gradients(opt, run.clip, "norm")
            opt.step()
            opt.zero_grad()
            self.lr_schedulers().step()
            return None

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"gradient_clip_val": run.clip, "accumulate_grad_batches": run.window}
        if automatic
        else {},
    )
    trainer.fit(Module())


def lightning_automatic(run: Run) -> None:
    lightning(run, automatic=True)


def lightning_manual(run: Run) -> None:
    lightning(run, automatic=False)


def fabric(run: Run) -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    opt = ModalityDecoupledOptimizer(run.base)
    scheduler = run.scheduler(opt)
    model, opt = fabric.setup(run.model, opt)
    if run.told:
        opt.optimizer.module = model
    for step, seed in enumerate(fabric.setup_dataloaders(DataLoader(SEEDS)), start=1):
        accumulating = step % run.window > 0
        with fabric.no_backward_sync(model, enabled=accumulating):
            fabric.backward(opt.optimizer.joint(model(seed)) / run.window)
        if not accumulating:
            if run.clip:
                fabric.clip_gradients(model, opt, max_norm=run.clip)
            opt.step()
            scheduler.step()
            opt.zero_grad()


def accelerate(run: Run) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=run.window)
    opt = ModalityDecoupledOptimizer(run.base)
    scheduler = run.scheduler(opt, factor=accelerator.num_processes)  # its proxy steps so often
    model, opt, loader, scheduler = accelerator.prepare(
        run.model, opt, DataLoader(SEEDS), scheduler
    )
    if run.told:
        opt.optimizer.module = model
    for seed in loader:
        with accelerator.accumulate(model):
            accelerator.backward(opt.optimizer.joint(model(seed)))
            if run.clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), run.clip)
            opt.step()
            scheduler.step()
            opt.zero_grad()


def hugging_face(run: Run) -> None:
    import transformers

    class Trainer(transformers.Trainer):
        loss_is_scaled_for_ga = False  # else windows are summed where forward takes **kwargs

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
        ) -> Any:
            opt = self.optimizer.optimizer
            if run.told:
                opt.module = self.model_wrapped
            loss = opt.joint(model(**inputs))
            return (loss, {"loss": loss}) if return_outputs else loss

    opt = ModalityDecoupledOptimizer(run.base)
    Trainer(
        model=run.model,
        args=transformers.TrainingArguments(
            output_dir=str(run.folder),
            use_cpu=True,
            num_train_epochs=1,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=run.window,
            max_grad_norm=run.clip or 0.0,
            train_sampling_strategy="sequential",
            label_names=["labels"],  # without labels evaluation computes no loss
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=3,  # which must change nothing
        ),
        train_dataset=[{"seed": seed, "labels": seed} for seed in SEEDS],
        eval_dataset=[{"seed": seed, "labels": seed} for seed in (20, 21)],
        optimizers=(opt, run.scheduler(opt)),
    ).train()


SCRIPTS = {
    "lightning": [lightning_automatic, lightning_manual, fabric],
    "accelerate": [accelerate],
    "torchrun": [hugging_face],
}


def main(folder: Path, launcher: str) -> None:
    torch.set_num_threads(1)
    for script in SCRIPTS[launcher]:
        for case, asked in CASES.items():
            run, error = Run(**asked, folder=folder), ""
            try:
                script(run)
            except RuntimeError as told:
                error = str(told)
            assert dist.get_world_size() == 2, "the launcher has not started two ranks"
            parameters = [p.detach().clone() for p in run.model.parameters()]
            where = folder / f"{script.__name__}-{case}-{dist.get_rank()}.pt"
            torch.save((parameters, error), where)
    dist.barrier()  # Lightning's first rank does not wait for the other


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
