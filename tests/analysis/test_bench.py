import csv

import pytest
import timm
import torch
from PIL import Image

from involution import Involution2d, cost
from involution.analysis import bench_model, bench_op, bench_variants, contenders, memory, problem, record
from involution.cli import main

SHAPES = [(1, 64, 8)]


@pytest.fixture(autouse=True)
def _unsettled(monkeypatch):
    """Times here say nothing, so they need not be good ones."""
    monkeypatch.setattr(cost, "_SETTLING", 0.0)


@pytest.fixture
def untimed(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("timed")

    monkeypatch.setattr(cost, "interleaved", refuse)


def test_the_operator_and_its_rivals_are_recorded(tmp_path, capsys):
    rows = bench_op.op(SHAPES, compiled=False, memory=False, rounds=1, plot=tmp_path / "op.png", out=tmp_path)
    assert record.read(tmp_path / "op.csv") == rows
    rivals = ["involution", "unfold formula", "depthwise 7x7", "dense 3x3"]
    assert [(row.direction, row.contender) for row in rows] == [
        *(("forward", name) for name in [*rivals, "copy of 64 MiB"]),
        *(("backward", name) for name in rivals),
        *(("forward+backward", name) for name in rivals),
    ]
    ours = rows[0]
    assert (ours.shape, ours.window, ours.base, ours.peak_mib) == ("1x64x8x8", "K7 D16", "involution", None)
    assert ours.gflops == pytest.approx(2e-6 * 64 * 64 * 49 / ours.p50_ms, rel=1e-3)
    out = capsys.readouterr().out
    assert "| backward, ms (times as long) |" in out
    assert "| forward, GB/s (share of copy of 64 MiB) |" in out
    assert "| backward, GB/s" not in out
    assert (tmp_path / "op.png").exists()


def test_every_variant_is_recorded_with_its_settings(tmp_path, capsys):
    rows = bench_variants.variants(SHAPES, ["forward"], rounds=1, out=tmp_path)
    assert record.read(tmp_path / "variants.csv") == rows
    kinds = {row.contender: (row.window, row.dtype, row.layout) for row in rows}
    assert kinds == {
        "base": ("K7 D16", "float32", "channels_last"),
        "contiguous": ("K7 D16", "float32", "contiguous"),
        "bfloat16": ("K7 D16", "bfloat16", "channels_last"),
        "float16": ("K7 D16", "float16", "channels_last"),
        "one thread": ("K7 D16", "float32", "channels_last"),
        "base, one image": ("K7 D16", "float32", "channels_last"),
        "K 3, one image": ("K3 D16", "float32", "channels_last"),
        "D 4, one image": ("K7 D4", "float32", "channels_last"),
        **{f"K {size}": (f"K{size} D16", "float32", "channels_last") for size in (3, 5, 9)},
        **{f"D {channels}": (f"K7 D{channels}", "float32", "channels_last") for channels in (4, 8, 32, 64)},
        "copy of 64 MiB": ("K7 D16", "float32", "channels_last"),
        "call": ("K3 D16", "float32", "channels_last"),
    }
    threads = torch.get_num_threads()
    assert {row.contender for row in rows if row.threads != threads} <= {"one thread", "call"}
    assert [row.threads for row in rows if row.contender == "one thread"] == [1]
    out = capsys.readouterr().out
    assert "| forward, ms (times as long a FLOP) |" in out
    assert "| forward, GB/s (share of copy of 64 MiB) |" in out
    assert f"call overhead: {1e3 * rows[-1].p50_ms:.1f} microseconds" in out


def test_processes_do_a_part_of_the_batch_each(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = bench_variants.variants([(2, 64, 6), (1, 64, 6)], ["forward"], rounds=1, out=tmp_path)
    finally:
        torch.set_num_threads(before)
    (processes,) = (row for row in rows if row.contender == "processes")
    (base,) = (row for row in rows if row.contender == "base" and row.shape == "2x64x6x6")
    assert (processes.shape, processes.threads, processes.base) == ("2x64x6x6", 2, "base")
    assert processes.gflops * processes.p50_ms == pytest.approx(base.gflops * base.p50_ms, rel=1e-2)


def test_one_image_serves_the_whole_batch():
    shape = problem.Problem(3, 16, 4, kernel_size=3)
    x, kernel, _ = bench_variants._tensors("base, one image", shape)
    assert (x.shape, kernel.shape) == ((3, 16, 4, 4), (3, 1, 3, 3, 4, 4))
    assert x.untyped_storage().nbytes() == shape.tensors()[0].untyped_storage().nbytes()
    assert (x.stride(0), kernel.stride(0)) == (0, 0)
    other, _, _ = bench_variants._tensors("base", shape)
    assert other.stride(0) == 16 * 4 * 4


def test_one_thread_is_one_thread_and_for_one_call_only():
    threads, seen = torch.get_num_threads(), []
    bench_variants._on_one_thread(lambda: seen.append(torch.get_num_threads()))
    assert (seen, torch.get_num_threads()) == ([1], threads)


def wrong_output(x, kernel, padding):
    return 1.01 * contenders.unfold(x, kernel, padding=padding)


def wrong_gradient(x, kernel, padding):
    return contenders.unfold(x.detach() + 1.01 * (x - x.detach()), kernel, padding=padding)


@pytest.mark.parametrize(("wrong", "told"), [(wrong_output, "output"), (wrong_gradient, "gradient of x")])
def test_a_wrong_operator_is_not_timed(wrong, told, monkeypatch, untimed, tmp_path):
    monkeypatch.setattr(contenders, "involution", wrong)
    for run in (lambda: bench_op.op(SHAPES, compiled=False, out=tmp_path), lambda: bench_variants.variants(SHAPES)):
        with pytest.raises(RuntimeError, match=f"the operator's {told} is wrong here: an error is .* Not timed"):
            run()
    assert not (tmp_path / "op.csv").exists()


@pytest.mark.parametrize("direction", problem.PASSES)
def test_a_pass_computes_what_it_is_named_for(direction):
    x, kernel, grad = problem.Problem(1, 16, 5, kernel_size=3).tensors()
    run = problem.timed(contenders.ours(3), x, kernel, grad, direction)
    run()
    result = run()  # again, for backward keeps its graph
    if direction == "forward":
        assert not result.requires_grad
        torch.testing.assert_close(result, contenders.unfold(x, kernel, padding=1).detach())
    else:
        expected = torch.autograd.grad(contenders.unfold(x, kernel, padding=1), (x, kernel), grad)
        torch.testing.assert_close(result, expected)
    assert (x.grad, kernel.grad) == (None, None)


@pytest.mark.skipif(not memory._RESET.exists(), reason="no /proc/self/clear_refs")
def test_the_memory_of_the_operator_is_that_of_its_results():
    shape = problem.Problem(1, 64, 128, kernel_size=3)
    ours, formula = (
        memory.peak_mib(bench_op._steps, shape, name, "forward") for name in (contenders.OURS, "unfold formula")
    )
    mib = 64 * 128**2 * 4 / 2**20  # of x, and of the output
    uncounted = 0.25  # Linux counts resident pages for each processor and adds up 32 of them at a time, here on two
    assert mib - uncounted <= ours < 3 * mib
    assert 9 * mib < formula  # of x unfolded


def test_a_peak_is_recorded_for_all_but_the_backward_pass_and_the_copy(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_op, "peak_mib", lambda *_: 7.0)
    rows = bench_op.op([(1, 16, 4)], compiled=False, rounds=1, out=tmp_path)
    without = {(row.contender, row.direction) for row in rows if row.peak_mib is None}
    rivals = ("involution", "unfold formula", "depthwise 7x7", "dense 3x3")
    assert without == {("copy of 64 MiB", "forward"), *((name, "backward") for name in rivals)}


def test_networks_are_recorded_with_their_mirror(tmp_path, capsys):
    rows = bench_model.model(
        ["rednet26"], [1, 2], 64, ["inference", "training step"], memory=False, rounds=1, out=tmp_path
    )
    assert record.read(tmp_path / "model.csv") == rows
    training = {
        "rednet26": "resnet26",
        "resnet26": "resnet26",
        "resnet26 (matrix products)": "resnet26",
        "rednet26 (kernels stored)": "rednet26",
        "rednet26 (no involutions)": "rednet26",
        "rednet26 (unfold formula)": "rednet26",
    }
    inference = training | {f"{name} (norms folded)": "resnet26" for name in ("rednet26", "resnet26")}
    panels = [("inference", "1x3x64x64"), ("inference", "2x3x64x64"), ("training step", "2x3x64x64")]
    assert list(dict.fromkeys((row.direction, row.shape) for row in rows)) == panels
    for direction, shape in panels:
        found = {row.contender: row.base for row in rows if (row.direction, row.shape) == (direction, shape)}
        assert found == (inference if direction == "inference" else training)
    assert "| rednet26 / resnet26 " in capsys.readouterr().out


def test_networks_are_recorded_as_torch_makes_them(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(bench_model, "_step", lambda network, images, _: given.append((network, images)) or list)
    for layout, innermost in (("channels_last", True), ("contiguous", False)):
        rows = bench_model.model(
            ["rednet26"], [2], 64, ["inference"], layout, unfold=False, memory=False, rounds=1, out=tmp_path
        )
        assert {row.layout for row in rows} == {layout}
        for network, images in given:
            weights = [p for p in network.parameters() if p.dim() == 4 and min(p.shape) > 1]
            assert {t.is_contiguous(memory_format=torch.channels_last) for t in (images, *weights)} == {innermost}
        given.clear()


def test_what_remains_without_involutions_has_their_shapes():
    network = timm.create_model("rednet26", num_classes=3, base_width=16, stem_width=32)
    layers = sum(p.numel() for m in network.modules() if isinstance(m, Involution2d) for p in m.parameters())
    parameters = sum(p.numel() for p in network.parameters())
    x = torch.randn(2, 3, 49, 65)
    features = network.forward_features(x)
    remaining = contenders.without_involutions(network)
    assert remaining.forward_features(x).shape == features.shape
    assert sum(p.numel() for p in remaining.parameters()) == parameters - layers > 0


def test_a_network_unlike_its_formula_is_not_timed(monkeypatch, untimed, tmp_path):
    unfold = contenders.unfold
    monkeypatch.setattr(contenders, "unfold", lambda x, *args: unfold(x.flip(-1), *args))
    with pytest.raises(RuntimeError, match=r"disagree\. Not timed"):
        bench_model.model(["rednet26"], [1], 64, ["inference"], out=tmp_path)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["op", "--shapes", "[]"], "`shapes` must hold at least one batch, channels and side; got none."),
        (["op", "--shapes", "[[1,16,0]]"], "`shapes` must hold sizes of at least 1; got 1x16x0x0."),
        (["op", "--shapes", "[[1,16,4]]", "--rounds", "0"], "`rounds` must be at least 1; got 0."),
        (["op", "--kernel_size", "4"], "`kernel_size` must be odd and at least 1; got 4."),
        (["op", "--group_channels", "24"], "`group_channels` must divide the channels in `shapes`; got 24 and 64."),
        (["variants", "--shapes", "[]"], "`shapes` must hold at least one batch, channels and side; got none."),
        (["variants", "--directions", "[]"], "`directions` must hold at least one; got none."),
        (
            ["variants", "--shapes", "[[1,16,4]]"],
            "`group_channels` must divide the channels in `shapes`; got 32 and 16.",
        ),
        (["model", "--archs", "[rednet51]"], "`archs`: unknown RedNet 'rednet51'; did you mean 'rednet50'?"),
        (["model", "--archs", "[]"], "`archs` must hold at least one; got none."),
        (["model", "--batches", "[0]"], "`batches` and `size` must be at least 1; got [0] and 224."),
        (["readme", "--folder", "benchmarks", "--file", "nowhere.md"], "nowhere.md"),
    ],
)
def test_a_mistake_is_told_in_one_line(args, told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *args]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.csv"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    assert main(["bench", "gpu", "--out", str(tmp_path)]) == 2
    assert "`bench gpu` needs a CUDA or ROCm device, and torch finds none." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_loader_is_timed_alone(tmp_path, capsys):
    for split in ("train", "val"):
        for name in ("one", "two"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                Image.effect_noise((40, 50), 50).save(folder / f"{index}.png")
    args = [str(tmp_path / "images"), "--workers", "[0,1]", "--batch_size", "2", "--size", "32", "--seconds", "0.2"]
    assert main(["bench", "data", *args, "--out", str(tmp_path)]) == 0
    with (tmp_path / "data.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["workers"] for row in rows] == ["0", "1"]
    for row in rows:
        assert float(row["seconds"]) >= 0.2
        assert float(row["images_per_second"]) == pytest.approx(int(row["images"]) / float(row["seconds"]), rel=0.05)
    assert "| workers | images/s | images/s a worker |" in capsys.readouterr().out
    assert main(["bench", "data", *args, "--seconds", "0"]) == 2
    assert "`seconds` must be above 0; got 0.0." in capsys.readouterr().err
