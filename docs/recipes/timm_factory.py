"""timm: its optimizer factory and its schedulers.

The factory makes the base, with its groups without weight decay; timm's schedulers drive the
wrapper. Its ``NativeScaler`` takes ``joint``: ``loss_scaler(opt.joint(losses), opt)``.
"""

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples):
    base = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
    opt = ModalityDecoupledOptimizer(base)
    scheduler = CosineLRScheduler(opt, t_initial=8, warmup_t=2, t_in_epochs=False)
    for step, batch in enumerate(DataLoader(samples, batch_size=8), start=1):
        opt.step(model(**batch))
        scheduler.step_update(step)
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
