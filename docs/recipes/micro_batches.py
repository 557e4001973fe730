"""Micro-batches: the gradients of four are merged once.

``accumulate`` takes all but the last, ``backward`` the last. Divide nothing: each loss is averaged
over the micro-batches that have it, so that a modality which is missing in one of four keeps its
size. ``opt.zero_grad()`` drops what is pending: call it before the window, not within.
"""

from torch.optim import AdamW
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples, window=4):
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    for step, batch in enumerate(DataLoader(samples, batch_size=8), start=1):
        if step % window:
            opt.accumulate(model(**batch))
            continue
        opt.backward(model(**batch))
        opt.step()
        opt.zero_grad()
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
