"""TorchJD's weightings of a Gramian as ``rule=``.

Those that average, such as UPGrad and MGDA, divide by the number of losses themselves: hence
``reduction="sum"``. ``scope="all"`` is what TorchJD's own aggregators see. GradVac remembers: what
a weighting remembers is in no state dict, neither the optimizer's nor its own, so it is saved as it
is. Load only files that you have written.
"""

from pathlib import Path

import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader
from torchjd.aggregation import GradVacWeighting, MGDAWeighting, UPGradWeighting
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples, rule, path=Path("torchjd.pt")):
    saved = torch.load(path, weights_only=False) if path.exists() else {"rule": rule}
    base = AdamW(model.parameters(), lr=1e-2)
    opt = ModalityDecoupledOptimizer(base, rule=saved["rule"], scope="all", reduction="sum")
    if path.exists():
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
    for batch in DataLoader(samples, batch_size=8):
        opt.step(model(**batch))
    state = {"model": model.state_dict(), "opt": opt.state_dict(), "rule": saved["rule"]}
    torch.save(state, path)
    return opt


if __name__ == "__main__":
    for rule in (UPGradWeighting(), MGDAWeighting(), GradVacWeighting()):
        print(train(Model(), samples(), rule, Path(f"{type(rule).__name__}.pt")).last)
