"""A pool of processes, one per rank, that stay up from test to test: starting one takes seconds."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist

LIMIT = 30  # seconds that a collective waits; a rank has half as many again to answer


class Ranks:
    """``Ranks(4).run(scenario, *args)``: what a top-level function returns on every rank."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, scenario: Callable[..., Any], *args: Any, timeout: float = 1.5 * LIMIT) -> Any:
        """The result of each rank, in order; one that raises, dies or keeps silent fails a test."""
        if not self._processes:
            self._start()
        task = pickle.dumps((scenario, args))
        for pipe in self._pipes:
            pipe.send_bytes(task)
        results: dict[int, Any] = {}
        failures: list[str] = []
        waiting = dict(zip(self._pipes, range(self.world), strict=True))
        deadline = time.monotonic() + timeout
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    good, results[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    good, results[rank] = False, "died"
                if not good:
                    failures.append(f"rank {rank}: {results[rank]}")
                    deadline = min(deadline, time.monotonic() + 5)  # others may wait for it
        if waiting and not failures:
            failures = [f"ranks {sorted(waiting.values())} did not answer within {timeout:.0f} s"]
        if failures:
            self.stop()  # nobody knows what its ranks are waiting for
            pytest.fail("\n".join(failures), pytrace=False)
        return [results[rank] for rank in range(self.world)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = tempfile.mkdtemp() + "/store"
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world, store, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # or its death would not be seen
            self._processes.append(process)
            self._pipes.append(ours)
        for pipe in self._pipes:  # importing torch takes its time, and none of the collectives'
            assert pipe.poll(300) and pipe.recv_bytes() == b"ready"
        for pipe in self._pipes:
            pipe.send_bytes(b"go")


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    pipe.send_bytes(b"ready")
    pipe.recv_bytes()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=LIMIT),
    )
    while True:
        try:
            scenario, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, scenario(*args)))
            dist.barrier()  # no rank is still waiting for something
        except Exception:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
