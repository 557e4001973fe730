"""skorch: ``get_loss`` returns ``joint``.

The optimizer is made by a function of skorch's two arguments; callbacks for clipping and schedulers
take it as any other.
"""

from skorch import NeuralNet
from skorch.callbacks import GradientNormClipping
from torch.optim import AdamW
from torch.utils.data import default_collate
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


class Net(NeuralNet):
    def get_loss(self, y_pred, y_true, *args, **kwargs):
        return self.optimizer_.joint(y_pred)


def train(model, samples):
    net = Net(
        model,
        criterion=lambda: None,
        optimizer=lambda parameters, lr: ModalityDecoupledOptimizer(AdamW(parameters, lr)),
        callbacks=[GradientNormClipping(1.0)],
        lr=1e-2,
        max_epochs=1,
        batch_size=8,
        train_split=None,
    )
    net.fit(default_collate(samples), None)
    return net.optimizer_


if __name__ == "__main__":
    print(train(Model(), samples()).last)
