from dataclasses import replace
from pathlib import Path

import pytest

from involution.analysis import record
from involution.analysis.readme import measurements, readme
from involution.analysis.record import Row

ROOT = Path(__file__).parents[2]
ROW = Row(
    *("op", "involution", "involution", "forward", "1x16x8x8", "K3 D16", "float32", "channels_last", 3),
    *(1.0, 2.0, 3.0, 40.0, 5.0, 8.0, 2, "a processor", "C++, baseline", "2.14", "abc1234", "2026-01-02T03:04:05"),
)
RIVAL = replace(ROW, contender="rival", p50_ms=4.0)


def test_the_readme_says_what_was_committed(tmp_path):
    text = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(text)
    readme(tmp_path / "README.md", ROOT / "benchmarks")
    assert (tmp_path / "README.md").read_text() == text, "run `involution bench readme`"


def test_without_rows_it_says_so(tmp_path):
    assert measurements(tmp_path).startswith("There are no committed measurements yet;")


def test_the_newest_rows_of_every_file_are_told(tmp_path):
    later = "2026-02-03T00:00:00"
    backward = replace(ROW, direction="backward")
    record.add(
        [ROW, RIVAL, *(replace(row, date=later, p50_ms=2 * row.p50_ms) for row in (ROW, RIVAL, backward))],
        tmp_path / "op.csv",
    )
    networks = [
        replace(ROW, benchmark="model", contender=name, base="resnet50", direction="inference", p50_ms=time, window="")
        for name, time in (("rednet50", 3.0), ("resnet50", 2.0))
    ]
    record.add(networks, tmp_path / "model.csv")
    assert measurements(tmp_path) == (
        "The operator and its rivals (K3 D16, float32, channels_last); in brackets, how many times as long as ours. "
        "Medians of interleaved rounds on a processor, 2 threads, torch 2.14, commit abc1234, 2026-02-03.\n"
        "\n"
        "| forward, ms (times as long) |    1x16x8x8 | geometric mean |\n"
        "|-----------------------------|------------:|---------------:|\n"
        "| involution                  | 4.00 (1.00) |           1.00 |\n"
        "| rival                       | 8.00 (2.00) |           2.00 |\n"
        "\n"
        "Networks (channels_last): time and peak memory, divided. "
        "Medians of interleaved rounds on a processor, 2 threads, torch 2.14, commit abc1234, 2026-01-02.\n"
        "\n"
        "| times as much       | inference, batch 1 | inference, batch 1, memory |\n"
        "|---------------------|-------------------:|---------------------------:|\n"
        "| rednet50 / resnet50 |               1.50 |                       1.00 |"
    )


def test_a_file_without_the_comments_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# Nothing\n")
    with pytest.raises(ValueError, match="`file` must hold the lines '<!-- measurements"):
        readme(tmp_path / "README.md", tmp_path)


def test_rows_of_a_gpu_are_told_apart(tmp_path):
    rows = [
        replace(ROW, device="a GPU", dtype="bfloat16"),
        replace(ROW, device="a GPU", dtype="bfloat16", contender="copy of 1 GiB"),
        replace(ROW, device="a GPU", dtype="bfloat16", benchmark="layer"),
        *(
            replace(ROW, device="a GPU", dtype="bfloat16", benchmark="model", contender=name, base="resnet50")
            for name in ("rednet50", "resnet50")
        ),
    ]
    record.add(rows, tmp_path / "gpu.csv")
    text = measurements(tmp_path)
    assert text.count("On a GPU, the operator and its rivals (bfloat16, channels_last). Medians on a GPU,") == 1
    assert text.count("On a GPU, the layer (bfloat16, channels_last).") == 1
    assert "| rednet50 / resnet50 |" in text
    assert "copy of" not in text


def test_scenes_are_told_with_the_measures_they_have(tmp_path):
    (tmp_path / "scenes").mkdir()
    for name, measure in (("boxes", "AP50,0.8765"), ("maps", "mIoU,0.7512")):
        column, value = measure.split(",")
        (tmp_path / "scenes" / f"{name}.csv").write_text(
            f"recipe,model,parameters,{column},minutes,threads,device,torch,commit\n"
            f"scenes/{name},rednet26,1234567,{value},5.5,2,a processor,2.14,abc1234\n"
        )
    told = measurements(tmp_path).splitlines()
    assert told[0].endswith(
        "On a processor, torch 2.14; boxes: 2 threads, commit abc1234; maps: 2 threads, commit abc1234."
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in told[2:]]
    assert cells[0] == ["recipe", "backbone", "parameters", "AP50", "mIoU", "minutes of training"]
    assert cells[2:] == [
        ["scenes/boxes", "rednet26", "1,234,567", "87.6%", "-", "5.5"],
        ["scenes/maps", "rednet26", "1,234,567", "-", "75.1%", "5.5"],
    ]
