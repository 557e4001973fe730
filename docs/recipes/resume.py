"""Checkpoint and resume, bit for bit.

The state dict is the base's own: a checkpoint of the bare base loads too. The seed and counter that
``rule="pcgrad"`` draws its order from lie in the parameter groups. A ``CombinationSampler`` and a
``LossBalance`` have state dicts of their own: put them beside. Save between windows of
micro-batches: pending rows are not part of it.
"""

from pathlib import Path

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples, epochs=2, path=Path("checkpoint.pt")):
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    state = {"model": model, "opt": opt, "scheduler": StepLR(opt, step_size=1, gamma=0.5)}
    saved = torch.load(path) if path.exists() else {"epochs": 0}
    for name in state.keys() & saved.keys():
        state[name].load_state_dict(saved[name])
    for epoch in range(saved["epochs"], epochs):
        for batch in DataLoader(samples, batch_size=8):
            opt.step(model(**batch))
        state["scheduler"].step()
        saved = {name: each.state_dict() for name, each in state.items()}
        torch.save(saved | {"epochs": epoch + 1}, path)
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
