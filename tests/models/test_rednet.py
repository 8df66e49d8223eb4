"""RedNet: the paper's counts, timm's contract, and what an argument that does not fit is told."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models import load_checkpoint
from timm.models.resnet import Bottleneck as ResNetBottleneck
from timm.models.resnet import ResNet
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from involution.models import RedNet, mirrored_resnet
from involution.models.recompute import recomputes
from involution.models.rednet import Bottleneck
from involution.nn import Involution2d
from involution.ops import cpu

SLIM = {"base_width": 16, "stem_width": 32, "num_classes": 10}
REDUCTIONS = {32: [2, 4, 8, 16, 32], 16: [2, 4, 8, 16, 16], 8: [2, 4, 8, 8, 8]}


def slim(name: str = "rednet26", **kwargs: Any) -> RedNet:
    torch.manual_seed(0)
    return timm.create_model(name, **(SLIM | kwargs))


def lived_in(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` in evaluation mode, with norms as if trained on `x`: no branch is zero, and no value of `x` runs away."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def shallow(x: Tensor) -> nn.Module:
    """A block a stage, for what takes long."""
    torch.manual_seed(0)
    return lived_in(RedNet((1, 1, 1, 1), **SLIM), x)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module) -> float:
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() / 2


# The paper's counts


@pytest.mark.parametrize(
    ("depth", "parameters", "parameters_7", "operations", "mirrored"),
    [
        (26, 9_233_166, 9_233_886, 1_685_176_832, 13_696_552),
        (38, 12_386_986, 12_387_706, 2_166_841_344, 19_626_792),
        (50, 15_540_806, 15_541_526, 2_648_505_856, 25_557_032),
        (101, 25_652_950, 25_653_670, 4_659_008_000, 44_549_160),
        (152, 33_984_582, 33_985_302, 6_679_344_640, 60_192_808),
    ],
)
def test_counts(depth: int, parameters: int, parameters_7: int, operations: int, mirrored: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"rednet{depth}")
        assert count(model) == parameters
        assert macs(model) == operations
        assert count(timm.create_model(f"rednet{depth}", stem_kernel=7)) == parameters_7
        assert count(mirrored_resnet(depth)) == mirrored


def test_operations_with_the_wide_stem() -> None:
    with torch.device("meta"):
        assert macs(timm.create_model("rednet26", stem_kernel=7)) == 1_709_261_312


# Initialisation


def test_initialisation() -> None:
    model = slim(base_width=64, num_classes=1000)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.2)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            assert not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert not module.bias.any()
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    zero = {name for name, module in norms.items() if not module.weight.any()}
    assert zero == {name for name in norms if name.startswith("layer") and name.endswith("bn3")}
    assert all((module.weight == 1).all() for name, module in norms.items() if name not in zero)


def test_blocks_need_not_start_as_shortcuts() -> None:
    assert all((block.bn3.weight == 1).all() for block in slim(zero_init_last=False).layer3)


# timm's contract


def test_registered() -> None:
    assert timm.list_models("rednet*") == ["rednet26", "rednet38", "rednet50", "rednet101", "rednet152"]
    assert timm.list_models(module="rednet", pretrained=True) == []


def test_data_configuration() -> None:
    config = timm.data.resolve_model_data_config(slim())
    assert config == {
        "input_size": (3, 224, 224),
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 0.875,
        "crop_mode": "center",
    }


def test_no_pretrained_weights_are_promised() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for rednet26"):
        slim(pretrained=True)


@pytest.mark.parametrize("stem", ["involution", "convolution"])
@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_features_only(output_stride: int, stem: str) -> None:
    model = slim(features_only=True, output_stride=output_stride, stem=stem)
    assert model.feature_info.reduction() == REDUCTIONS[output_stride]
    assert model.feature_info.channels() == [32, 64, 128, 256, 512]
    maps = model(torch.randn(1, 3, 64, 96))
    expected = [
        (1, channels, 64 // reduction, 96 // reduction)
        for channels, reduction in zip([32, 64, 128, 256, 512], REDUCTIONS[output_stride], strict=True)
    ]
    assert [tuple(m.shape) for m in maps] == expected


def test_features_only_is_the_same_network() -> None:
    x = torch.randn(1, 3, 64, 64)
    model, features = lived_in(slim(), x), slim(features_only=True).eval()
    assert features.load_state_dict(model.state_dict(), strict=False).missing_keys == []
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(features(x), maps, rtol=0, atol=0)
    torch.testing.assert_close(model.forward_features(x), last, rtol=0, atol=0)
    torch.testing.assert_close(maps[-1], last, rtol=0, atol=0)


def test_forward_intermediates() -> None:
    model, x, ran = slim().eval(), torch.randn(1, 3, 64, 64), []
    everything = model.forward_intermediates(x, intermediates_only=True)
    assert len(everything) == 5
    model.layer4.register_forward_hook(lambda *_: ran.append("layer4"))
    some = model.forward_intermediates(x, indices=[0, -2], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(some, [everything[0], everything[3]], rtol=0, atol=0)
    assert ran == []
    torch.testing.assert_close(model.forward_intermediates(x, indices=2)[1], everything[3:], rtol=0, atol=0)
    assert ran == ["layer4"]
    with pytest.raises(ValueError, match=r"`output_fmt` must be 'NCHW'; got 'NLC'\."):
        model.forward_intermediates(x, output_fmt="NLC")


def test_head() -> None:
    model, x = slim(drop_rate=0.5), torch.randn(2, 3, 32, 32)
    assert (model.num_features, model.head_hidden_size) == (512, 512)
    assert model.get_classifier() is model.fc
    features = model.eval().forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model.fc(pooled), model(x), rtol=0, atol=0)
    dropped = model.train().forward_head(features, pre_logits=True)
    assert 0.3 < (dropped[pooled != 0] == 0).float().mean() < 0.7


def test_no_classes() -> None:
    model = slim(num_classes=0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    assert slim(num_classes=0, global_pool="")(torch.randn(2, 3, 64, 32)).shape == (2, 512, 2, 1)


def test_reset_classifier() -> None:
    model = slim().double()
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert (model.fc.weight.shape, model.fc.weight.dtype) == ((7, 512), torch.float64)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not model.fc.bias.any()
    assert model.global_pool.pool_type == "avg"
    model.reset_classifier(7, "catavgmax")
    assert model.head_hidden_size == 1024
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).shape == (2, 7)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)


def test_one_input_channel_takes_the_sum_of_the_weights_of_three(tmp_path: Any) -> None:
    source = slim()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    model = slim(in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model.stem.conv1.weight, source.stem.conv1.weight.sum(1, keepdim=True))
    torch.testing.assert_close(model.fc.weight, source.fc.weight, rtol=0, atol=0)
    assert model.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 10)


def test_pretrained_weights_lend_themselves_to_another_number_of_classes(tmp_path: Any) -> None:
    source = slim()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    model = slim(num_classes=4, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model.layer4[0].conv3.weight, source.layer4[0].conv3.weight, rtol=0, atol=0)
    assert model.fc.weight.shape == (4, 512)


def test_timm_checkpoint_round_trip(tmp_path: Any) -> None:
    x = torch.randn(2, 3, 32, 32)
    source = lived_in(slim(), x)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
    model = slim(zero_init_last=False)
    load_checkpoint(model, str(tmp_path / "weights.pth"))
    torch.testing.assert_close(model.eval()(x), source(x), rtol=0, atol=0)


def test_groups_for_layer_decay() -> None:
    model = slim()
    stem, *blocks, head = timm.models.group_parameters(model, model.group_matcher()).values()
    assert {name.split(".")[0] for name in stem} == {"stem"}
    assert [{".".join(name.split(".")[:2]) for name in names} for names in blocks] == [
        {f"layer{stage}.{block}"} for stage, depth in enumerate((1, 2, 4, 1), start=1) for block in range(depth)
    ]
    assert head == ["fc.weight", "fc.bias"]
    _, *stages, _ = timm.models.group_parameters(model, model.group_matcher(coarse=True)).values()
    assert [{name.split(".")[0] for name in names} for names in stages] == [{f"layer{stage}"} for stage in (1, 2, 3, 4)]


# Geometry


@pytest.mark.parametrize("size", [(7, 7), (13, 13), (97, 101), (333, 501)])
@pytest.mark.parametrize("output_stride", [32, 8])
def test_any_size(size: tuple[int, int], output_stride: int) -> None:
    model = slim(output_stride=output_stride).eval()
    _, maps = model.forward_intermediates(torch.randn(1, 3, *size))
    for feature_map, reduction in zip(maps, REDUCTIONS[output_stride], strict=True):
        assert feature_map.shape[2:] == tuple(-(-s // reduction) for s in size)


@pytest.mark.parametrize(
    ("output_stride", "stride", "dilation"),
    [(32, [1, 2, 2, 2], [1, 1, 1, 1]), (16, [1, 2, 2, 1], [1, 1, 1, 2]), (8, [1, 2, 1, 1], [1, 1, 2, 4])],
)
def test_dilation_in_place_of_stride(output_stride: int, stride: list[int], dilation: list[int]) -> None:
    model = slim("rednet50", output_stride=output_stride)
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    assert [stage[0].conv2.window.stride for stage in stages] == [(s, s) for s in stride]
    assert [stage[0].conv2.window.dilation for stage in stages] == [(d, d) for d in [1, *dilation[:-1]]]
    assert [stage[-1].conv2.window.dilation for stage in stages] == [(d, d) for d in dilation]
    assert all(block.conv2.window.stride == (1, 1) for stage in stages for block in stage[1:])


def test_a_dilated_block_computes_what_the_strided_one_does_between_its_positions() -> None:
    """Without the pooling of the strided generator, the strided net's map is the dilated net's at every other place."""
    x = torch.randn(1, 3, 64, 96)
    strided, dilated = lived_in(slim(), x), slim(output_stride=16).eval()
    dilated.load_state_dict(strided.state_dict())
    vars(strided.layer4[0].conv2.generator)["_pool"] = nn.AvgPool2d(1, 2)
    torch.testing.assert_close(dilated.forward_features(x)[..., ::2, ::2], strided.forward_features(x))


def test_arguments_reach_the_blocks_and_not_the_stem() -> None:
    model = slim(kernel_size=5, group_channels=8, reduction=2, stem_kernel=7)
    stem, block = model.stem.conv2, model.layer2[1].conv2
    assert (stem.window.kernel_size, stem.groups, stem.generator.reduce.out_channels) == ((7, 7), 1, 4)
    assert (block.window.kernel_size, block.groups, block.generator.reduce.out_channels) == ((5, 5), 4, 16)


def test_convolution_stem_is_that_of_resnet() -> None:
    stem, mirrored = slim(stem="convolution").stem, mirrored_resnet(26, base_width=16, stem_width=32)
    assert [str(layer) for layer in stem] == [str(mirrored.conv1), str(mirrored.bn1), str(mirrored.act1)]


# Training, compiling, exporting


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_every_parameter_gets_a_gradient() -> None:
    x = torch.randn(2, 3, 64, 64)
    for name, gradient in gradients(lived_in(slim(), x).train(), x).items():
        assert gradient.abs().max() > 0, name


def test_grad_checkpointing_changes_no_gradient() -> None:
    x = torch.randn(2, 3, 64, 64)
    model = shallow(x).train()
    expected, calls = gradients(model, x), []
    model.set_grad_checkpointing()
    model.layer2[0].register_forward_pre_hook(lambda *_: calls.append(1))
    actual = gradients(model, x)
    assert len(calls) == 2
    torch.testing.assert_close(actual, expected)
    assert model.forward_intermediates(x)[1][4].grad_fn is not None
    assert len(calls) == 3
    model.set_grad_checkpointing(False)
    gradients(model, x)
    assert len(calls) == 4


@pytest.mark.parametrize("stem", ["involution", "convolution"])
def test_stem_run_again_changes_memory_and_nothing_else(stem: str) -> None:
    """All that is kept inside the stem is its input and what its convolutions give."""
    x, results, kept = torch.randn(2, 3, 33, 64).to(memory_format=torch.channels_last), [], []
    for again in (False, True):
        model = slim(stem=stem, recompute_stem=again).train()
        given = {x.data_ptr()} | {parameter.data_ptr() for parameter in model.parameters()}
        others: dict[int, Tensor] = {}

        def keep(tensor: Tensor, given: set[int] = given, others: dict[int, Tensor] = others) -> Tensor:
            if tensor.data_ptr() not in given and tensor.numel():
                others[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = model._pooled_stem(x)
        kept.append([tuple(tensor.shape) for tensor in others.values()])
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.stem.parameters()), *model.stem.buffers()])
    widths = [16, 16, 32] if stem == "involution" else [32]
    assert kept[1] == [(2, width, 17, 32) for width in widths]
    assert len(kept[0]) >= 2 * len(widths)
    assert all(map(torch.equal, *results))
    assert model.stem.bn1.num_batches_tracked == 1
    assert model.stem.bn1.momentum == 0.1


def test_blocks_run_again_count_a_batch_once() -> None:
    x = torch.randn(2, 3, 64, 64)
    results = []
    for again in (False, True):
        model = shallow(x).train()
        model.set_grad_checkpointing(again)
        model(x).square().sum().backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["stem", "stem.bn2"])
def test_hooks_on_the_stem_see_it_once_in_training(name: str) -> None:
    model, seen = slim().train(), []
    model.get_submodule(name).register_forward_hook(lambda _, __, y: seen.append(y.shape[2:]))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert seen == [(16, 16)]


def test_backward_twice() -> None:
    """What is run again can be so as often as one likes, and derived again."""
    x, model = torch.randn(2, 3, 32, 32), slim().train()
    model.set_grad_checkpointing()
    y = model(x).square().mean()
    weight = model.stem.conv1.weight
    first, second = (torch.autograd.grad(y, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (third,) = torch.autograd.grad(y, weight, create_graph=True)
    (again,) = torch.autograd.grad(third.square().sum(), weight)
    assert again.abs().max() > 0
    assert model.stem.bn1.num_batches_tracked == 1


_CHANGES: dict[str, Callable[[RedNet], None]] = {
    "no pool": lambda model: setattr(model, "maxpool", nn.Identity()),
    "another pool": lambda model: setattr(model, "maxpool", nn.AvgPool2d(2)),
    "another stem": lambda model: setattr(model, "stem", _Wrapped(model.stem)),
    "compiled stem": lambda model: model.stem.compile(backend="eager"),
    "norms folded": lambda model: reparameterize_model(model.eval(), inplace=True),
    "synchronised norms": lambda model: setattr(model, "stem", nn.SyncBatchNorm.convert_sync_batchnorm(model.stem)),
    "group norms": lambda model: setattr(model.stem, "bn2", nn.GroupNorm(4, 16)),
    "running average over all batches": lambda model: setattr(model.stem.bn1, "momentum", None),
    "frozen": lambda model: model.stem.requires_grad_(False),
}


class _Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
def test_networks_that_were_changed_train_alike(change: Callable[[RedNet], None]) -> None:
    x, results = torch.randn(2, 3, 33, 32), []
    for again in (False, True):
        model = slim(recompute_stem=again)
        change(model)
        model.train()
        y = model._pooled_stem(x)
        (y * torch.linspace(0, 1, y.numel()).view(y.shape)).sum().requires_grad_().backward()
        results.append([y, *(p.grad for p in model.stem.parameters() if p.requires_grad), *model.stem.buffers()])
    assert all(map(torch.equal, *results))


def test_evaluation_mode_between_forward_and_backward() -> None:
    x, results = torch.randn(2, 3, 33, 32), []
    for again in (False, True):
        model = slim(recompute_stem=again).train()
        model.set_grad_checkpointing(again)
        loss = model(x).square().sum()
        model.eval()
        loss.backward()
        assert not any(module.training for module in model.modules())
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert all(map(torch.equal, *results))


def test_threads_that_train_one_network_leave_its_norms_whole() -> None:
    model, x = slim().train(), torch.randn(2, 3, 32, 32)

    def train(_: int) -> None:
        for _ in range(10):
            model(x).sum().backward()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(train, range(4)))
    assert {norm.momentum for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize("train", [False, True])
def test_traced_by_fx(train: bool) -> None:
    """Feature extractors of timm and torchvision do so."""
    x, model = torch.randn(2, 3, 33, 65), slim().train(train)
    traced = torch.fx.symbolic_trace(model).eval()
    torch.testing.assert_close(traced(x), model.eval()(x))
    slim_too = {"base_width": 16, "stem_width": 32}
    net = timm.create_model("rednet26", features_only=True, out_indices=(4,), feature_cls="fx", **slim_too).eval()
    assert net(x)[0].shape[2:] == model.forward_features(x).shape[2:]


def test_a_layer_alone_is_one_node_of_fx() -> None:
    with pytest.raises(TypeError, match=r"Involution2d is one node to torch\.fx; trace a network that holds it"):
        torch.fx.symbolic_trace(Involution2d(16))


def test_another_forward_of_the_stem_is_called_in_training() -> None:
    model, seen = slim().train(), []
    own = model.stem.forward
    model.stem.forward = lambda x: seen.append(x) or own(x)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(seen) == 1


def test_transforms_and_traces_of_training() -> None:
    """They cannot run layers again, and are not asked to."""
    x, seen = torch.randn(2, 3, 32, 32), []
    torch.func.grad(lambda x: seen.append(recomputes(x)) or x.sum())(x)
    assert seen == [False]
    assert recomputes(x)
    assert make_fx(slim().train())(x).graph.nodes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("folded", [False, True])
@torch.no_grad()
def test_what_is_done_at_once_is_what_torch_does_in_turn(
    layout: torch.memory_format, folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, calls = torch.randn(2, 3, 64, 64, dtype=torch.double).to(memory_format=layout), []
    net = lived_in(timm.create_model("rednet26", base_width=16, stem_width=32).double(), x)
    net = reparameterize_model(net) if folded else net
    for name in ("follow", "pointwise"):
        original = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, f=original, n=name: calls.append(n) or f(*args))
    found = net(x)
    served = cpu.available()
    monkeypatch.setattr(cpu, "available", lambda: False)
    torch.testing.assert_close(found, net(x), rtol=1e-12, atol=1e-12)
    # two products in eight blocks and, in four of them, that of the shortcut; norms of the stem's two convolutions
    wanted = ["follow"] * (0 if folded else 2) + ["pointwise"] * 20
    assert sorted(calls) == (wanted if served else [])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stem", ["involution", "convolution"])
def test_images_of_any_layout_run_with_channels_innermost(channels: int, stem: str) -> None:
    """Also those of one channel, whose layout torch cannot tell."""
    x, nets = torch.randn(2, channels, 33, 65), []
    for layout in (torch.contiguous_format, torch.channels_last):
        net, images = slim(in_chans=channels, stem=stem).train(), x.to(memory_format=layout)
        strides = images.stride()
        maps = net.forward_intermediates(images, intermediates_only=True)
        assert all(y.is_contiguous(memory_format=torch.channels_last) for y in maps)
        sum(y.square().sum() for y in maps).backward()
        nets.append([*maps, *(p.grad for p in net.parameters() if p.grad is not None)])
        assert images.stride() == strides
    assert all(map(torch.equal, *nets))


@torch.no_grad()
def test_batches_of_transforms_keep_their_layout() -> None:
    """They have no layout that could be asked for."""
    x = torch.randn(3, 3, 33, 65, dtype=torch.double)
    net = lived_in(slim().double(), x)
    torch.testing.assert_close(torch.func.vmap(lambda image: net(image[None])[0])(x), net(x))


def test_subclasses_of_tensors_keep_their_layout() -> None:
    class Other(Tensor):
        pass

    x, net, seen = torch.randn(1, 3, 33, 65).as_subclass(Other), slim(), []
    net.stem.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(x)
    assert seen[0] is x


@torch.no_grad()
def test_hooks_keep_what_they_saw() -> None:
    """A hook at a time, on each of the modules: what is done at once elsewhere must not reach it."""
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    net = lived_in(slim(), x)
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):  # changed by the activation behind, in place, as in every network
            continue
        seen: list[Tensor] = []
        handle = module.register_forward_hook(lambda *args, seen=seen: seen.extend((args[2], args[2].clone())))
        net(x)
        handle.remove()
        assert torch.equal(seen[0], seen[1]), name


@pytest.mark.usefixtures("fresh_compiler")
def test_training_compiles_to_one_graph() -> None:
    x = torch.randn(2, 3, 32, 32)
    model = shallow(x).train()
    expected = gradients(model, x)
    actual = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    for (name, gradient), right in zip(actual.items(), expected.values(), strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()), msg=name)


def test_exported_program_is_equal() -> None:
    x = torch.randn(1, 3, 33, 65)
    model = shallow(x)
    exported = torch.export.export(model, (x,))
    assert any(node.target is torch.ops.involution.generated.default for node in exported.graph.nodes)
    assert not any("memory_format" in node.kwargs for node in exported.graph.nodes)  # layouts are for who runs it
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_to_one_graph() -> None:
    x = torch.randn(1, 3, 33, 65)
    model = shallow(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compiled(x.bfloat16()), model(x.bfloat16()))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_rednet50_compiles_to_an_equal_program() -> None:
    """In float64: 50 layers, each cubic in its input, make 1e-4 of float32's rounding, which hides small faults."""
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    model = lived_in(timm.create_model("rednet50").double(), x)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=0, atol=1e-9)


