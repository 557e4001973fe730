"""fastai: the loss function is ``joint`` of the optimizer that the learner has made.

``learn.opt`` is fastai's ``OptimWrapper``, ``learn.opt.opt`` is gradsplit's own below it. Callbacks for
clipping, mixed precision and accumulation take it as any other; validation gets the mean loss.
"""

from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch.optim import AdamW
from torch.utils.data import DataLoader, default_collate
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def wrapped(parameters, lr):
    return ModalityDecoupledOptimizer(AdamW(parameters, lr))


def inputs_and_target(samples):
    batch = default_collate(samples)
    return (*batch.values(), batch["target"])


def train(model, samples):
    loader = DataLoader(samples, batch_size=8, collate_fn=inputs_and_target)
    learn = Learner(
        DataLoaders(loader, loader),
        model,
        loss_func=lambda losses, _: learn.opt.opt.joint(losses),
        opt_func=lambda groups, lr: OptimWrapper(groups, wrapped, lr=lr),
        cbs=GradientClip(1.0),
    )
    learn.fit(1, lr=1e-2)
    return learn.opt.opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
