"""The order of items: what every process loads, in every epoch, from any batch on."""

import random

import numpy as np
import pytest
import torch

from involution.data.order import DataError, Drawn, Order, loader, seed_all


class Items:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def indices(order):
    return [index for index, _ in order]


def test_an_epoch_has_its_own_order_and_its_own_draws(on):
    order = Order(20, 5, train=True)
    first = list(order)
    assert first == list(order)
    assert sorted(indices(order)) == list(range(20))
    order.set_epoch(1)
    second = list(order)
    assert [index for index, _ in second] != [index for index, _ in first]
    assert not {seed for _, seed in first} & {seed for _, seed in second}
    assert list(Order(20, 5, train=True, seed=1)) != first


@pytest.mark.parametrize(("count", "ranks"), [(20, 2), (23, 2), (23, 3)])
def test_processes_share_each_batch_of_one_with_larger_batches(on, count, ranks):
    on(0, 1)
    whole = list(Order(count, 4 * ranks, train=True))
    parts = []
    for rank in range(ranks):
        on(rank, ranks)
        order = Order(count, 4, train=True)
        parts.append(list(order))
        assert len(order) == len(parts[-1]) == count // (4 * ranks) * 4
    for batch in range(count // (4 * ranks)):
        together = {item for part in parts for item in part[4 * batch : 4 * batch + 4]}
        assert together == set(whole[4 * ranks * batch : 4 * ranks * (batch + 1)])


def test_measuring_meets_every_item_once_though_processes_get_different_numbers(on):
    met = []
    for rank in range(3):
        on(rank, 3)
        order = Order(10, 4, train=False)
        assert len(order) == len(indices(order))
        met += indices(order)
    assert sorted(met) == list(range(10))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_in_the_middle_of_an_epoch(workers):
    items, again = (loader(Items(22), 4, train=True, workers=workers) for _ in range(2))
    epochs = []
    for epoch in range(2):
        items.sampler.set_epoch(epoch)
        epochs.append([[column.tolist() for column in batch] for batch in items])
        assert items.state_dict() == {"epoch": epoch, "batches": 5, "together": 4}
    items.sampler.set_epoch(1)
    there = iter(items)
    next(there), next(there)
    again.load_state_dict(items.state_dict())
    assert items.state_dict() == {"epoch": 1, "batches": 2, "together": 4}
    again.sampler.set_epoch(1)
    assert [[column.tolist() for column in batch] for batch in again] == epochs[1][2:]
    assert again.state_dict() == {"epoch": 1, "batches": 5, "together": 4}
    again.sampler.set_epoch(0)
    assert [[column.tolist() for column in batch] for batch in again] == epochs[0]


def test_batches_of_another_size_do_not_go_on_in_the_middle_of_an_epoch(on):
    state = {"epoch": 1, "batches": 2, "together": 8}
    on(1, 2)
    items = loader(Items(22), 4, train=True)  # together as large
    items.load_state_dict(state)
    assert items.sampler.skipped == (1, 2)
    items = loader(Items(22), 3, train=True)
    with pytest.raises(DataError, match=r"`batch_size` times the number of processes must be 8, .*; got 6"):
        items.load_state_dict(state)
    items.load_state_dict(state | {"batches": 0})


def test_loading_leaves_the_draws_of_training_alone():
    seed_all(3)
    want = random.random(), np.random.rand(), torch.rand(()).item()
    seed_all(3)
    first, second = Drawn(Items(8)).__getitems__([(0, 11), (1, 12)])
    assert first[1:] != second[1:]
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == want


def test_too_few_items_to_train_on_are_refused(on):
    on(0, 2)
    with pytest.raises(ValueError, match=r"`batch_size` must be at most 3, for 7 items .* of 2 process.*; got 4"):
        loader(Items(7), 4, train=True)
