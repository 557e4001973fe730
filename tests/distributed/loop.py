"""A training script for torchrun: ``loop.py FOLDER KILL`` resumes from its last checkpoint.

In its first life, rank 1 is killed in the middle of a backward of step KILL (0: never).
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.cases import Case, start

STEPS, EVERY = 12, 5


def main(folder: Path, kill: int) -> None:
    torch.set_num_threads(1)
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # torchrun's own store still has the addresses of those who died, and gloo would believe them.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{life}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=20),
    )
    net, opt, case, rank, world = start(Case(missing="one rank"))
    saved, begin = folder / "saved.pt", 0
    if saved.exists():
        begin, parameters, state = torch.load(saved, weights_only=True)
        net.load_state_dict(parameters)
        opt.load_state_dict(state)

    def die(_: torch.Tensor) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for step in range(begin, STEPS):
        losses = case.losses(net, step, 0, rank, world)
        if kill and (life, step, rank) == ("0", kill, 1):
            net.module.trunk[1].weight.register_hook(die)
        opt.step(losses)
        if (step + 1) % EVERY == 0 and rank == 0:
            torch.save((step + 1, net.state_dict(), opt.state_dict()), folder / "new.pt")
            (folder / "new.pt").replace(saved)
    torch.save(net.state_dict(), folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
