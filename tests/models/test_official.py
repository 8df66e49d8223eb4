"""Official detectors and segmentors: their layers written down again under their names, and run beside ours."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from involution.cli import main
from involution.models.stages import Stages
from involution.recognition import network_of
from involution.weights import load_official, read

BACKBONE = Path(__file__).parents[1] / "golden" / "rednet26_slim_det.pth"
STAGES = (64, 128, 256, 512)
WIDTH, CLASSES = 32, 11


class Conv(nn.Module):
    """ConvModule of mmcv."""

    def __init__(self, source: int, target: int, size: int, norm: bool = False, act: bool = False, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(source, target, size, stride, size // 2, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(target)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x) if hasattr(self, "bn") else x
        return x.relu() if self.act else x


class Inv(nn.Module):
    """involution_naive.py of the authors, K 7."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = channels // 16
        self.conv1 = Conv(channels, channels // 4, 1, norm=True, act=True)
        self.conv2 = Conv(channels // 4, 49 * self.groups, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weight = self.conv2(self.conv1(x)).view(b, self.groups, 1, 49, h, w)
        patches = F.unfold(x, 7, padding=3).view(b, self.groups, 16, 49, h, w)
        return (weight * patches).sum(3).view(b, c, h, w)


class Neck(nn.Module):
    def __init__(self, first: int, involution: bool, extra: int) -> None:
        super().__init__()
        self.first = first
        self.lateral_convs = nn.ModuleList(Conv(c, WIDTH, 1) for c in STAGES[first:])
        self.fpn_convs = nn.ModuleList(Inv(WIDTH) if involution else Conv(WIDTH, WIDTH, 3) for _ in self.lateral_convs)
        self.fpn_convs.extend(Conv(STAGES[-1] if i == 0 else WIDTH, WIDTH, 3, stride=2) for i in range(extra))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = maps[self.first :]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[2:])
        levels = [self.fpn_convs[i](x) for i, x in enumerate(laterals)]
        above = maps[-1]
        for conv in self.fpn_convs[len(laterals) :]:
            above = conv(above)
            levels.append(above)
        return levels


class RPN(nn.Module):
    def __init__(self, involution: bool) -> None:
        super().__init__()
        self.rpn_conv = Inv(WIDTH) if involution else nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.rpn_cls, self.rpn_reg = nn.Conv2d(WIDTH, 3, 1), nn.Conv2d(WIDTH, 12, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.rpn_conv(x).relu()
        return self.rpn_cls(x), self.rpn_reg(x)


class Boxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared_fcs = nn.ModuleList([nn.Linear(WIDTH * 49, 40), nn.Linear(40, 40)])
        self.fc_cls, self.fc_reg = nn.Linear(40, CLASSES + 1), nn.Linear(40, 4 * CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = layer(x).relu()
        return self.fc_cls(x), self.fc_reg(x)


class Masks(nn.Module):
    def __init__(self, involution: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(Inv(WIDTH), nn.ReLU()) if involution else Conv(WIDTH, WIDTH, 3, act=True) for _ in range(4)
        )
        self.upsample = nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2)
        self.conv_logits = nn.Conv2d(WIDTH, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return self.conv_logits(self.upsample(x).relu())


class Retina(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_convs, self.reg_convs = (
            nn.ModuleList(Conv(WIDTH, WIDTH, 3, act=True) for _ in range(4)) for _ in range(2)
        )
        self.retina_cls = nn.Conv2d(WIDTH, 9 * CLASSES, 3, padding=1)
        self.retina_reg = nn.Conv2d(WIDTH, 36, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.retina_cls(run(self.cls_convs, x)), self.retina_reg(run(self.reg_convs, x))


class SemanticFPN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        half, double = WIDTH // 2, nn.Upsample(scale_factor=2, mode="bilinear")
        self.scale_heads = nn.ModuleList([nn.Sequential(Conv(WIDTH, half, 3, True, True))])
        for i in (1, 2, 3):
            convs = [Conv(half if j else WIDTH, half, 3, True, True) for j in range(i)]
            self.scale_heads.append(nn.Sequential(*(layer for conv in convs for layer in (conv, double))))
        self.conv_seg = nn.Conv2d(half, CLASSES, 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        total = self.scale_heads[0](levels[0])
        for head, level in zip(self.scale_heads[1:], levels[1:], strict=True):
            total = total + resize(head(level), total.shape[2:])
        return self.conv_seg(total)


class UPer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pools = [[nn.AdaptiveAvgPool2d(s), Conv(STAGES[-1], WIDTH, 1, True, True)] for s in (1, 2, 3, 6)]
        self.psp_modules = nn.ModuleList(nn.Sequential(*pool) for pool in pools)
        self.bottleneck = Conv(STAGES[-1] + 4 * WIDTH, WIDTH, 3, True, True)
        self.lateral_convs = nn.ModuleList(Conv(c, WIDTH, 1, True, True) for c in STAGES[:-1])
        self.fpn_convs = nn.ModuleList(Conv(WIDTH, WIDTH, 3, True, True) for _ in STAGES[:-1])
        self.fpn_bottleneck = Conv(4 * WIDTH, WIDTH, 3, True, True)
        self.conv_seg = nn.Conv2d(WIDTH, CLASSES, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        top = maps[-1]
        pooled = [resize(module(top), top.shape[2:]) for module in self.psp_modules]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=False)]
        laterals.append(self.bottleneck(torch.cat([top, *pooled], 1)))
        for i in (3, 2, 1):
            laterals[i - 1] = laterals[i - 1] + resize(laterals[i], laterals[i - 1].shape[2:])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=False)] + [laterals[-1]]
        levels = [resize(x, levels[0].shape[2:]) for x in levels]
        return self.conv_seg(self.fpn_bottleneck(torch.cat(levels, 1)))


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(Conv(STAGES[2], WIDTH // 2, 3, True, True))
        self.conv_seg = nn.Conv2d(WIDTH // 2, CLASSES, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.conv_seg(self.convs(maps[2]))


def run(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def theirs(kind: str, neck: bool, head: bool) -> nn.ModuleDict:
    """All around the backbone, under their names, with statistics that tell one norm from another."""
    torch.manual_seed(0)
    parts = nn.ModuleDict()
    if kind != "upernet":
        parts["neck"] = Neck(int(kind == "retinanet"), neck, 2 if kind == "retinanet" else 0)
    if kind.endswith("rcnn"):
        parts["rpn_head"] = RPN(head)
        parts["roi_head"] = nn.ModuleDict({"bbox_head": Boxes()})
        if kind == "mask_rcnn":
            parts["roi_head"]["mask_head"] = Masks(head)
    elif kind == "retinanet":
        parts["bbox_head"] = Retina()
    else:
        parts["decode_head"] = SemanticFPN() if kind == "semantic_fpn" else UPer()
    if kind == "upernet":
        parts["auxiliary_head"] = Auxiliary()
    for module in parts.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
    return parts.double().eval()


def check(kind: str, parts: nn.ModuleDict, ours: nn.Module, image: Tensor, same: Callable[..., None]) -> None:
    """Compare all outputs of the two networks."""
    stages = next(module for module in ours.modules() if isinstance(module, Stages))
    maps = stages(image)
    if kind == "upernet":
        same(ours(image)["out"], resize(parts["decode_head"](maps), image.shape[2:]))
        same(ours.auxiliary(maps), parts["auxiliary_head"](maps))
        return
    levels = parts["neck"](maps)
    if kind == "semantic_fpn":
        same(ours(image)["out"], resize(parts["decode_head"](levels), image.shape[2:]))
        return
    found = list(ours.backbone(image).values())
    same(found[: len(levels)], levels)
    if kind == "retinanet":
        (logits,), (boxes,) = ours.head.classification_head(levels[:1]), ours.head.regression_head(levels[:1])
        expected = parts["bbox_head"](levels[0])
        same(logits, expected[0].permute(0, 2, 3, 1).reshape(1, -1, CLASSES)[0])
        same(boxes, expected[1].permute(0, 2, 3, 1).reshape(1, -1, 4)[0])
        return
    (scores,), (boxes,) = ours.rpn.head(levels[:1])
    same((scores, boxes), parts["rpn_head"](levels[0]))
    regions = torch.randn(5, WIDTH, 7, 7).double()
    heads = ours.roi_heads
    scores, boxes = heads.box_predictor(heads.box_head(regions))
    expected = parts["roi_head"]["bbox_head"](regions)
    same(scores[:, 0], expected[0][:, -1])  # the background
    same(scores[:, 1:], expected[0][:, :-1])
    same(boxes[:, 4:], expected[1])
    if kind == "mask_rcnn":
        regions = torch.randn(5, WIDTH, 14, 14).double()
        masks = heads.mask_predictor(heads.mask_head(regions))
        same(masks[:, 1:], parts["roi_head"]["mask_head"](regions))


CASES = [
    ("faster_rcnn", False, False),
    ("faster_rcnn", True, False),
    ("mask_rcnn", True, True),
    ("mask_rcnn", False, False),
    ("retinanet", False, False),
    ("retinanet", True, False),
    ("semantic_fpn", False, False),
    ("semantic_fpn", True, False),
    ("upernet", False, False),
]


def checkpoint(path: Path, parts: nn.ModuleDict, prefix: str = "") -> Path:
    state = {f"backbone.{key}": value for key, value in read(BACKBONE).items()} | parts.state_dict()
    torch.save({"meta": {}, "state_dict": {prefix + key: value for key, value in state.items()}}, path)
    return path


@pytest.mark.parametrize(("kind", "neck", "head"), CASES)
def test_all_parts_compute_what_theirs_compute(kind: str, neck: bool, head: bool, tmp_path: Path) -> None:
    parts = theirs(kind, neck, head)
    path = checkpoint(tmp_path / "theirs.pth", parts, "module." if neck else "")
    told, ours = network_of(read(path), path)
    layers = [f"{'in' if each else 'con'}volutions" for each in (neck, head)]
    tail = f" and head of {layers[1]}" if kind.endswith("rcnn") else ""
    assert told == f"{kind} of {CLASSES} classes, neck of {layers[0]}{tail}"
    assert sum(p.numel() for p in ours.parameters()) == sum(
        value.numel() for key, value in read(path).items() if "running" not in key and "num_batches" not in key
    )
    ours = ours.double()
    for p in ours.parameters():
        nn.init.zeros_(p)
    load_official(path, ours)
    with torch.no_grad():
        check(
            kind,
            parts,
            ours.eval(),
            torch.randn(1, 3, 97, 130).double(),
            lambda found, expected: torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9),
        )


def test_what_does_not_belong_is_named(tmp_path: Path) -> None:
    parts = theirs("faster_rcnn", False, False)
    parts["roi_head"]["track_head"] = nn.Linear(2, 2)
    path = checkpoint(tmp_path / "theirs.pth", parts)
    with pytest.raises(ValueError, match=r"2 unknown \(roi_head.track_head.weight, roi_head.track_head.bias\)"):
        network_of(read(path), path)
    path = checkpoint(tmp_path / "yolo.pth", nn.ModuleDict({"yolo_head": nn.Linear(2, 2)}))
    with pytest.raises(ValueError, match=r"yolo.pth is of no network built here; around its backbone it has yolo_head"):
        network_of(read(path), path)
    del parts["roi_head"]["bbox_head"]
    path = checkpoint(tmp_path / "half.pth", parts)
    with pytest.raises(ValueError, match=r"half.pth looks like a faster_rcnn, yet lacks roi_head.bbox_head.fc_cls"):
        network_of(read(path), path)
    with pytest.raises(ValueError, match="`model` must be a RedNet, or hold one; got a Linear"):
        load_official(BACKBONE, nn.Linear(2, 2))


def test_involution_predicts_with_a_converted_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = checkpoint(tmp_path / "theirs.pth", theirs("semantic_fpn", True, False))
    assert main(["convert", str(path), "theirs.ckpt"]) == 0
    told = capsys.readouterr().out
    assert "semantic_fpn of 11 classes, neck of involutions" in told
    assert "left out" not in told
    Image.effect_noise((90, 70), 50).convert("RGB").save("noise.png")
    arch = ["--model.neck=involution", "--model.channels=32", "--model.options.stem_kernel=7"]
    arch += ["--model.options.base_width=16"]
    assert (
        main(["predict", "--config=scenes/semantic_fpn", *arch, "--ckpt_path=theirs.ckpt", "--images=noise.png"]) == 0
    )
    assert (tmp_path / "runs" / "scenes" / "semantic_fpn" / "predictions" / "noise.png").is_file()
    assert main(["fit", "--config=scenes/semantic_fpn", *arch, "--ckpt_path=theirs.ckpt"]) == 2
    assert "theirs.ckpt holds weights alone" in capsys.readouterr().err
