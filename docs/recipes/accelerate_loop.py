"""Accelerate: ``accelerator.backward`` is given ``joint``.

Accumulation, scaling and clipping work unchanged; each micro-batch is decoupled on its own. Never
write ``opt.step(losses)``: in ``accumulate()`` Accelerate swallows all steps of a window but the
last, losses included, and nothing below it can know. ``module`` is for several processes.
"""

from pathlib import Path

from accelerate import Accelerator
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples):
    accelerator = Accelerator(gradient_accumulation_steps=2)
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    scheduler, loader = StepLR(opt, 2, gamma=0.5), DataLoader(samples, batch_size=8)
    model, opt, loader, scheduler = accelerator.prepare(model, opt, loader, scheduler)
    opt.optimizer.module = model
    if Path("checkpoint").exists():
        accelerator.load_state("checkpoint")
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(opt.optimizer.joint(model(**batch)))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            scheduler.step()
            opt.zero_grad()
    accelerator.save_state("checkpoint")
    return opt.optimizer


if __name__ == "__main__":
    print(train(Model(), samples()).last)