# The mirrored ResNet


@pytest.mark.parametrize("stem", ["involution", "convolution"])
def test_norms_fold_into_convolutions(stem: str) -> None:
    x = torch.randn(2, 3, 65, 65, dtype=torch.double)
    net = lived_in(slim(stem=stem).double(), x)
    folded = reparameterize_model(net)
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    involutions = [name for name, module in net.named_modules() if isinstance(module, Involution2d)]
    assert left == [name.replace("conv2", "bn2") for name in involutions]  # no convolution to fold into
    torch.testing.assert_close(folded(x), net(x), rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="`module` must be in evaluation mode"):
        reparameterize_model(net.train())


_UNFOLDABLE: dict[str, Callable[[Involution2d], Any]] = {
    "norm with an activation": lambda layer: setattr(layer.generator, "norm", BatchNormAct2d(4)),
    "hook on the norm": lambda layer: layer.generator.norm.register_forward_hook(lambda *_: _[2].square()),
    "hook on the convolution": lambda layer: layer.generator.reduce.register_forward_hook(lambda *_: _[2].square()),
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer.generator.reduce),
}


@pytest.mark.parametrize("change", _UNFOLDABLE.values(), ids=_UNFOLDABLE)
def test_norms_that_do_not_fold(change: Callable[[Involution2d], Any]) -> None:
    layer, x = Involution2d(16, 3, act=nn.Identity), torch.randn(2, 16, 9, 9)
    change(layer)
    layer(x)
    torch.testing.assert_close(reparameterize_model(layer.eval())(x), layer(x))


