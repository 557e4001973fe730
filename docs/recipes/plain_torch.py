"""A plain loop, with clipping and a scheduler.

``opt.backward`` adds the merged gradient to ``.grad`` as ``loss.backward()`` would, so clipping,
hooks and schedulers stay where they are. A modality that the batch lacks is None: the mean over no
sample would be NaN.
"""

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples):
    loader = DataLoader(samples, batch_size=8)
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    scheduler = OneCycleLR(opt, max_lr=1e-2, total_steps=len(loader))
    for batch in loader:
        opt.zero_grad()
        opt.backward(model(**batch))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        scheduler.step()
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
