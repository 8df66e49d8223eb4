"""Reading, mapping and refusing checkpoints."""

import pickle
from pathlib import Path

import pytest
import timm
import torch

import involution.models  # noqa: F401  # registers the RedNets with timm
from involution.models.official import to_official
from involution.models.rednet import RedNet, checkpoint_filter_fn
from involution.recognition import rednet_of
from involution.weights import load_official, mismatch, read

GOLDEN = Path(__file__).parent / "golden"
CLS, DET = GOLDEN / "rednet26_slim_cls.pth", GOLDEN / "rednet26_slim_det.pth"


def slim_rednet(**kwargs: int) -> RedNet:
    return timm.create_model("rednet26", base_width=16, stem_width=32, **kwargs)


@pytest.fixture
def model() -> RedNet:
    return slim_rednet(num_classes=10)


def test_there_and_back_is_the_identity(model: RedNet) -> None:
    official = read(CLS)
    renamed = checkpoint_filter_fn(official)
    assert list(renamed) == list(model.state_dict())
    back = to_official(renamed)
    assert list(back) == list(official)
    assert all(back[key] is official[key] for key in official)


def test_the_prefix_of_the_backbone_may_be_absent() -> None:
    official = read(DET)
    renamed = checkpoint_filter_fn(official)
    assert list(renamed) == list(slim_rednet(num_classes=0).state_dict())
    assert list(to_official(renamed)) == [f"backbone.{key}" for key in official]


def test_our_own_names_pass_the_filter(model: RedNet) -> None:
    state = model.state_dict()
    assert list(checkpoint_filter_fn(state)) == list(state)


def test_every_entry_is_loaded(model: RedNet) -> None:
    load_official(CLS, model)
    given = checkpoint_filter_fn(read(CLS))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, given[key].to(value.dtype), rtol=0, atol=0)


def test_a_model_without_classifier_takes_the_backbone() -> None:
    model = slim_rednet(num_classes=0)
    load_official(CLS, model)
    torch.testing.assert_close(model.stem.bn3.running_var, read(CLS)["backbone.stem.4.bn.running_var"])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_neck_and_heads_of_detection_and_segmentation_are_left_out(tmp_path: Path, prefix: str) -> None:
    backbone = {f"backbone.{key}": value for key, value in read(DET).items()}
    around = ("neck.lateral_convs.0.conv.weight", "rpn_head.rpn_conv.weight", "roi_head.bbox_head.fc_cls.weight")
    around += ("decode_head.conv_seg.weight", "auxiliary_head.conv_seg.weight", "mask_head.fc.weight")
    state = backbone | dict.fromkeys(around, torch.ones(1))
    state = {prefix + key: value for key, value in state.items()}
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, tmp_path / "detector.pth")
    model = slim_rednet(num_classes=0, stem_kernel=7)
    load_official(tmp_path / "detector.pth", model)
    torch.testing.assert_close(model.stem.bn3.running_var, backbone["backbone.stem.4.bn.running_var"])


def test_a_prefix_of_data_parallel_training_is_dropped(tmp_path: Path, model: RedNet) -> None:
    torch.save({f"module.{key}": value for key, value in read(CLS).items()}, tmp_path / "parallel.pth")
    load_official(tmp_path / "parallel.pth", model)
    torch.testing.assert_close(model.fc.weight, read(CLS)["head.fc.weight"])


def test_timm_loads_official_files_as_pretrained_weights() -> None:
    model = slim_rednet(num_classes=10, pretrained=True, pretrained_cfg_overlay={"file": str(CLS), "num_classes": 10})
    torch.testing.assert_close(model.fc.weight, read(CLS)["head.fc.weight"])


def test_another_depth_is_refused_and_the_model_unchanged() -> None:
    model = timm.create_model("rednet38", base_width=16, stem_width=32, num_classes=10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"cls\.pth does not fit the model: 100 of 351 entries missing "
        r"\(layer1\.1\.conv1\.weight, layer1\.1\.bn1\.weight, layer1\.1\.bn1\.bias, \.\.\.\)\.$",
    ):
        load_official(CLS, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_entries_too_many_are_named() -> None:
    model = RedNet((1, 1, 1, 1), base_width=16, stem_width=32, num_classes=10)
    with pytest.raises(ValueError, match=r"model: 100 unknown \(layer2\.1\.conv1\.weight, .*, \.\.\.\)\.$"):
        load_official(CLS, model)


def test_another_stem_is_refused_with_its_repair() -> None:
    with pytest.raises(
        ValueError,
        match=r"2 of another shape \(stem\.conv2\.generator\.span\.weight is \(9, 4, 1, 1\), not \(49, 4, 1, 1\), .*"
        r"3x3 in the official classification code, 7x7 in the others: see `stem_kernel`\.$",
    ):
        load_official(CLS, slim_rednet(num_classes=10, stem_kernel=7))


def test_a_missing_classifier_is_refused_with_its_repair() -> None:
    with pytest.raises(ValueError, match=r"2 of 251 entries missing \(fc.weight, fc.bias\)\. .* `num_classes=0`"):
        load_official(DET, slim_rednet(num_classes=10, stem_kernel=7))


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('executed')",)


def test_files_that_would_execute_code_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=r"cannot be read safely: it is no torch checkpoint, or holds more than"):
            read(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", CLS.read_bytes()[:10_000]], ids=["empty", "text", "cut"])
def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.pth cannot be read safely"):
        read(tmp_path / "file.pth")


@pytest.mark.parametrize("content", [[torch.ones(1)], {"epoch": 3}, {"state_dict": 4}, {4: torch.ones(1)}])
def test_files_without_state_dict_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="holds no state dict, neither bare nor under the key 'state_dict'"):
        read(tmp_path / "file.pth")


