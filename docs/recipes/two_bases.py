"""Two optimizers, decoupled together: Muon for matrices, AdamW for the rest.

Wrapping one of the two would give the other one's parameters the plain mean of their gradients. A
base that steps both is wrapped instead. ``torch.distributed.checkpoint`` does not take its state
dict.
"""

from torch.optim import AdamW, Muon, Optimizer
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


class Both(Optimizer):
    def __init__(self, *parts):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts

    def add_param_group(self, param_group):
        if hasattr(self, "parts"):
            raise RuntimeError("add the group to one of the parts, before they are wrapped")
        super().add_param_group(param_group)

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict):
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups[:] = [group for part in self.parts for group in part.param_groups]

    def __reduce__(self):  # for deepcopy and pickle
        return type(self), self.parts


def train(model, samples):
    matrices = Muon([p for p in model.parameters() if p.dim() == 2], lr=1e-2)
    others = AdamW([p for p in model.parameters() if p.dim() != 2], lr=1e-3)
    opt = ModalityDecoupledOptimizer(Both(matrices, others))
    for batch in DataLoader(samples, batch_size=8):
        opt.step(model(**batch))
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
