"""Averaged weights: SWA over epochs, EMA over steps.

Both read parameters and know of no gradients: nothing changes. ``opt.step(losses)`` is
``zero_grad``, ``backward`` and ``step`` in one.
"""

from torch.optim import AdamW
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples, epochs=4):
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    swa, scheduler = AveragedModel(model), SWALR(opt, swa_lr=5e-3, anneal_epochs=2)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for epoch in range(epochs):
        for batch in DataLoader(samples, batch_size=8):
            opt.step(model(**batch))
            ema.update_parameters(model)
        if epoch >= epochs // 2:
            swa.update_parameters(model)
            scheduler.step()
    return opt, swa, ema


if __name__ == "__main__":
    print(train(Model(), samples())[0].last)
