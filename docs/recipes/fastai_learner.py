"""fastai: the loss function is ``joint``.

``OptimWrapper`` takes the optimizer as it is. Callbacks for clipping, mixed precision and
accumulation work as ever; validation gets the mean loss.
"""

from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch.optim import AdamW
from torch.utils.data import DataLoader, default_collate
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def inputs_and_target(samples):
    batch = default_collate(samples)
    return (*batch.values(), batch["target"])


def train(model, samples):
    loader = DataLoader(samples, batch_size=8, collate_fn=inputs_and_target)
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters()))
    learn = Learner(
        DataLoaders(loader, loader),
        model,
        loss_func=lambda losses, _: opt.joint(losses),
        opt_func=OptimWrapper(opt=opt),
        cbs=GradientClip(1.0),
    )
    learn.fit(1, lr=1e-2)
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
