"""Optimizers from other packages: Lion, 8-bit AdamW, schedule-free AdamW.

Wrap them, and nothing else changes (``tests/recipes/test_optimizers.py`` has many more).
``opt.train()`` and ``opt.eval()`` reach a base that has them, as schedule-free ones do.
"""

from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def lion(parameters):
    from lion_pytorch import Lion

    return Lion(parameters, lr=1e-3)


def eight_bit(parameters):
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-2)


def schedule_free(parameters):
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(parameters, lr=1e-2)


def train(model, samples, base):
    opt = ModalityDecoupledOptimizer(base(model.parameters()))
    opt.train()
    for batch in DataLoader(samples, batch_size=8):
        opt.step(model(**batch))
    opt.eval()  # before evaluation, and before a checkpoint is saved
    return opt


if __name__ == "__main__":
    for base in (lion, eight_bit, schedule_free):
        print(train(Model(), samples(), base).last)
