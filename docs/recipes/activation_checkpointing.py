"""Activation checkpointing: each loss recomputes its own forward in its backward.

Give ``use_reentrant=False``. Reentrant checkpoints hide from the graph what a loss reaches:
parameters outside the optimizer get the plain sum then, and ``conflict_parameters`` cannot stop
inside.
"""

from functools import partial

from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples):
    model.score = partial(checkpoint, model.score, use_reentrant=False)
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    for batch in DataLoader(samples, batch_size=8):
        opt.step(model(**batch))
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
