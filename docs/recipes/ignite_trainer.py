"""ignite's supervised trainer: the loss function is ``joint``.

Accumulation, AMP and evaluation with a ``Loss`` metric take it as they take any other. A training
function of your own may call ``opt.backward(losses)`` itself.
"""

from ignite.engine import create_supervised_trainer
from torch.optim import AdamW
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples):
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    trainer = create_supervised_trainer(
        model,
        opt,
        loss_fn=lambda losses, _: opt.joint(losses),
        prepare_batch=lambda batch, **_: (batch, None),
        model_fn=lambda model, batch: model(**batch),
        gradient_accumulation_steps=2,
    )
    trainer.run(DataLoader(samples, batch_size=8), max_epochs=1)
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
