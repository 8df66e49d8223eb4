"""Involutions in place of convolutions: the same sizes, the counts of RedNet, and why some stay."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

import involution.models  # noqa: F401  # registers the RedNets with timm
from involution import Involution2d, cost, replace_convs


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_resnet50_becomes_rednet50() -> None:
    with torch.device("meta"):
        net, red = timm.create_model("resnet50"), timm.create_model("rednet50")
        image = torch.empty(1, 3, 224, 224)
    net.train()
    report = replace_convs(net, where=lambda name, conv: name.startswith("layer"), image=image)
    assert all(module.training for module in net.modules())
    stems = count(net.conv1) + count(net.bn1), count(red.stem)
    assert count(net) - stems[0] == count(red) - stems[1]
    assert len(report.replaced) == 16
    assert not report.skipped
    assert report.parameters == (25_557_032, count(net))
    with torch.device("meta"):
        mixed = timm.create_model("rednet50", stem="convolution").eval()
    assert report.macs == (4_089_184_256, cost.macs(mixed, image))
    assert "parameters: 25,557,032 before, 15,530,356 after (-39.2%)" in str(report)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 16, 3),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.Conv2d(32, 16, 5, (1, 3), (2, 0), bias=False),
        nn.Conv2d(16, 16, (3, 1), padding="same", dilation=2),
        nn.Conv2d(16, 16, 3, padding="valid", groups=16),
        nn.Conv1d(16, 16, 5, 2, 1),
        nn.Conv3d(16, 16, 3, 2, 1),
    ],
    ids=str,
)
def test_the_output_keeps_its_size(conv: nn.Module) -> None:
    net = nn.Sequential(conv).eval()
    x = torch.randn(1, conv.in_channels, *[13, 12, 11][: len(conv.kernel_size)])
    shape = net(x).shape
    report = replace_convs(net, kernel_size=5)
    assert list(report.replaced) == ["0"]
    assert net(x).shape == shape
    assert not net[0].training


def test_what_stays_and_why() -> None:
    net = nn.ModuleDict(
        {
            "pointwise": nn.Conv2d(16, 16, 1),
            "transposed": nn.ConvTranspose2d(16, 16, 3),
            "even": nn.Conv2d(16, 16, 4),
            "large": nn.Conv2d(16, 16, 11),
            "colours": nn.Conv2d(3, 16, 3),
            "mirrored": nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        }
    )
    before = dict(net.items())
    report = replace_convs(net)
    assert report.skipped == {
        "transposed": "it is a ConvTranspose2d",
        "even": "its kernel size (4, 4) is even",
        "large": "its kernel size (11, 11) is larger than 7",
        "colours": "`group_channels` must divide the channels; got group_channels 16 and 3 channels. Choose from 1, 3",
        "mirrored": "its padding mode is 'reflect'",
    }
    assert dict(net.items()) == before
    assert replace_convs(net, groups=5).skipped["colours"].startswith("`groups` must divide the channels; got groups 5")
    assert replace_convs(net, groups=1).skipped["colours"].startswith("`reduction` must divide the channels")
    assert replace_convs(net, groups=None).skipped["colours"].startswith("`group_channels` must divide")
    assert list(replace_convs(net, group_channels=1, reduction=1).replaced) == ["colours"]


def test_settings_reach_the_layer_and_devices_stay() -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).to("meta", torch.bfloat16)
    replace_convs(net, kernel_size=3, group_channels=4, generator="linear")
    assert isinstance(net[0], Involution2d)
    assert (net[0].groups, net[0].window.kernel_size) == (4, (3, 3))
    assert {(p.device.type, p.dtype) for p in net.parameters()} == {("meta", torch.bfloat16)}


def test_a_shared_convolution_stays_shared() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    net = nn.ModuleList([conv, nn.Sequential(conv)])
    assert list(replace_convs(net).replaced) == ["0", "1.0"]
    assert net[0] is net[1][0]


def test_a_parametrised_convolution_is_not_taken_for_a_plain_one() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3)))
    assert list(replace_convs(net).skipped) == ["0"]
    assert parametrize.is_parametrized(net[0])


def test_a_convolution_under_two_names_is_replaced_under_both() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    net = nn.Sequential(conv, nn.ReLU(), conv)
    assert list(replace_convs(net).replaced) == ["0", "2"]
    assert net[0] is net[2]
    assert isinstance(net[2], Involution2d)


def test_valid_padding_may_have_a_stride() -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 3, stride=2, padding="valid"))
    shape = net(torch.ones(1, 16, 11, 12)).shape
    assert list(replace_convs(net).replaced) == ["0"]
    assert net(torch.ones(1, 16, 11, 12)).shape == shape


def test_a_generator_without_reduction_needs_no_division() -> None:
    net = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1))
    assert list(replace_convs(net, group_channels=2, generator="linear").replaced) == ["0"]


def test_generators_keep_their_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    replace_convs(net, generator="neighbourhood", reduction=1)
    before = count(net)
    assert replace_convs(net, generator="linear").replaced == {}
    assert count(net) == before


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"kernel_size": 4}, ValueError, "`kernel_size` must be odd, so that windows keep their centres; got 4"),
        ({"kernel_size": -1}, ValueError, "`kernel_size` must be at least 1; got -1"),
        ({"kernel_size": "7"}, TypeError, "`kernel_size` must be an int; got '7'"),
        ({"kernel_size": (7, 7)}, TypeError, r"`kernel_size` must be an int; got \(7, 7\)"),
        ({"groups": 0}, ValueError, "`groups` must be at least 1; got 0"),
        ({"group_channels": 0}, ValueError, "`group_channels` must be at least 1; got 0"),
        ({"reduction": 0}, ValueError, "`reduction` must be at least 1; got 0"),
        ({"stride": 2}, TypeError, "`stride` is that of each convolution; got 2. Leave it out"),
        ({"norm": nn.ReLU()}, TypeError, "`norm` must be what makes a module"),
    ],
    ids=str,
)
def test_settings_that_fit_no_layer_change_nothing(settings, error, message) -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    before = list(net)
    with pytest.raises(error, match=message):
        replace_convs(net, **settings)
    assert list(net) == before


def test_a_network_keeps_its_mode_when_the_image_does_not_fit() -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 3)).train()
    with pytest.raises(RuntimeError, match="channels"):
        replace_convs(net, image=torch.ones(1, 3, 8, 8))
    assert net[0].training
    assert isinstance(net[0], nn.Conv2d)


def test_a_convolution_alone_cannot_be_replaced() -> None:
    with pytest.raises(ValueError, match="`network` is itself a convolution"):
        replace_convs(nn.Conv2d(16, 16, 3))