@pytest.mark.parametrize(("base_width", "stem_width"), [(64, 64), (16, 32)])
def test_mirror_has_the_same_skeleton(base_width: int, stem_width: int) -> None:
    """Away from the 3x3 convolutions and the involutions, both nets have the same parameters."""
    with torch.device("meta"):
        rednet = timm.create_model("rednet38", base_width=base_width, stem_width=stem_width, stem="convolution")
        mirror = mirrored_resnet(38, base_width, stem_width)
    ours = {key.removeprefix("stem."): p.shape for key, p in rednet.named_parameters() if ".conv2." not in key}
    assert ours == {key: p.shape for key, p in mirror.named_parameters() if ".conv2." not in key}
    involutions = [block.conv2 for block in rednet.modules() if isinstance(block, Bottleneck)]
    convolutions = [block.conv2 for block in mirror.modules() if isinstance(block, ResNetBottleneck)]
    assert [(layer.channels, layer.window.stride) for layer in involutions] == [
        (layer.in_channels, layer.stride) for layer in convolutions
    ]


def test_mirror_is_the_resnet_of_timm() -> None:
    mirror = mirrored_resnet(26, base_width=16, num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    resnet = lived_in(ResNet(ResNetBottleneck, (1, 2, 4, 1), num_classes=10, channels=(16, 32, 64, 128)), x)
    mirror.load_state_dict(resnet.state_dict())
    torch.testing.assert_close(mirror(x), resnet(x), rtol=0, atol=0)


def test_mirror_is_initialised_alike() -> None:
    mirror = mirrored_resnet(26, in_chans=1)
    assert mirror.conv1.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.1)
    assert mirror.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert all(not stage[0].bn3.weight.any() for stage in (mirror.layer1, mirror.layer4))


