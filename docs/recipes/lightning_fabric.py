"""Lightning Fabric: ``fabric.backward`` is given ``joint``.

So every precision works, float16 included; ``opt.backward(losses)`` is for 32 and 64 bits only.
``opt.optimizer`` is gradsplit's own below Fabric's proxy. ``module`` is for several devices.
"""

from lightning.fabric import Fabric
from torch.optim import AdamW
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples):
    fabric = Fabric()
    fabric.launch()
    base = AdamW(model.parameters(), lr=1e-2)
    model, opt = fabric.setup(model, ModalityDecoupledOptimizer(base))
    opt.optimizer.module = model
    for batch in fabric.setup_dataloaders(DataLoader(samples, batch_size=8)):
        fabric.backward(opt.optimizer.joint(model(**batch)))
        fabric.clip_gradients(model, opt, max_norm=1.0)
        opt.step()
        opt.zero_grad()
    return opt.optimizer


if __name__ == "__main__":
    print(train(Model(), samples()).last)
