from dataclasses import replace

import pytest

from involution.analysis import record
from involution.analysis.record import Row

ROW = Row(
    *("op", "involution", "involution", "forward", "1x16x8x8", "K3 D16", "float32", "channels_last", 3),
    *(1.0, 2.0, 3.0, 40.0, 5.0, None, 2, "a, b", "C++, baseline", "2.14", "abc1234", "2026-01-02T03:04:05"),
)


def test_rows_are_added_to_the_file_and_read_back(tmp_path):
    path = tmp_path / "new" / "op.csv"
    first, second = ROW, replace(ROW, contender="rival", peak_mib=1.5)
    record.add([first], path)
    record.add([second], path)
    assert path.read_text().splitlines()[0] == (
        "benchmark,contender,base,direction,shape,window,dtype,layout,rounds,p20_ms,p50_ms,p80_ms,gflops,"
        "gbytes_per_second,peak_mib,threads,device,implementation,torch,commit,date"
    )
    assert record.read(path) == [first, second]


def test_a_file_of_other_columns_is_refused(tmp_path):
    (tmp_path / "op.csv").write_text("contender,ms\nours,1\n")
    with pytest.raises(ValueError, match="whose columns are not those of today; give another folder"):
        record.check(tmp_path / "op.csv")


def test_figures_are_rates_at_the_median():
    assert record.figures([1.0, 2.0, 4.0], megaflops=10.0, megabytes=1 / 3) == {
        **{"rounds": 3, "p20_ms": 1.4, "p50_ms": 2.0, "p80_ms": 3.2},
        **{"gflops": 5.0, "gbytes_per_second": 0.16667, "peak_mib": None},
    }


def test_only_rows_of_one_run_are_compared():
    later = "2026-01-03T00:00:00"
    old = [ROW, replace(ROW, contender="rival"), replace(ROW, shape="2x16x8x8")]
    assert record.newest([*old, replace(ROW, date=later)]) == [replace(ROW, date=later), old[2]]
