"""Training in several processes: `torchrun --nproc-per-node N -m stages.train`, one process a GPU or a share of cores.

Every process holds the whole model and takes an equal share of each batch; one sum over all processes a step makes
their gradients equal, and so their weights. It replaces torch's DistributedDataParallel, which must wrap the model
and hook into its backward pass: at this size there is little to overlap, and a compiled loss, accumulation, fp16's
scaler and Muon stay as they are. Dropout draws other masks for another number of processes; without it the loss
curve depends on that number in the last digits alone.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smallgpt.cli import DeviceError

# How long the others wait for the first process to validate or to prepare a corpus; torchrun ends them if it dies.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model together; alone by default, and then nothing is exchanged.

    Everything that exchanges must be called by all of them, in the same order; it raises ConnectionError when one of
    the others has ended.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1  # of them on this machine
    device: str = "cpu"  # its type

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, logs and validates."""
        return self.rank == 0

    def average(self, model: nn.Module, value: Tensor) -> Tensor:
        """Replace all gradients by their means over the processes, and return the mean of a scalar."""
        if self.size == 1:
            return value
        gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]
        flat = torch.cat([*(gradient.flatten() for _, gradient in gradients), value[None]])
        self._reduce(flat, dist.ReduceOp.SUM)
        *means, mean = (flat / self.size).split([*(gradient.numel() for _, gradient in gradients), 1])
        for (parameter, gradient), new in zip(gradients, means, strict=True):
            parameter.grad = new.view_as(gradient)
        return mean[0]

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes call this with; waits for all of them."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device=self.device)
        self._reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self.largest(0)

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        try:
            dist.all_reduce(tensor, operation)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConnectionError(f"another process of this training ended, its message says why ({reason})") from None


@contextmanager
def join_ranks(device: torch.device) -> Iterator[Ranks]:
    """Meet the other processes if torchrun started this one: gloo between CPUs, NCCL between GPUs.

    Inside another such block the processes have met. Raises DeviceError when a process finds no GPU of its own,
    and ValueError when WORLD_SIZE is set by something else than torchrun.
    """
    size, local_size = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if size == 1:
        yield Ranks()
        return
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE is {size}, but this process has no LOCAL_RANK; start with torchrun, or unset it")
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local_size > torch.cuda.device_count():
            raise DeviceError(
                f"{local_size} processes were started, but PyTorch sees {torch.cuda.device_count()} CUDA devices; "
                "start one a device, or set training.device to cpu"
            )
        torch.cuda.set_device(local_rank)
    outer = dist.is_initialized()
    if not outer:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), size, local_size, device.type)
    if not ranks.first:
        logging.disable(logging.WARNING)  # the first one says it for all
    try:
        yield ranks
    finally:
        if not outer:
            dist.destroy_process_group()
