"""Several processes that train one model together, launched by ``torchrun``.

Each reads its rows of the same batches and averages its gradients with the others', so that all take the same step.
What depends on the texts of a batch beside their mean is worked out per process, over its own rows: the threshold at
which a reduced rate is met, and the statistics of the density (averaged afterwards).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run, as one of them sees them. Every method that exchanges must be called by all of them."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that logs, validates and saves."""
        return self.rank == 0

    def rows(self, batch: Tensor) -> Tensor:
        """This process's share of ``batch`` [B, ...]; B must be a multiple of ``size``."""
        assert len(batch) % self.size == 0
        share = len(batch) // self.size
        return batch[self.rank * share : (self.rank + 1) * share]

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over the processes, the same to the last bit on each; not differentiable.

        Raises:
            ConnectionError: another process is gone.
        """
        return self._sum(values) / self.size

    def wait(self) -> None:
        """Wait for the other processes: the last exchange of a run that goes well.

        gloo's threads may hold the tensors of an exchange for a moment after it; one that Python knows must not be the
        last before the process ends, or letting go of it while the interpreter is torn down aborts the process.

        Raises:
            ConnectionError: another process is gone.
        """
        if self.size > 1:
            with _noticing_loss():
                torch.distributed.barrier()

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradients by their means; those that no process has stay None."""
        if self.size == 1:
            return
        known = list(parameters)
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in known]
        present = torch.tensor([float(one.grad is not None) for one in known], device=known[0].device)
        *sums, somewhere = self.sum_of_all([*gradients, present])
        for parameter, total, has_one in zip(known, sums, somewhere.tolist(), strict=True):
            parameter.grad = total.div_(self.size) if has_one else None

    def average_buffers(self, module: nn.Module) -> None:
        """Replace the buffers of ``module`` (running statistics) by their means."""
        if self.size == 1:
            return
        buffers = list(module.buffers())
        sums = self.sum_of_all([buffer.double() for buffer in buffers])
        for buffer, total in zip(buffers, sums, strict=True):
            buffer.copy_(total / self.size)

    def sum_of_all(self, tensors: list[Tensor]) -> list[Tensor]:
        """Sums over the processes of tensors of one dtype, in a single exchange; not differentiable.

        Raises:
            ConnectionError: another process is gone.
        """
        if self.size == 1:
            return tensors
        flat = self._sum(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def _sum(self, values: Tensor) -> Tensor:
        total = values.detach()
        if self.size > 1:
            total = total.clone()
            with _noticing_loss():
                torch.distributed.all_reduce(total)
        return total


@contextmanager
def _noticing_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError("another process of the run broke off") from error


ALONE = Ranks()


@contextmanager
def join_ranks(device: str) -> Iterator[tuple[Ranks, str]]:
    """The processes that ``torchrun`` launched, and the device of this one; without it, this process alone.

    Raises:
        ValueError: this machine has fewer GPUs than processes.
    """
    if not torch.distributed.is_torchelastic_launched():
        yield ALONE, device
        return
    if device == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"process {local + 1} on this machine needs a GPU of its own, and there are {gpus}")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size()), device
    finally:
        torch.distributed.destroy_process_group()
