from dataclasses import replace

from involution.analysis import table
from involution.analysis.plot import draw
from involution.analysis.record import Row

ROW = Row(
    *("op", "involution", "involution", "forward", "1x16x8x8", "K3 D16", "float32", "channels_last", 3),
    *(1.0, 2.0, 3.0, 40.0, 5.0, 8.0, 2, "a processor", "C++, baseline", "2.14", "abc1234", "2026-01-02T03:04:05"),
)
WIDER = replace(ROW, shape="1x32x4x4", p50_ms=10.0, peak_mib=None)
RIVAL = {"contender": "rival", "p50_ms": 150.0, "gflops": 10.0, "peak_mib": 12.0}
ROWS = [ROW, replace(ROW, **RIVAL), WIDER, replace(WIDER, contender="rival", p50_ms=30.0)]
RESNET = {"contender": "resnet50", "base": "resnet50"}
MODELS = [
    replace(ROW, benchmark="model", contender="rednet50", base="resnet50", direction="inference", p50_ms=3.0),
    replace(ROW, benchmark="model", **RESNET, direction="inference", p50_ms=2.0),
    replace(ROW, benchmark="model", **RESNET, direction="training step", shape="8x16x8x8", p50_ms=8.0),
    replace(ROW, benchmark="model", contender="rednet50", base="resnet50", direction="training step", shape="8x16x8x8"),
]


def test_times_stand_beside_their_ratio_to_ours():
    assert table.against_base(ROWS, table.TIME) == (
        "| forward, ms (times as long) |    1x16x8x8 |    1x32x4x4 | geometric mean |\n"
        "|-----------------------------|------------:|------------:|---------------:|\n"
        "| involution                  | 2.00 (1.00) | 10.0 (1.00) |           1.00 |\n"
        "| rival                       | 150 (75.00) | 30.0 (3.00) |           15.0 |"
    )


def test_memory_that_was_not_measured_has_no_column():
    assert table.against_base(ROWS, table.MEMORY) == (
        "| forward, peak MiB (times as much) |    1x16x8x8 | geometric mean |\n"
        "|-----------------------------------|------------:|---------------:|\n"
        "| involution                        | 8.00 (1.00) |           1.00 |\n"
        "| rival                             | 12.0 (1.50) |           1.50 |"
    )


def test_a_gap_and_a_peak_of_nothing_have_no_ratio():
    rows = [replace(ROW, peak_mib=0.0), replace(ROW, **RIVAL), replace(WIDER, peak_mib=4.0)]
    assert table.against_base(rows, table.MEMORY).splitlines()[2:] == [
        "| involution                        |     0.00 | 4.00 (1.00) |           1.00 |",
        "| rival                             |     12.0 |           - |              - |",
    ]


def test_variants_compare_by_the_time_of_a_flop():
    assert "| rival                              |  150 (4.00) |" in table.against_base(ROWS[:2], table.TIME_PER_FLOP)


def test_bandwidth_is_a_share_of_a_copy_s_where_there_is_one():
    rows = [ROW, replace(ROW, contender="copy", gbytes_per_second=20.0), replace(ROW, direction="backward")]
    assert table.of_bandwidth(rows, "copy") == (
        "| forward, GB/s (share of copy) |    1x16x8x8 | geometric mean |\n"
        "|-------------------------------|------------:|---------------:|\n"
        "| involution                    | 5.00 (0.25) |           0.25 |\n"
        "| copy                          | 20.0 (1.00) |           1.00 |"
    )


def test_the_ratio_of_a_rednet_to_its_mirror_is_printed():
    assert table.with_ratios(MODELS, table.TIME) == (
        "| inference, ms       | 1x16x8x8 |\n"
        "|---------------------|---------:|\n"
        "| rednet50            |     3.00 |\n"
        "| resnet50            |     2.00 |\n"
        "| rednet50 / resnet50 |     1.50 |\n"
        "\n"
        "| training step, ms   | 8x16x8x8 |\n"
        "|---------------------|---------:|\n"
        "| resnet50            |     8.00 |\n"
        "| rednet50            |     2.00 |\n"
        "| rednet50 / resnet50 |     0.25 |"
    )


def test_the_summary_has_a_line_for_each_pair():
    assert table.summary([row if row.shape[0] == "8" else replace(row, peak_mib=None) for row in MODELS]) == (
        "| times as much       | inference, batch 1 | training step, batch 8 | training step, batch 8, memory |\n"
        "|---------------------|-------------------:|-----------------------:|-------------------------------:|\n"
        "| rednet50 / resnet50 |               1.50 |                   0.25 |                           1.00 |"
    )


def test_a_picture_is_drawn_though_a_panel_is_missing(tmp_path):
    draw([*MODELS, replace(MODELS[0], shape="2x16x8x8")], {"rednet50"}, tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")