def test_mismatch_is_silent_when_all_fits(model: RedNet) -> None:
    assert mismatch(model.state_dict(), model.state_dict()) == ""


def test_mismatch_shows_all_names_up_to_three() -> None:
    one = torch.ones(1)
    assert mismatch(dict.fromkeys("abc", one), {}) == "3 of 3 entries missing (a, b, c)"
    assert mismatch({}, dict.fromkeys("abcd", one)) == "4 unknown (a, b, c, ...)"


def test_values_that_are_not_finite_are_named(tmp_path: Path, model: RedNet) -> None:
    state = read(CLS)
    state["backbone.layer1.0.bn1.weight"] = state["backbone.layer1.0.bn1.weight"] * float("nan")
    torch.save(state, tmp_path / "nan.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"not finite, in 1 entries \(layer1\.0\.bn1\.weight\)\."):
        load_official(tmp_path / "nan.pth", model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "settings",
    [
        {"depth": 26, "base_width": 16, "stem_width": 32, "num_classes": 7},
        {"depth": 38, "base_width": 32, "stem_width": 64, "num_classes": 0, "stem_kernel": 7},
        {"depth": 26, "base_width": 16, "stem_width": 32, "num_classes": 3, "kernel_size": 5},
    ],
    ids=str,
)
def test_a_checkpoint_tells_its_network(tmp_path: Path, settings: dict[str, int]) -> None:
    depth = settings.pop("depth")
    model = timm.create_model(f"rednet{depth}", **settings)
    torch.save({"state_dict": to_official(model.state_dict())}, tmp_path / "official.pth")
    found = rednet_of(read(tmp_path / "official.pth"), "official.pth").state_dict()
    assert list(found) == list(model.state_dict())
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_of_no_rednet(tmp_path: Path) -> None:
    odd = RedNet((1, 1, 1, 1), base_width=16, stem_width=32)
    torch.save(to_official(odd.state_dict()), tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd\.pth has \(1, 1, 1, 1\) blocks in its stages, which no RedNet"):
        rednet_of(read(tmp_path / "odd.pth"), "odd.pth")
    stemless = {key: value for key, value in read(CLS).items() if not key.startswith("backbone.stem.4")}
    torch.save(stemless, tmp_path / "stemless.pth")
    with pytest.raises(ValueError, match=r"lacks 1 entries that every RedNet has \(stem\.conv3\.weight\)"):
        rednet_of(read(tmp_path / "stemless.pth"), "stemless.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch does, slowly
@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.ones(4, dtype=torch.complex64), "first has layout torch.strided and dtype torch.complex64"),
        (torch.ones(4).to(torch.float8_e4m3fn), "first has layout torch.strided and dtype torch.float8_e4m3fn"),
        (torch.ones(4).to_sparse(), "first has layout torch.sparse_coo and dtype torch.float32"),
    ],
    ids=["complex", "float8", "sparse"],
)
def test_values_that_would_be_cut_are_refused(tmp_path: Path, value: torch.Tensor, told: str) -> None:
    torch.save({"backbone.layer1.0.bn1.weight": value}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"not dense or not real, in 1 entries \(backbone\.layer1.*" + told):
        read(tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("head.fc.weight", torch.ones(()), r"fc\.weight must have 2 axes, none empty; it is \(\)"),
        (
            "backbone.layer1.0.conv2.conv1.conv.weight",
            torch.ones(0, 16, 1, 1),
            r"reduce\.weight must have 4 axes",
        ),
        ("backbone.layer1.0.conv1.weight", torch.ones(24, 64, 1, 1), "its shapes tell .*base_width 24"),
        ("backbone.layer1.0.conv2.conv2.conv.bias", torch.ones(36), "its shapes tell .*kernel_size 6.*, and "),
    ],
    ids=["classifier", "reduce", "width", "kernel"],
)
def test_shapes_that_no_rednet_has(key: str, value: torch.Tensor, told: str) -> None:
    state = read(CLS)
    assert key in state
    with pytest.raises(ValueError, match=r"^cls\.pth is of no RedNet: .*" + told):
        rednet_of(state | {key: value}, "cls.pth")
