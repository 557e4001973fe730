"""Freezing in mid-training, and thawing.

A frozen parameter has no gradient and is no part of the rows; its ``.grad`` is left alone, so set
it to None (``zero_grad()`` and ``step(losses)`` do) or momentum and weight decay go on moving it.
New parameters come by ``opt.add_param_group``, at any time.
"""

from torch.optim import AdamW
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples):
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    for step, batch in enumerate(DataLoader(samples, batch_size=8)):
        model.encoders["text"].requires_grad_(not 3 <= step < 6)
        opt.step(model(**batch))
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
