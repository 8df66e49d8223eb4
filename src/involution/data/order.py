"""The order in which items are loaded: the same in every start, on any number of processes, and from any batch on."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

_FILES_AT_ONCE = 4  # whose items are shuffled with one another


class DataError(ValueError):
    """Data that is not as it should be: one sentence for the user."""


def loader(
    items: Any,
    batch_size: int,
    train: bool = False,
    workers: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
    order: Share | None = None,
) -> DataLoader[Any]:
    """Loads this process's share of a data set in batches.

    In training the order changes with every epoch, whatever of an item is random is drawn anew, and an incomplete last
    batch is left out. Both follow from Lightning's seed, the epoch and the item alone, so a training goes on from the
    middle of an epoch as if it had never stopped: Lightning keeps the loader's `state_dict` in its checkpoints. By
    `Order`, batches of several processes together are those of one process with as many times the `batch_size`.

    Otherwise each item is loaded exactly once, in order, also where processes get different numbers of them.

    Args:
        items: a data set with a length.
        batch_size: items of a batch, in each process.
        train: load to train on.
        workers: processes that read items.
        collate: what makes a batch of items.
        order: of the items. Default: `Order`.
    """
    return (Resumable if train else DataLoader)(
        Drawn(items),
        batch_size=batch_size,
        sampler=Order(len(items), batch_size, train) if order is None else order,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


class Share(DistributedSampler[Any]):
    """What one process asks for in an epoch: items, each with the seed of what is random in it.

    A subclass of torch's sampler so that Lightning tells it the epoch and does not put its own in place, which repeats
    items where they do not come out even.

    Args:
        train: a new order in every epoch.
        seed: of the order. Default: Lightning's.

    Attributes:
        skipped: an epoch, and how many batches are left out at its beginning when it is next iterated over.
    """

    def __init__(self, train: bool, seed: int | None = None) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        ranks = (distributed.get_world_size(), distributed.get_rank()) if distributed.is_initialized() else (1, 0)
        super().__init__(cast(Any, ()), *ranks, shuffle=train, seed=seed)
        self.skipped = (0, 0)

    @property
    def batches_skipped(self) -> int:
        """Batches left out at the beginning of this epoch."""
        epoch, batches = self.skipped
        return batches if epoch == self.epoch else 0

    def full(self, count: int, batch_size: int) -> int:
        """How many of `count` items make full batches, as many for each process.

        Raises:
            DataError: if none do.
        """
        full = count - count % (batch_size * self.num_replicas)
        if not full:
            raise DataError(
                f"`batch_size` must be at most {count // self.num_replicas}, for {count} items to train on make no "
                f"full batch for each of {self.num_replicas} process(es); got {batch_size}."
            )
        return full

    def generator(self) -> torch.Generator:
        """Draws what is random in the order of this epoch, the same on all processes."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)


class Order(Share):
    """The order of items that can be had in any order.

    Args:
        count: items of the data set.
        batch_size: of each process; in training no process begins a batch that another cannot fill.
        train: a new order in every epoch, and only full batches.
        seed: of the order. Default: Lightning's.
        files: how many items each file holds, where reading goes better file by file. The files are then shuffled, each
            process gets a run of them, and items are shuffled within a few files at a time.

    Raises:
        DataError: if there are not enough items to train on for one batch of every process.
    """

    def __init__(
        self, count: int, batch_size: int, train: bool, seed: int | None = None, files: Sequence[int] | None = None
    ) -> None:
        super().__init__(train, seed)
        self._end = self.full(count, batch_size) if train else count
        self._count, self._batch_size, self._files = count, batch_size, files

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = self.generator()
        if self._files is not None:
            mine = self._from_files(self._files, generator)
        else:
            order = torch.randperm(self._count, generator=generator) if self.shuffle else torch.arange(self._count)
            mine = order[self.rank : self._end : self.num_replicas]
        seeds = torch.randint(2**32, (self._count,), generator=generator)
        drawn = zip(mine.tolist(), seeds[mine].tolist(), strict=True)
        return islice(drawn, self._batch_size * self.batches_skipped, None)

    def _from_files(self, files: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        order = torch.randperm(len(files), generator=generator) if self.shuffle else torch.arange(len(files))
        items = torch.arange(self._count).split(list(files))
        shuffled = torch.cat([items[file] for file in order.tolist()])
        mine = shuffled[: self._end].tensor_split(self.num_replicas)[self.rank]
        if not self.shuffle:
            return mine
        window = max(1, _FILES_AT_ONCE * self._count // len(files))
        return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in mine.split(window)])

    def __len__(self) -> int:
        return len(range(self.rank, self._end, self.num_replicas))


class Resumable(DataLoader[Any]):
    """A loader of training batches that can be put in the middle of an epoch.

    Attributes:
        waited: seconds in which the next batch was not there yet, since this loader was made.
    """

    sampler: Share
    waited = 0.0
    _batches = 0  # of this epoch that were handed out, or left out as they had been before

    def __iter__(self) -> Any:
        self._batches = self.sampler.batches_skipped
        # begun when the first batch is asked for, after Lightning has told the epoch: workers read ahead at once
        batches = super().__iter__()
        while True:
            begin = perf_counter()
            batch = next(batches, None)
            self.waited += perf_counter() - begin
            if batch is None:
                return
            self._batches += 1
            yield batch

    @property
    def together(self) -> int:
        """Items of a batch, on all processes."""
        return (self.batch_size or 1) * self.sampler.num_replicas

    def state_dict(self) -> dict[str, int]:
        """The epoch, how many of its batches were handed out, and how many items one has on all processes."""
        return {"epoch": self.sampler.epoch, "batches": self._batches, "together": self.together}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """When the epoch of `state` is next iterated over, begin behind its batches.

        Raises:
            DataError: if its batches had another number of items.
        """
        if state["batches"] and state.get("together", self.together) != self.together:
            raise DataError(
                f"`batch_size` times the number of processes must be {state['together']}, as in the checkpoint, which "
                f"is from the middle of an epoch; got {self.together}."
            )
        self.sampler.skipped = (state["epoch"], state["batches"])


class Drawn(Dataset[Any]):
    """A data set whose items are asked for with a seed: what is random in an item is the same for the same seed."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, asked: tuple[int, int]) -> Any:
        return self.__getitems__([asked])[0]

    def __getitems__(self, asked: Sequence[tuple[int, int]]) -> list[Any]:
        """The items of a batch; torch's loader calls it."""
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            return [self._item(*one) for one in asked]
        finally:  # in the main process training draws from the same generators
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def _item(self, index: int, seed: int) -> Any:
        seed_all(seed)
        return self.items[index]


def seed_all(seed: int) -> None:
    """Seed all generators that training draws from, by a number below 2**32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a thousand times as long without a GPU
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