# What an argument that does not fit is told


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"stem": "deep"}, ValueError, r"`stem` must be 'involution' or 'convolution'; got 'deep'\."),
        ({"output_stride": 4}, ValueError, r"`output_stride` must be 8, 16 or 32; got 4\."),
        (
            {"stem_width": 48},
            ValueError,
            r"`stem_width` must be a multiple of 32 .* got 48\. Choose 64, or `stem` 'conv",
        ),
        ({"num_classes": 2.5}, TypeError, r"`num_classes` must be an int; got 2\.5\."),
        ({"num_classes": "10"}, TypeError, r"`num_classes` must be an int; got '10'\."),
        ({"num_classes": -1}, ValueError, r"`num_classes` must be at least 0, where 0 leaves .* out; got -1\."),
        ({"in_chans": "3"}, TypeError, r"`in_chans` must be an int; got '3'\."),
        ({"in_chans": 0}, ValueError, r"`in_chans` must be at least 1; got 0\."),
        ({"drop_rate": 2.0}, ValueError, r"`drop_rate` must be a number from 0 to 1; got 2\.0\."),
        ({"drop_rate": "0.5"}, ValueError, r"`drop_rate` must be a number from 0 to 1; got '0\.5'\."),
        ({"global_pool": "bad"}, ValueError, r"`global_pool` must be one of 'avg', .*, 'catavgmax', ''; got 'bad'\."),
        ({"stem_width": 0}, ValueError, r"`stem_width` must be at least 1; got 0\."),
        ({"base_width": 16.0}, TypeError, r"`base_width` must be an int; got 16\.0\."),
        ({"base_width": 24}, ValueError, r"`group_channels` must divide the channels; got group_channels 16 and 24 ch"),
        ({"kernel_size": 4}, ValueError, r"`kernel_size` must be odd, so that the involution keeps the size; got 4\."),
        ({"kernel_size": "7"}, TypeError, r"`kernel_size` must be an int; got '7'\."),
        ({"stem_kernel": 2}, ValueError, r"`stem_kernel` must be odd, .* got 2\."),
        ({"group_channels": 5}, ValueError, r"`group_channels` must divide the channels; got group_channels 5 and 16"),
        (
            {"groups": 3},
            ValueError,
            r"`groups` must divide the channels; got groups 3 and 16 channels\. Choose from 1,",
        ),
        ({"groups": 1, "group_channels": 4}, ValueError, r"give `groups` or `group_channels`, not both; got 1 and 4\."),
        ({"reduction": 3}, ValueError, r"`reduction` must divide the channels; got reduction 3 and 16 channels\."),
    ],
)
def test_errors(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        slim(**kwargs)


def test_sizes_may_be_of_numpy() -> None:
    model = slim(num_classes=np.int64(10), base_width=np.int32(16), kernel_size=np.int64(3))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_reset_classifier_errors() -> None:
    model = slim()
    with pytest.raises(ValueError, match=r"`num_classes` must be at least 0, .*; got -1\."):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match=r"`global_pool` must be one of .*; got 'bad'\."):
        model.reset_classifier(10, "bad")


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 32, 32), ValueError, r"of shape \(B, 3, H, W\); got \(3, 32, 32\)\. Reshape them"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"of shape \(B, 3, H, W\); got \(1, 1, 32, 32\)\. .* `in_chans`\."),
        (torch.zeros(1, 3, 32, 32).byte(), TypeError, r"dtype, torch\.float32; got torch\.uint8\. Convert and scale"),
        (torch.zeros(1, 3, 32, 32).double(), TypeError, r"dtype, torch\.float32; got torch\.float64\. Convert one"),
        (torch.zeros(1, 3, 32, 32).bfloat16(), TypeError, r"dtype, torch\.float32; got torch\.bfloat16\. Convert one"),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, r"device, cpu; got meta\. Move one of them\."),
    ],
)
def test_images_that_do_not_fit(x: Tensor, error: type[Exception], message: str, features_only: bool) -> None:
    with pytest.raises(error, match=rf"`x` must be .*{message}"):
        slim(features_only=features_only)(x)


