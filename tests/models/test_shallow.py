"""The shallow network: what one of its positions can see."""

import pytest
import torch

from involution.models.shallow import Shallow


@pytest.mark.parametrize("layer", ["involution", "convolution"])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_a_position_sees_as_far_as_is_said(layer, kernel_size):
    net = Shallow(layer, kernel_size).double().eval()
    x = torch.randn(1, 1, 3, 201, dtype=torch.float64, requires_grad=True)
    features = net.stem(x)
    for block in net.blocks:
        features = torch.relu(features + block(features))
    features[0, :, 0, features.shape[3] // 2].sum().backward()
    columns = x.grad.abs().amax((0, 1, 2)).nonzero().flatten()
    seen = int(columns[-1] - columns[0]) + 1
    assert seen == 7 + 8 * (kernel_size - 1)


def test_an_unknown_layer_is_refused():
    with pytest.raises(ValueError, match="`layer` must be 'involution' or 'convolution'; got 'attention'"):
        Shallow("attention")
