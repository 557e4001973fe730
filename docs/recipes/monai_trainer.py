"""MONAI's SupervisedTrainer: the loss function is ``joint``.

``optim_set_to_none=True`` matters: with zeros instead of None, momentum and weight decay would move
the encoder of a modality that the batch lacks.
"""

import torch
from monai.engines import SupervisedTrainer
from torch.optim import AdamW
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def prepared(batch, *_, **__):
    text, *others = batch.values()
    return text, None, others, {}


def train(model, samples):
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader(samples, batch_size=8),
        prepare_batch=prepared,
        network=model,
        optimizer=opt,
        loss_function=lambda losses, _: opt.joint(losses),
        optim_set_to_none=True,
        decollate=False,
    ).run()
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
