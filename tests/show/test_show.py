"""The command: what it writes, what the page holds, and what is refused."""

import base64
import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from involution.cli import main
from involution.models import RedNet
from involution.models.rednet import mirrored_resnet
from involution.show.command import capture
from involution.show.subject import Subject, subject

SLIM = {"base_width": 16, "stem_width": 32}


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def network() -> RedNet:
    """With statistics that tell one norm from another."""
    model = timm.create_model("rednet26", **SLIM, num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics are those of this very batch
    model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.fixture
def files(tmp_path: Path, network: RedNet) -> Path:
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    Image.effect_noise((97, 64), 60).convert("RGB").save(tmp_path / "noise.png")
    return tmp_path


def test_pictures_statistics_page_and_animation(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["show", "noise.png", "--checkpoint", "net.safetensors", "--animate", "gif", "--group", "3"]
    assert main(args) == 0
    told = capsys.readouterr().out
    assert "layer3.3.conv2: 4 groups of 7 x 7 at 4 x 7 positions, 64 channels" in told
    assert told.splitlines()[-3:] == [
        "weights   weights of net.safetensors",
        "pictures  runs/show",
        "explorer  runs/show/explorer.html",
    ]
    folder = Path("runs/show/layer3.3.conv2")
    names = [f"{name}.{suffix}" for name in ("colours", "kernels", "sums") for suffix in ("png", "svg")]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "group3.gif", "statistics.csv"])
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20
    with (folder / "statistics.csv").open() as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["group", "0", "1", "2", "3"]
    assert rows[1][1] in told
    with Image.open(folder / "group3.gif") as animation:
        assert animation.n_frames == 4 * 7
        frames = []
        for index in (0, 13):
            animation.seek(index)
            frames.append(np.asarray(animation.convert("RGB")).astype(int))
    change = [np.abs(frames[0] - frames[1])[26:, left : left + 240].max() for left in (12, 264, 516, 768)]
    assert change[:3] == pytest.approx([128, 128, 128], abs=127)  # image, kernel, image
    assert change[3] == 0  # a convolution's kernel stays


def test_an_animation_may_be_webp(files: Path) -> None:
    args = ["show", "noise.png", "--checkpoint=net.safetensors", "--animate=webp", "--layer=layer4"]
    assert main(args) == 0
    with Image.open("runs/show/layer4.0.conv2/group0.webp") as animation:
        assert animation.format == "WEBP"
        assert animation.n_frames == 2 * 4


def test_layers_are_chosen_by_name_or_block(files: Path) -> None:
    for layer, found in (("stem", {"stem.conv2"}), ("layer2", {"layer2.0.conv2", "layer2.1.conv2"})):
        assert main(["show", "noise.png", "--checkpoint=net.safetensors", "--layer", layer, "--out", layer]) == 0
        assert {path.name for path in Path(layer).iterdir() if path.is_dir()} == found


def test_the_page_holds_the_kernels(files: Path, network: RedNet) -> None:
    mirror = mirrored_resnet(26, 16, 32, num_classes=3)
    torch.save({"state_dict": {f"net.{key}": value for key, value in mirror.state_dict().items()}}, "mirror.ckpt")
    assert main(["show", "noise.png", "--checkpoint=net.safetensors", "--mirror=mirror.ckpt"]) == 0
    page = Path("runs/show/explorer.html").read_text()
    assert not re.search(r"(?:src|href)=.?https?:|@import|fetch\(", page)
    data = json.loads(re.search(r"^const data = (.*);$", page, re.MULTILINE)[1])
    assert data["weights"] == "weights of net.safetensors"
    assert data["mirror"] == "weights of mirror.ckpt"
    captured = capture(subject("noise.png", checkpoint=Path("net.safetensors")))
    assert [each["name"] for each in data["layers"]] == list(captured)
    for layer, each in zip(data["layers"], captured.values(), strict=True):
        found = _kernels(layer)
        kernel = each.kernel[0].numpy()
        assert np.abs(found - kernel).max() < 2e-3 * np.abs(kernel).max()
        x = _numbers(layer["x"]).reshape(-1, *layer["input"])
        np.testing.assert_allclose(x, each.input[0, ::16].numpy(), rtol=1e-3, atol=1e-6)
    fixed = _numbers(data["layers"][2]["mirror"]).reshape(-1, 3, 3)
    weight = mirror.get_parameter(f"{data['layers'][2]['name']}.weight")
    np.testing.assert_allclose(fixed[1], weight[16, 16].detach().numpy(), rtol=1e-3, atol=1e-4)


def test_the_page_of_rednet50_at_224_is_below_six_megabytes(tmp_path: Path) -> None:
    Image.effect_noise((300, 300), 60).convert("RGB").save("large.png")
    assert main(["show", "large.png", "--model", "rednet50"]) == 0
    assert Path("runs/show/explorer.html").stat().st_size < 6e6


