"""``rheostat evaluate`` as a whole."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

import model.evaluation.experiment
from model.checkpoint import save_checkpoint
from model.evaluation.arms import ONLY, PLANNED_ARMS, STRICT_ARMS, WITHOUT
from model.evaluation.passages import FUTURE_CHARGE
from model.evaluation.strict import StrictEvaluation
from service.cli import main
from tests.model.evaluation.texts import document
from tests.model.shapes import SMALL, UNMEASURED, random_model

PLAIN = SMALL.model_copy(update={"name": "little", "trunk_layers": 1})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(random_model(), tmp_path / "elastic")
    save_checkpoint(random_model(PLAIN), tmp_path / "little")
    save_checkpoint(random_model(seed=1), tmp_path / "large")
    for name, length, seeds in (
        ("code.test", 1600, range(5)),
        ("prose.test", 500, range(10, 13)),
        ("code.valid", 1600, range(20, 50)),
    ):
        documents = [document(length + 40 * seed, seed) for seed in seeds]
        (tmp_path / f"{name}.txt.xz").write_bytes(lzma.compress(b"\0".join(documents) + b"\0"))
    return tmp_path


def evaluate(folder: Path, *options: str, documents: tuple[str, ...] = ("code.test.txt.xz",)) -> dict[str, Any]:
    """The results that the command writes."""
    written = folder / "results.json"
    files = [str(folder / name) for name in documents]
    checkpoint = ["--checkpoint", str(folder / "elastic"), "--device", "cpu"]
    assert main(["evaluate", "--documents", *files, *checkpoint, *options, "--json", str(written)]) == 0
    return json.loads(written.read_text())


def calibration(folder: Path) -> tuple[str, str]:
    return ("--calibration", str(folder / "code.valid.txt.xz"))


def test_every_arm_plain_models_and_both_domains(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ("--plain", str(folder / "little"), str(folder / "large"))
    both = ("code.test.txt.xz", "prose.test.txt.xz")
    results = evaluate(folder, "--arms", "all", *calibration(folder), *plain, documents=both)
    assert {"model": "small", "protocol": "P0", "documents": 8}.items() <= results.items()
    assert [row["budget"] for row in results["budgets"]][:5] == [1.0, 0.85, 0.55, 0.35, "floor"]
    assert list(results["domains"]) == ["code", "prose"]
    for domain in results["domains"].values():
        assert list(domain["arms"]) == list(STRICT_ARMS)
        shipped = {row["label"]: row for row in domain["arms"]["adaptive"]}
        assert list(shipped) == ["1", "0.85", "0.55", "0.35", "floor", "rate 1/2", "rate 1/4"]
        assert shipped["1"]["recovered"] == {"value": 1.0, "interval": [1.0, 1.0]}
        assert shipped["floor"]["recovered"] == {"value": 0.0, "interval": [0.0, 0.0]}
        for rows in domain["arms"].values():
            for row in rows:
                low, high = row["interval"]
                assert low <= row["bits_per_byte"] <= high
                lost = shipped["floor"]["bits_per_byte"] - row["bits_per_byte"]
                assert row["recovered"]["value"] == pytest.approx(lost / domain["range"]["value"])
                gain = shipped[row["label"]]["recovered"]["value"] - row["recovered"]["value"]
                assert row["adaptive_gain"]["value"] == pytest.approx(gain, abs=1e-9)
                assert row["charge"] == 0.0
        few, many = (
            [row["label"] for row in domain["arms"][arm] if 0.0 < row["fire_rate"] < 1.0]
            for arm in ("only-predictive_entropy", "uniform")
        )
        assert (few, many) == (["rate 1/2"], ["0.85", "rate 1/2", "rate 1/4"])
        assert [row["name"] for row in domain["plain"]] == ["little", "large"]
        assert domain["plain"][1]["flop_ratio"] == 1.0
        line = {row["label"]: row for row in domain["frontier"]}
        assert line["1"]["line"] == pytest.approx(domain["plain"][1]["bits_per_byte"])
        assert line["1"]["gap"]["value"] == pytest.approx(shipped["1"]["bits_per_byte"] - line["1"]["line"])
        assert line["floor"]["beyond"]
        assert set(domain["references"]) == {"xz -9", "zstd -19"}
        assert all(1.0 < bits < 8.0 for bits in domain["references"].values())
        assert all(len(part["bits"]) == domain["documents"] for part in domain["per_document"]["scores"].values())
    table = capsys.readouterr().out
    for expected in ("adaptive against uniform: ", "range, floor - full: ", "plain little: ", "zstd -19: ", "rate 1/4"):
        assert expected in table


def test_a_density_of_one_feature_has_no_arms_of_features(folder: Path) -> None:
    save_checkpoint(random_model(UNMEASURED), folder / "elastic")
    results = evaluate(folder, "--arms", "all", *calibration(folder), "--rates", "1/2")
    assert list(results["domains"]["code"]["arms"]) == [name for name in STRICT_ARMS if name not in (*ONLY, *WITHOUT)]


def test_the_shipped_rule_scores_as_it_does_document_by_document(folder: Path) -> None:
    results = evaluate(folder, "--budgets", "0.7,floor")
    strict = StrictEvaluation(random_model(), [0.7, random_model().cost.floor])
    for content in lzma.decompress((folder / "code.test.txt.xz").read_bytes()).split(b"\0")[:-1]:
        strict.add(content)
    for row, score in zip(results["budgets"], strict.scores, strict=True):
        assert row["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)
        assert row["flop_ratio"] == score.flop_ratio
    assert results["domains"]["code"]["range"] == {"value": None, "interval": None}


def test_a_plan_that_sees_its_block_is_charged_and_called_a_bound(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = evaluate(folder, "--protocol", "P2", "--arms", "all", *calibration(folder), "--rates", "1/2")
    domain = results["domains"]["code"]
    per_document = domain["per_document"]
    assert list(domain["arms"]) == list(PLANNED_ARMS)
    for arm, rows in domain["arms"].items():
        (row,) = (row for row in rows if row["label"] == "rate 1/2")
        bits = sum(per_document["scores"][f"{arm}/rate 1/2"]["bits"]) / sum(per_document["bytes"])
        owed = FUTURE_CHARGE if arm in ("adaptive", "threshold") else 0.0
        assert row["charge"] == owed
        assert row["bits_per_byte"] == pytest.approx(bits + owed)
        difference = row["uncharged"]["value"] - row["recovered"]["value"]
        assert difference * domain["range"]["value"] == pytest.approx(owed, abs=1e-9)
        (shipped,) = (other for other in domain["arms"]["adaptive"] if other["label"] == "rate 1/2")
        gain = shipped["recovered"]["value"] - row["recovered"]["value"]
        assert row["adaptive_gain"]["value"] == pytest.approx(gain, abs=1e-9)
        assert all(end["charge"] == 0.0 for end in rows if end["label"] in ("1", "floor"))
    assert results["budgets"][-1]["bits_per_byte"] == pytest.approx(domain["arms"]["adaptive"][-1]["bits_per_byte"])
    assert "an upper bound on what placement can give" in capsys.readouterr().out


def test_serving_scores_continuations_only(folder: Path) -> None:
    results = evaluate(folder, "--protocol", "P1", "--budgets", "1,0.7,floor")
    domain = results["domains"]["code"]
    assert results["bytes"] == domain["bytes"] == 5 * 512
    assert domain["references"] == {}
    assert pytest.approx(results["budgets"][1]["flop_ratio"], rel=0.05) == 0.7
    (folder / "code.test.txt.xz").write_bytes(lzma.compress(b"too short"))
    options = ["evaluate", "--documents", str(folder / "code.test.txt.xz"), "--checkpoint", str(folder / "elastic")]
    assert main([*options, "--protocol", "P1"]) == 2


def test_a_stopped_evaluation_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--budgets", "1,floor")
    whole = evaluate(folder, *options)
    scored, score = [], model.evaluation.experiment.score

    def counting(*arguments: Any) -> Any:
        scored.append(1)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(model.evaluation.experiment, "score", counting)
    files = ["--documents", str(folder / "code.test.txt.xz"), "--checkpoint", str(folder / "elastic")]
    written = ["--json", str(folder / "results.json")]
    assert main(["evaluate", *files, *options, *written]) == 130
    assert (folder / "results.json.partial").read_text().count("\n") == 3  # a head, and two documents
    assert evaluate(folder, *options) == whole
    assert len(scored) == 3 + 3
    assert not (folder / "results.json.partial").exists()


def test_another_evaluation_does_not_go_on_with_it(folder: Path) -> None:
    (folder / "results.json.partial").write_text('{"identity": "another"}\n{"domain": "code", "document": 0}\n')
    assert evaluate(folder, "--budgets", "1,floor")["documents"] == 5


def test_results_are_shown_and_drawn_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(folder, "--arms", "uniform", "--rates", "1/2", "--plain", str(folder / "little"))
    table = capsys.readouterr().out
    for name, mark in (("again.svg", b"<?xml"), ("again.png", b"\x89PNG")):
        shown = ["evaluate", "--from", str(folder / "results.json"), "--plot", str(folder / name)]
        assert main(shown) == 0
        assert capsys.readouterr().out == table
        assert (folder / name).read_bytes().startswith(mark)
    assert "<!-- little -->" in (folder / "again.svg").read_text()  # letters are outlines; what they say stands beside


def test_plain_models_that_were_scored_before_are_compared_with_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points, earlier = ("--budgets", "1,0.6,floor"), folder / "earlier.json"
    scored = evaluate(folder, *points, "--plain", str(folder / "little"), str(folder / "large"))
    (folder / "results.json").rename(earlier)
    lent = ("--plain-from", str(earlier))
    assert evaluate(folder, *points, *lent) == scored
    fresh = evaluate(folder, *points, *lent, "--checkpoint", str(folder / "large"))
    assert fresh["domains"]["code"]["plain"][1]["above_full"]["value"] == pytest.approx(0.0, abs=1e-9)
    evaluate(folder, "--budgets", "1")
    (folder / "results.json").rename(folder / "none.json")
    elastic = ["evaluate", "--checkpoint", str(folder / "elastic"), *points, *lent]
    code, prose = (str(folder / f"{name}.test.txt.xz") for name in ("code", "prose"))
    for options, message in (
        (["--documents", prose], "has no domain 'prose', only code"),
        (["--documents", f"code={prose}"], "the documents of 'code' are not those that"),
        (["--documents", code, "--plain", str(folder / "little")], "'little' was scored, and stands in"),
        (["--documents", code, "--protocol", "P1"], "is of protocol P0, not P1"),
        (["--documents", code, "--plain-from", str(folder / "none.json")], "holds no scores of plain models"),
    ):
        assert main([*elastic, *options]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--documents is required"),
        (["--documents", "{code}", "--arms", "best"], "arm 'best' of protocol P0 must be one of adaptive"),
        (["--documents", "{code}", "--arms", "threshold"], "the arms threshold need calibration text"),
        (["--documents", "{code}", "{code}"], "two domains are called 'code': name them"),
        (["--documents", "{code}", "--arms", "threshold", "--calibration", "{code}"], "beside what is evaluated"),
        (
            ["--documents", "{code}", "--arms", "threshold", "--calibration", "{code}", "--document-bytes", "9"],
            " holds 0 bytes beside what is evaluated",
        ),
        (["--documents", "{code}", "--plain", "/nowhere"], "no checkpoint at /nowhere"),
        (["--documents", "{code}", "--json", "/nowhere/results.json"], "/nowhere"),
        (["--from", "/nowhere"], "cannot read results from /nowhere"),
        (["--from", "{config}"], "holds no results of rheostat evaluate"),
        (["--from", "{config}", "--documents", "{code}"], "--documents has no place beside it"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"code": folder / "code.test.txt.xz", "config": folder / "elastic" / "config.json"}
    filled = [option.format(**names) for option in options]
    assert main(["evaluate", "--checkpoint", str(folder / "elastic"), *filled]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rates", "1/2,2"], "rate '2' must be a number in (0, 1]"),
        (["--rates", "1/0"], "rate '1/0' must be a number in (0, 1]"),
        (["--plot", "frontier.pdf"], "'frontier.pdf' must end in .svg or .png"),
        (["--plot", "/nowhere/frontier.svg"], "must be in a folder that exists"),
        (["--protocol", "P3"], "P3"),
        (["--max-bytes", "0"], "'0' must be a whole number of at least 1"),
    ],
)
def test_bad_arguments_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--documents", "x", *options])
    assert message in capsys.readouterr().err


def test_domains_can_be_named(folder: Path) -> None:
    files = [f"{name}={folder / 'code.test.txt.xz'}" for name in ("one", "two")]
    options = ["--checkpoint", str(folder / "elastic"), "--budgets", "floor", "--json", str(folder / "named.json")]
    assert main(["evaluate", "--documents", *files, *options]) == 0
    assert list(json.loads((folder / "named.json").read_text())["domains"]) == ["one", "two"]


def test_pictures_need_their_library(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("model.evaluation.cli.find_spec", lambda _: None)
    assert main(["evaluate", "--documents", "x", "--plot", "frontier.svg"]) == 2
    assert "pip install 'rheostat[plot]'" in capsys.readouterr().err
