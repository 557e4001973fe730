"""``torch.compile``, called once per loss.

Each loss has a graph of its own: what is private stays private, and nothing else changes.
gradsplit's own calls are never traced, and the optimizer's step can be compiled as ever. Where one
compiled call gives several losses: ``compile_shared_forward.py``.
"""

import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples):
    model.score = torch.compile(model.score)
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    for batch in DataLoader(samples, batch_size=8):
        opt.step(model(**batch))
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
