"""Many ranks with DDP: ``torchrun --nproc-per-node 2 docs/recipes/torchrun_ddp.py``.

``module=`` is all that is new: the result is that of one process on the batches of all ranks. Every
rank hands over the same names, with None for what its batch lacks; a loss is averaged over the
ranks that have it. A batch that lacks everything on one rank is handed over all the same.
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.data import DataLoader, DistributedSampler
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples):
    ddp = DistributedDataParallel(model)
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2), module=ddp)
    sampler = DistributedSampler(samples, shuffle=False)
    for batch in DataLoader(samples, batch_size=4, sampler=sampler):
        opt.step(ddp(**batch))
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), "model.pt")
    return opt


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # all ranks make the same data
    print(train(Model(), samples()).last)  # the same on every rank
    dist.destroy_process_group()