def test_autocast_takes_images_of_every_dtype_it_converts() -> None:
    model = slim().eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.zeros(1, 3, 32, 32).bfloat16()).dtype == torch.bfloat16
        assert model(torch.zeros(1, 3, 32, 32)).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"dtype, torch\.float32; got torch\.float64\. Convert one of them\."):
            model(torch.zeros(1, 3, 32, 32).double())


def test_layers_error() -> None:
    with pytest.raises(ValueError, match=r"`layers` must have one entry for each of the 4 stages; got \(1, 2, 4\)\."):
        RedNet((1, 2, 4))


def test_mirror_errors() -> None:
    with pytest.raises(ValueError, match=r"`depth` must be one of 26, 38, 50, 101, 152; got 18\."):
        mirrored_resnet(18)
    with pytest.raises(ValueError, match=r"`stem_width` must be even; got 33\."):
        mirrored_resnet(26, stem_width=33)


@torch.no_grad()
def test_parts_of_the_stem_run_without_what_follows() -> None:
    stem, x = (
        timm.create_model("rednet26", base_width=16, stem_width=32, num_classes=3).eval().stem,
        torch.randn(1, 3, 33, 35),
    )
    for count in range(1, len(stem) + 1):
        expected = x
        for layer in stem[:count].children():
            expected = layer(expected)
        torch.testing.assert_close(stem[:count](x), expected)


def test_a_network_infers_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, filled = (
        timm.create_model("rednet26", base_width=16, stem_width=32, num_classes=3).eval(),
        torch.randn(2, 3, 65, 47),
        [],
    )
    original = cpu.layer
    monkeypatch.setattr(cpu, "layer", lambda out, *rest: filled.append(out.shape) or original(out, *rest))
    expected = model(x)  # with derivatives, and so part by part
    assert not filled
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert len(filled) == sum(isinstance(m, Involution2d) for m in model.modules())
