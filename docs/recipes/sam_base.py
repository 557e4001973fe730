"""SAM as the base: both of its gradients are decoupled.

``step`` gets a closure that calls backward itself; ``opt.step(losses)`` cannot work, as the base
must ask for gradients twice. The report is of the second.
"""

from pytorch_optimizer import SAM
from torch.optim import AdamW
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples):
    opt = ModalityDecoupledOptimizer(SAM(model.parameters(), AdamW, rho=0.05, lr=1e-2))
    for batch in DataLoader(samples, batch_size=8):

        def closure(batch=batch):
            opt.zero_grad()
            loss = opt.joint(model(**batch))
            loss.backward()
            return loss

        closure()
        opt.step(closure)
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