def test_weights_come_from_many_kinds_of_files(files: Path, network: RedNet) -> None:
    def same(shown: Subject) -> None:
        for key, value in network.state_dict().items():
            if not key.startswith("fc."):
                torch.testing.assert_close(shown.network.state_dict()[key], value)

    same(subject("noise.png", "rednet26", Path("net.safetensors")))
    state = {f"net.pyramid.stages.body.{key}": value for key, value in network.state_dict().items() if key[:3] != "fc."}
    torch.save({"state_dict": state | {"net.head.weight": torch.ones(2)}}, "segmentor.ckpt")
    same(subject("noise.png", checkpoint=Path("segmentor.ckpt")))
    assert subject("noise.png", "rednet26").weights == "random; give --checkpoint for trained ones"


def test_the_packaged_network_sees_the_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "sample", "--layer", "layer2"]) == 0
    assert "trained on scenes of digits" in capsys.readouterr().out
    sums = capture(subject("sample"))["layer2.1.conv2"].sums()[0]
    assert float(sums.std()) > 1  # it has learned to tell places apart


def test_large_images_are_scaled_and_grey_networks_see_grey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (10_000, 500)).save("wide.png")
    shown = subject("wide.png", "rednet26", size=640)
    assert capsys.readouterr().out == "scaled wide.png from 10000 x 500 to 640 x 32 pixels\n"
    assert shown.x.shape == (1, 3, 32, 640)
    grey = timm.create_model("rednet26", **SLIM, in_chans=1, num_classes=10)
    save_file(grey.state_dict(), "grey.safetensors")
    Image.new("L", (40, 40), 51).save("grey.png")
    shown = subject("grey.png", checkpoint=Path("grey.safetensors"))
    torch.testing.assert_close(shown.x, torch.full((1, 1, 40, 40), 0.2))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["nowhere.png"], "there is no image nowhere.png"),
        (["text.png"], "text.png cannot be read as an image"),
        (["tiny.png"], "`image` must have 32 pixels a side or more; tiny.png is 9 x 40"),
        (["noise.png", "--model", "resnet50"], "`model` must be a RedNet, such as rednet50; got 'resnet50'"),
        (["noise.png", "--model", "rednet51"], "unknown network 'rednet51'; did you mean"),
        (
            ["noise.png", "--model=rednet50", "--checkpoint=net.safetensors"],
            "is of a rednet26, not of `model` rednet50",
        ),
        (["noise.png", "--checkpoint=text.png"], "text.png cannot be read safely"),
        (["noise.png", "--checkpoint=text.safetensors"], "text.safetensors cannot be read as safetensors"),
        (["noise.png", "--checkpoint=other.safetensors"], "which no RedNet has"),
        (["noise.png", "--checkpoint=net.safetensors", "--mirror=other.pth"], "other.pth is not of the ResNet that"),
        (["noise.png", "--checkpoint=net.safetensors", "--layer=layer3.3.conv"], "did you mean 'layer3.3.conv2'"),
        (["noise.png", "--checkpoint=net.safetensors", "--layer=x"], "There is: layer1.0.conv2, layer2.0.conv2, layer"),
        (["noise.png", "--points=[[0.5,1.5]]"], "`points` must be pairs of numbers from 0 to 1; got [0.5, 1.5]"),
        (["noise.png", "--points=[]"], "`points` must hold at least one pair of numbers; got none"),
        (["noise.png", "--size=8"], "`size` must be at least 32; got 8"),
        (
            ["noise.png", "--checkpoint=net.safetensors", "--animate=gif", "--group=4"],
            "`group` must be from 0 to 3 in layer3.3.conv2; got 4",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    args: list[str], told: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("text.png", "text.safetensors"):
        (files / name).write_text("neither image nor weights")
    Image.new("RGB", (9, 40)).save("tiny.png")
    save_file({"conv.weight": torch.ones(2)}, "other.safetensors")
    torch.save({"conv.weight": torch.ones(2)}, "other.pth")
    assert main(["show", *args]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def _numbers(packed: tuple[float, str]) -> np.ndarray:
    return packed[0] * np.frombuffer(base64.b64decode(packed[1]), "<f2").astype(np.float32)


def _kernels(layer: dict) -> np.ndarray:
    """What the page computes, from what it holds."""
    reduced = _numbers(layer["reduced"]).reshape(layer["hidden"], -1)
    active = np.maximum(0, reduced * _numbers(layer["scale"])[:, None] + _numbers(layer["shift"])[:, None])
    kernels = _numbers(layer["span"]).reshape(-1, layer["hidden"]) @ active + _numbers(layer["bias"])[:, None]
    return kernels.reshape(layer["groups"], *layer["kernel"], *layer["output"])
