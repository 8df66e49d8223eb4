"""Converting checkpoints of the official code, and measuring them on a folder of images."""

import resource
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import involution.models  # noqa: F401  # registers the RedNets with timm
from involution.cli import main
from involution.models.official import to_official
from involution.recognition import rednet_of
from involution.weights import read

GOLDEN = Path(__file__).parents[1] / "golden"
CLS, DET = GOLDEN / "rednet26_slim_cls.pth", GOLDEN / "rednet26_slim_det.pth"
EXPECTED = GOLDEN / "rednet26_slim_cls_expected.safetensors"
SLIM = {"base_width": 16, "stem_width": 32}


def test_timm_loads_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "rednet.safetensors"
    assert main(["convert", str(CLS), str(out)]) == 0
    told = capsys.readouterr().out
    assert "| head                   |       2 |     fc |" in told
    assert told.endswith(f"rednet26_slim_cls.pth: 466,312 parameters, written to {out}\n")
    model = timm.create_model("rednet26", **SLIM, num_classes=10, checkpoint_path=str(out)).double().eval()
    golden = load_file(EXPECTED)
    torch.testing.assert_close(model(golden["input"]), golden["logits"], rtol=1e-9, atol=1e-9)
    there_and_back = to_official(load_file(out))
    assert there_and_back.keys() == read(CLS).keys()
    assert all(torch.equal(value, there_and_back[key]) for key, value in read(CLS).items())


def test_a_folder_tells_the_whole_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = {f"backbone.{key}": value for key, value in read(DET).items()}
    torch.save({"state_dict": backbone | {"neck.fpn.weight": torch.ones(1)}}, tmp_path / "detector.pth")
    (tmp_path / "det.v1").mkdir()
    assert main(["convert", str(tmp_path / "detector.pth"), str(tmp_path / "det.v1")]) == 0
    assert "neck.fpn.weight" in capsys.readouterr().out.splitlines()[7]
    model = timm.create_model(f"local-dir:{tmp_path / 'det.v1'}", pretrained=True)
    assert model.num_classes == 0
    assert model.stem.conv2.window.kernel_size == (7, 7)
    expected = rednet_of(read(DET), DET).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_accuracy_of_a_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = rednet_of(read(CLS), CLS).eval()
    images = [Image.effect_noise((300, 260), 20 * (i + 1)).convert("RGB") for i in range(10)]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        best = model(torch.stack([transform(image) for image in images])).topk(5).indices
    for i in range(10):
        (tmp_path / "val" / f"class{i}").mkdir(parents=True)
    for i, image in enumerate(images):  # six into the class found, four into the second guess
        image.save(tmp_path / "val" / f"class{best[i, 0 if i < 6 else 1]}" / f"{i}.png")
    for i in set(range(10)) - {int(best[j, 0 if j < 6 else 1]) for j in range(10)}:
        images[0].save(tmp_path / "val" / f"class{i}" / "x.png")
    count = len(list((tmp_path / "val").rglob("*.png")))
    again = [i for i in range(10) if (tmp_path / "val" / f"class{i}" / "x.png").exists()]
    top1 = 6 + sum(i == int(best[0, 0]) for i in again)
    top5 = 10 + sum(i in best[0].tolist() for i in again)
    args = ["--evaluate", str(tmp_path / "val"), "--workers", "0"]
    assert main(["convert", str(CLS), str(tmp_path / "o.safetensors"), *args]) == 0
    shares = f"{count} images: top-1 {top1 / count:.2%}, top-5 {top5 / count:.2%}"
    assert capsys.readouterr().out.splitlines()[-1] == shares


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([str(CLS), "out.bin"], "`out` must end in .safetensors, .ckpt, or be a folder; got out.bin."),
        ([str(EXPECTED), "out"], "cannot be read safely: it is no torch checkpoint"),
        (["nowhere.pth", "out"], "nowhere.pth: No such file or directory."),
        (
            [str(CLS), "out", "--evaluate", "two"],
            "must hold a folder for each of the 10 classes of the checkpoint; two ",
        ),
        ([str(DET), "out", "--evaluate", "two"], "`evaluate` needs a classifier, and "),
    ],
)
def test_a_mistake_is_told_in_one_line(args, told, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "two" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "two" / name / "0.png")
    assert main(["convert", *args]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_largest_network_takes_seconds(tmp_path: Path) -> None:
    torch.save({"state_dict": to_official(timm.create_model("rednet152").state_dict())}, tmp_path / "official.pth")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert main(["convert", str(tmp_path / "official.pth"), str(tmp_path / "out.safetensors")]) == 0
    assert time.process_time() - start < 5  # of the processor, whatever else the machine does
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
