"""float16 with ``GradScaler``, and two optimizers.

``opt.joint(losses)`` is one scalar whose backward decouples, so the loss scale reaches every loss.
Call nothing but ``scaler.step(opt)`` for the step: ``opt.step(losses)`` would not know of the
scale. Norms in the report are those of the scaled losses. The other optimizer's parameters get the
plain mean of their gradients, unless one base steps both (``two_bases.py``). Clip for each
optimizer apart: one may be skipped for an inf that a common norm would carry to the other.
"""

import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples, device="cpu"):
    opt = ModalityDecoupledOptimizer(AdamW(model.to(device).head.parameters(), lr=1e-2))
    others = SGD(model.encoders.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(device)
    for batch in DataLoader(samples, batch_size=8):
        with torch.autocast(device, torch.float16):
            losses = model(**{name: values.to(device) for name, values in batch.items()})
        scaler.scale(opt.joint(losses)).backward()
        for each, part in ((opt, model.head), (others, model.encoders)):
            scaler.unscale_(each)
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            scaler.step(each)
            each.zero_grad()
        scaler.update()
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
