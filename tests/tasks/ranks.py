"""Run by torchrun: the command line `involution`, as one of several processes on processors.

Batch norms take their statistics over all processes: torch's SyncBatchNorm does so on GPUs alone. KILL=RANK:STEP in the
environment kills a process once, without warning.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.nn.functional import all_reduce


class SyncNorm(nn.BatchNorm2d):
    """A batch norm over all processes, written down from its definition."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        ones = torch.ones_like(x[:, :1]).sum().expand(x.shape[1])
        sums = torch.stack([x.sum((0, 2, 3)), (x * x).sum((0, 2, 3)), ones])
        if distributed.is_initialized():
            sums = all_reduce(sums)
        count = sums[2]
        mean = sums[0] / count
        variance = sums[1] / count - mean * mean
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def dying(task, step):
    """Let this process die when it has taken so many steps, the first time."""
    old, mark = task.on_train_batch_end, Path("killed")

    def end(self, *args):
        old(self, *args)
        if self.trainer.global_step == step and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    task.on_train_batch_end = end


def main():
    nn.BatchNorm2d = SyncNorm  # before any network is built
    from involution.cli import main
    from involution.tasks.task import Task

    rank, _, step = os.environ.get("KILL", "").partition(":")
    if rank and rank == os.environ["RANK"]:
        dying(Task, int(step))
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
