"""What training needs, computed: held to what a process really takes, and to the arithmetic of rings."""

from pathlib import Path

import pytest
import timm
import torch

from involution.analysis import memory
from involution.analysis.scale import kept, scale
from involution.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


NETWORKS = ("rednet26", "resnet26")


def forward():
    """A warm-up with one image, and a step that holds what the forward pass of eight keeps, for both networks."""
    networks = [timm.create_model(name).to(memory_format=torch.channels_last) for name in NETWORKS]
    images = torch.rand(8, 3, 192, 192).to(memory_format=torch.channels_last)
    held = []

    def step(count):
        held[:] = [network(images[:count]) for network in networks]

    return (lambda: step(1)), (lambda: step(8))


@pytest.mark.skipif(not memory._RESET.exists(), reason="no /proc/self/clear_refs")
def test_features_that_are_kept_are_those_a_process_holds():
    # in a process of its own: in this one the heap holds what other tests left, and grows by as much as they made it
    rise = memory.peak_mib(forward)
    computed = sum(kept(name, 8, 192) for name in NETWORKS) / 2**20
    assert 1 < rise / computed < 1.1  # at its highest there is a little more than what is kept


def test_features_follow_images_dtype_and_recomputing():
    whole = kept("rednet26", 2, 64)
    assert kept("rednet26", 4, 64) > 1.9 * whole
    assert 0.49 * whole < kept("rednet26", 2, 64, torch.bfloat16) < 0.55 * whole
    assert kept("rednet26", 2, 64, recompute=True) < 0.6 * whole


def test_the_table_counts_weights_and_what_is_sent(tmp_path, capsys):
    text = tmp_path / "page.md"
    text.write_text("before\n<!-- scale -->\nold\n<!-- end of scale -->\nafter\n")
    scale(["rednet50"], images=2, size=64, devices=(4,), gigabytes_per_second=10, text=text)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| rednet50"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    weights = 15_540_806 * 4 / 2**20  # paper.md's parameters
    assert cells[1:4] == ["4", f"{3 * weights:.0f}", f"{3 * weights / 4:.1f}"]
    # each of three rounds passes a quarter on, to sum and again to tell the sum
    assert cells[7:] == [
        *(f"{6 * weights / 4:.1f}", f"{6 * weights / 4 * 2**20 / 1e7:.1f}"),
        *(f"{9 * weights / 4:.1f}", f"{9 * weights / 4 * 2**20 / 1e7:.1f}"),
    ]
    assert line in text.read_text()
    assert text.read_text().startswith("before\n")


def test_the_page_tells_what_is_computed():
    page = " ".join(PAGE.read_text().split())
    for line in scale(["rednet26"]).splitlines()[2:]:
        assert " ".join(line.split()) in page
    ratio = kept("rednet50", 32, 224, torch.bfloat16) / kept("resnet50", 32, 224, torch.bfloat16)
    assert f"For RedNet-50 in bfloat16 the features computed here are {ratio:.2f} times those of ResNet-50" in page


def test_mistakes_are_told(capsys):
    for args, told in (
        (["--images", "0"], "`images` must be at least 1; got 0."),
        (["--devices", "[8,0]"], "`devices` must be at least 1; got [8, 0]."),
        (["--gigabytes_per_second", "0"], "`gigabytes_per_second` must be above 0; got 0.0."),
        (["--networks", "[rednet27]"], "unknown network 'rednet27'; did you mean"),
        (["--networks", "[shallow]"], "`networks` must name networks that can recompute"),
    ):
        assert main(["scale", *args]) == 2
        assert told in capsys.readouterr().err
