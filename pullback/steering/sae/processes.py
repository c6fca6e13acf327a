"""The processes of a data-parallel run, as ``torchrun`` starts them, or one alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import Tensor

__all__ = ["Processes"]


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and which of them this one is.

    >>> Processes().mean(torch.ones(2))
    tensor([1., 1.])
    """

    number: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Processes:
        """Those of ``torch.distributed``, which is set up if ``torchrun`` started this process; else this one alone."""
        if not distributed.is_available():
            return cls()
        if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.number == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes; with one alone, the value itself."""
        return value if self.count == 1 else self._reduced(value, distributed.ReduceOp.SUM) / self.count

    def largest(self, value: Tensor) -> Tensor:
        """The maximum over processes, entry by entry."""
        return value if self.count == 1 else self._reduced(value, distributed.ReduceOp.MAX)

    def mean_(self, value: Tensor) -> None:
        """Put the mean over processes in place."""
        if self.count > 1:
            distributed.all_reduce(value)
            value.div_(self.count)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            distributed.barrier()

    def _reduced(self, value: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        value = value.clone()
        distributed.all_reduce(value, operation)
        return value
