"""bfloat16: autocast around the forward.

bfloat16 needs no loss scaling. ``opt.backward`` and ``opt.step`` stay outside ``autocast``, as
``loss.backward()`` does. To keep the rows, one per loss, in half the memory too, give the optimizer
``row_dtype=torch.bfloat16``.
"""

import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples):
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    for batch in DataLoader(samples, batch_size=8):
        with torch.autocast(batch["text"].device.type, torch.bfloat16):
            losses = model(**batch)
        opt.step(losses)
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
