"""The log, and the picture of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from model.training.faults import TrainingError
from model.training.log import COLUMNS, Means, TrainingLog, peak_memory, read_log
from service.cli import main


def write_run(folder: Path, offset: float = 0.0, *, plain: bool = False) -> Path:
    log = TrainingLog(folder, 0)
    for step in range(1, 41):
        row = {"step": step, "bytes": 4096 * step, "seconds": 0.5 * step, "loss_full": offset + 8.0 / step}
        if step % 10 == 0:
            row |= {"validation_full": offset + 2.0} | ({} if plain else {"validation_floor": offset + 3.0})
        log.write(row)
    return folder


def test_rows_are_appended_and_what_they_lack_is_empty(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    log.write({"step": 1, "bytes": 4096, "loss_full": 2.123456789})
    log.write({"step": 2, "bytes": 1 << 40})
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    first, second = read_log(tmp_path)
    assert {name: value for name, value in first.items() if value} == {
        "step": "1",
        "bytes": "4096",
        "loss_full": "2.1234568",
    }
    assert second["bytes"] == str(1 << 40)
    with pytest.raises(AssertionError, match=r"no columns for \['loss_magic'\]"):
        log.write({"step": 3, "loss_magic": 1.0})


def test_a_resumed_log_keeps_the_rows_of_the_steps_done(tmp_path: Path) -> None:
    write_run(tmp_path)
    before = (tmp_path / "log.csv").read_text().splitlines()
    TrainingLog(tmp_path, 25).write({"step": 26, "bytes": 0})
    after = (tmp_path / "log.csv").read_text().splitlines()
    assert after[:26] == before[:26]
    assert after[26].startswith("26,0,,")
    assert len(after) == 27


def test_a_row_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("41,1679")
    assert read_log(tmp_path)[-1]["step"] == "40"
    TrainingLog(tmp_path, 40).write({"step": 41})
    assert read_log(tmp_path)[-1]["step"] == "41"


@pytest.mark.parametrize("text", ["", "step,bytes\n1,2\n"])
def test_a_log_with_other_columns_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(TrainingError, match=r"log.csv has the columns .*, not step,bytes,seconds,"):
        TrainingLog(tmp_path, 0)
    assert (tmp_path / "log.csv").read_text() == text


def test_means_are_taken_over_what_occurred() -> None:
    means = Means()
    means.add({"full": 1.0, "floor": 5.0})
    means.add({"full": 2.0})
    assert means.peek() == means.take() == {"full": 1.5, "floor": 5.0}
    assert means.take() == {}


def test_peak_memory_is_of_this_process() -> None:
    before = peak_memory(torch.device("cpu"))
    assert 50.0 < before < 1 << 20
    block = torch.ones(64 << 18)  # 64 MiB
    assert block.sum() == 64 << 18
    assert peak_memory(torch.device("cpu")) >= before


def test_runs_are_drawn_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / "elastic")), str(write_run(tmp_path / "plain", 0.1, plain=True))]
    picture = tmp_path / "curve.svg"
    assert main(["plot-training", *runs, "--output", str(picture)]) == 0
    assert capsys.readouterr().out == f"{picture}\n"
    drawn = picture.read_text()
    for label in ("elastic", "plain", "validation, full", "validation, floor", "training, full"):
        assert f"<!-- {label} -->" in drawn
    assert "<!-- validation, half of the trunk -->" not in drawn


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / one / "run")) for one in ("a", "b")]
    assert main(["plot-training", *runs, "--output", str(tmp_path / "curve.svg")]) == 0
    assert f"<!-- {runs[0]} -->" in (tmp_path / "curve.svg").read_text()


def test_a_run_that_has_no_rows_yet_is_drawn_empty(tmp_path: Path) -> None:
    TrainingLog(tmp_path / "run", 0)
    assert main(["plot-training", str(tmp_path / "run"), "--output", str(tmp_path / "curve.png")]) == 0
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_a_picture_without_matplotlib_or_runs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot-training", str(tmp_path)]) == 2
    assert f"cannot read {tmp_path}/log.csv: No such file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot-training", str(write_run(tmp_path / "run"))]) == 2
    assert capsys.readouterr().err == "rheostat: pictures need matplotlib: pip install 'rheostat[plot]'\n"
