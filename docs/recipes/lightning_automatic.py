"""Lightning, automatic optimization: ``training_step`` returns ``joint``.

Clipping, accumulation, precision plugins and resuming work unchanged; each micro-batch is decoupled
on its own, and validation gets the mean loss. ``module=`` is for several devices.
"""

import lightning.pytorch as pl
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


class Module(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def configure_optimizers(self):
        base = AdamW(self.model.parameters(), lr=1e-2)
        opt = ModalityDecoupledOptimizer(base, module=self.trainer.strategy.model)
        return [opt], [{"scheduler": StepLR(opt, 2, gamma=0.5), "interval": "step"}]

    def training_step(self, batch, batch_idx):
        return self.optimizers(use_pl_optimizer=False).joint(self.model(**batch))

    def on_before_optimizer_step(self, optimizer):
        self.log_dict(optimizer.last.as_scalars())


def train(model, samples):
    trainer = pl.Trainer(max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=1.0)
    trainer.fit(Module(model), DataLoader(samples, batch_size=8))
    return trainer.optimizers[0]


if __name__ == "__main__":
    print(train(Model(), samples()).last)
