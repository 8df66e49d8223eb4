"""Statistics and colours of kernels, held to cases with known answers."""

import pytest
import torch

from involution.show.measures import colours, groups


def test_a_kernel_that_never_changes() -> None:
    kernel = torch.zeros(2, 3, 3, 4, 5)
    kernel[0, 1, 1] = 2.0  # the centre alone
    kernel[1] = -1.0
    first, second = groups(kernel, dilation=(2, 2))
    assert (first.group, first.mean_sum, first.sum_deviation, first.variation, first.reach) == (0, 2.0, 0.0, 0.0, 0.0)
    assert (second.mean_sum, second.variation) == (-9.0, 0.0)
    assert second.reach == pytest.approx(2 * (4 + 4 * 2**0.5) / 9)


def test_a_kernel_that_is_now_this_now_that() -> None:
    kernel = torch.zeros(1, 1, 3, 1, 4)
    kernel[0, 0, 1] = torch.tensor([1.0, 3.0, 1.0, 3.0])
    kernel[0, 0, 2, 0, 3] = 4.0
    (found,) = groups(kernel)
    assert found.mean_sum == 3.0
    assert found.sum_deviation == pytest.approx(torch.tensor([1.0, 3.0, 1.0, 7.0]).std(correction=0).item())
    assert found.variation == pytest.approx((16 / 12) ** 0.5 / (5 / 3) ** 0.5)
    assert found.reach == pytest.approx(4 / 12)


def test_like_kernels_have_like_colours() -> None:
    torch.manual_seed(0)
    kinds = torch.randn(3, 2, 5, 5)
    place = torch.randint(3, (6, 7))
    found, shares = colours(kinds[place].permute(2, 3, 4, 0, 1))
    assert found.shape == (6, 7, 3)
    assert 0 <= found.min() <= found.max() <= 1
    for kind in range(3):
        own = found[place == kind]
        torch.testing.assert_close(own, own[:1].expand_as(own), rtol=0, atol=1e-9)
    assert (found[place == 0][0] - found[place == 1][0]).abs().max() > 0.5
    assert sum(shares[:2]) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(1, 3, 3, 1, 1), (1, 1, 1, 2, 1), (2, 3, 3, 4, 4)])
def test_colours_of_few_positions_or_equal_kernels_are_numbers(shape: tuple[int, ...]) -> None:
    found, shares = colours(torch.ones(shape))
    assert found.isfinite().all()
    assert all(0 <= share <= 1 for share in shares)
