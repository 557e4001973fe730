"""Many ranks with FSDP2: ``torchrun --nproc-per-node 2 docs/recipes/torchrun_fsdp2.py``.

No argument at all: sharded parameters tell. Rows are sharded as they are. All ranks must have the
same losses: FSDP waits for every rank in every backward, so a modality that one rank lacks is run
on zeros, with its loss times zero. (Here the sampler gives all ranks the same kind of sample.)
"""

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples):
    fully_shard(model)
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    for batch in DataLoader(samples[dist.get_rank() :: dist.get_world_size()], batch_size=4):
        opt.step(model(**batch))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        torch.save(whole, "model.pt")
    return opt


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # all ranks make the same data
    print(train(Model(), samples()).last)  # the same on every rank
    dist.destroy_process_group()
