"""The processes that train one network together, started by torchrun, or the one process that is alone.

A batch is divided over the processes, gradients are averaged (DistributedDataParallel), and the first process
is the one that evaluates, writes and speaks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import UserError

PATIENCE = timedelta(hours=6)
"""How long the others wait for the first process, which evaluates and writes alone."""


@dataclass(frozen=True)
class Processes:
    """This process among `count`: its number from 0, and its number on this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls) -> Processes:
        """The processes that torchrun started, connected to each other; alone where it started none.

        They stay connected: a program that goes on after a training can train again, and may disconnect with
        ``torch.distributed.destroy_process_group()``.

        Raises:
            UserError: this build of torch cannot connect processes.
        """
        count = int(os.environ.get("WORLD_SIZE", 1))
        if count == 1:
            return cls()
        if not dist.is_available():
            raise UserError(
                f"torchrun started {count} processes, but this torch was built without distributed"
            )
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        if not dist.is_initialized():
            # Tensors on a GPU go through nccl, those on a CPU and objects through gloo.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE
            )
        return cls(dist.get_rank(), dist.get_world_size(), local_rank)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def highest(self, number: int) -> int:
        """The highest of everybody's numbers."""
        if not self.several:
            return number
        shared = torch.tensor(number)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's values, by rank."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first process's value."""
        return self.gather(value if self.first else None)[0]

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of everybody's tensors of numbers."""
        if self.several:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor
