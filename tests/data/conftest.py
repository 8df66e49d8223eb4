"""What tests of data share."""

from itertools import chain

import pytest
from torch import distributed


@pytest.fixture
def on(monkeypatch):
    """Pretends to be one of several processes."""

    def rank(number, of):
        monkeypatch.setattr(distributed, "is_initialized", lambda: of > 1)
        monkeypatch.setattr(distributed, "get_world_size", lambda: of)
        monkeypatch.setattr(distributed, "get_rank", lambda: number)

    return rank


@pytest.fixture
def classes():
    """The classes of a loader's images in one epoch, batch by batch, or all in one list."""

    def of(loader, epoch=0, flat=False):
        loader.sampler.set_epoch(epoch)
        batches = [batch[1].tolist() for batch in loader]
        return list(chain.from_iterable(batches)) if flat else batches

    return of
