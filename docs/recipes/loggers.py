"""TensorBoard, Weights & Biases and MLflow: ``as_scalars`` is a flat mapping for all of them.

Reading a report waits for the device: log every so many steps. In keys the "+" of a combination is
"-", because MLflow refuses "+".
"""

from pathlib import Path

import mlflow
import wandb
from torch.optim import AdamW
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples, folder=Path("runs")):
    writer, run = SummaryWriter(folder), wandb.init(mode="offline", dir=folder)
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    for step, batch in enumerate(DataLoader(samples, batch_size=8)):
        opt.step(model(**batch))
        if step % 4 == 0:
            scalars = opt.last.as_scalars()
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            run.log(scalars, step=step)
            mlflow.log_metrics(scalars, step=step)
    writer.close()
    run.finish()
    mlflow.end_run()
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
