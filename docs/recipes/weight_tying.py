"""Tied weights: one parameter in two places.

A tied parameter is one parameter, and counts as shared where every loss reaches it by either place.
Hand it to the base once, as ``model.parameters()`` does.
"""

from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples):
    model.encoders["audio"] = nn.Sequential(model.encoders["audio"], nn.Linear(16, 16))
    model.encoders["audio"][1].weight = model.head[1].weight
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    for batch in DataLoader(samples, batch_size=8):
        opt.step(model(**batch))
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
