"""Optimizers from other packages: Lion, 8-bit AdamW, schedule-free AdamW.

Wrap them, and nothing else changes (``tests/recipes/test_optimizers.py`` has many more).
``opt.train()`` and ``opt.eval()`` reach a base that has them, as schedule-free ones do.
"""

from bitsandbytes.optim import AdamW8bit
from lion_pytorch import Lion
from schedulefree import AdamWScheduleFree
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples, base):
    opt = ModalityDecoupledOptimizer(base(model.parameters(), lr=1e-3))
    opt.train()
    for batch in DataLoader(samples, batch_size=8):
        opt.step(model(**batch))
    opt.eval()  # before evaluation, and before a checkpoint is saved
    return opt


if __name__ == "__main__":
    for base in (Lion, AdamW8bit, AdamWScheduleFree):
        print(train(Model(), samples(), base).last)
