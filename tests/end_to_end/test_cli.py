from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.checkpoint import save_checkpoint
from model.cost import CostModel
from service.cli import main
from tests.service.servers import TINY, tiny_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    save_checkpoint(tiny_model(), tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_generate_prints_text_and_then_figures(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint", checkpoint, "--max-tokens", "9", "--seed", "1", "--budget", "0.8", "--device", "cpu"]
    assert main(["generate", "abc", *options]) == 0
    first = capsys.readouterr()
    assert first.out.strip("\n")
    assert "[budget 0.8, granted 0.8, spent 0." in first.err
    assert "4 tokens read" in first.err
    assert main(["generate", "abc", *options]) == 0
    assert capsys.readouterr().out == first.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--budget", "0"], "target must be a number greater than 0"),
        (["generate", "x", "--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["generate", "x", "--top-p", "2"], "--top-p must be greater than 0"),
        (["generate", "x", "--checkpoint", "/nowhere"], "no checkpoint at /nowhere"),
        (["serve", "--port", "70000"], "port: "),
        (["evaluate", "--documents", "/nowhere"], "cannot read documents from /nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_evaluate_reports_budgets_in_the_order_asked(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = tmp_path / "documents.txt"
    documents.write_bytes(b"first document, long enough to be worth it. " * 60 + b"\0" + "zweites: äöü".encode())
    arguments = ["evaluate", "--documents", str(documents), "--checkpoint", checkpoint, "--budgets", "0.7,floor,1"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["documents"], report["bytes"]) == (2, documents.stat().st_size - 1)
    assert [row["budget"] for row in report["budgets"]] == [0.7, "floor", 1.0]
    ratios = [row["flop_ratio"] for row in report["budgets"]]
    assert ratios == [pytest.approx(0.7, rel=0.05), CostModel(TINY).floor, 1.0]
    assert main(arguments) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_evaluate_refuses_a_bad_budget(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--documents", "x", "--budgets", "1,2"])
    assert "budget '2' must be a number in (0, 1] or 'floor'" in capsys.readouterr().err


def test_a_bad_setting_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RHEOSTAT_MAX_RUNNING", "many")
    assert main(["serve"]) == 2
    assert "max_running: Input should be a valid integer" in capsys.readouterr().err
