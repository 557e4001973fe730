"""Lightning, manual optimization: the window of micro-batches is decoupled as a whole.

Ask for the optimizer itself: the proxy takes no losses. float16 needs automatic optimization. With
several devices set ``opt.module = self.trainer.strategy.model`` in ``on_train_start``.
"""

import lightning.pytorch as pl
from torch.optim import AdamW
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


class Module(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.automatic_optimization = model, False

    def configure_optimizers(self):
        return ModalityDecoupledOptimizer(AdamW(self.model.parameters(), lr=1e-2))

    def training_step(self, batch, batch_idx):
        opt = self.optimizers(use_pl_optimizer=False)
        if batch_idx % 2 == 0:
            return opt.accumulate(self.model(**batch))
        self.log_dict(opt.backward(self.model(**batch)).as_scalars())
        self.clip_gradients(opt, 1.0, "norm")
        self.optimizers().step()
        opt.zero_grad()


def train(model, samples):
    trainer = pl.Trainer(max_epochs=1)
    trainer.fit(Module(model), DataLoader(samples, batch_size=8))
    return trainer.optimizers[0]


if __name__ == "__main__":
    print(train(Model(), samples()).last)
