"""Whole runs on a tiny corpus."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import load_checkpoint, read_config
from model.convert import convert
from model.training.data import Corpus, CorpusError
from model.training.faults import TrainingError
from model.training.log import read_log
from model.training.loop import Run, train
from model.training.recipe import DataConfig
from model.training.saving import load_state
from model.training.validation import SHARES
from tests.model.subwords import write_subword_source
from tests.model.test_convert import write_source
from tests.model.training.runs import CONFIG, RECIPE, SHAPE, after, recipe, weights


def test_a_stopped_and_resumed_run_ends_where_an_uninterrupted_one_does(corpus: Path, tmp_path: Path) -> None:
    """To the last bit, on one thread: parameters, running statistics, optimiser, validation."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(Run(corpus, whole), RECIPE)
    stopped = train(Run(corpus, parts, minutes=0.0), RECIPE)
    assert stopped.steps == 1
    assert not torch.equal(stopped.model.embedding.weight, weights(whole)["embedding.weight"])
    assert train(Run(corpus, parts, resume=True), RECIPE, stop_asked=after(3)).steps == 4
    assert train(Run(corpus, parts, resume=True), RECIPE).steps == 6
    for name, value in weights(whole).items():
        assert torch.equal(weights(parts)[name], value), name
    one, other = (load_state(folder, "cpu") for folder in (whole, parts))
    assert flat(one.optimizer) == flat(other.optimizer)
    rows, resumed = read_log(whole), read_log(parts)
    assert [int(row["step"]) for row in rows] == [int(row["step"]) for row in resumed] == [1, 2, 3, 4, 5, 6]
    timed = {"seconds", "memory_mib"}
    for row, again in zip(rows, resumed, strict=True):
        for column in row.keys() - timed:  # a session validates after its last step too
            assert row[column] in (again[column], ""), column
        assert float(row["seconds"]) > 0.0
    assert all(float(rows[step - 1][f"validation_{rate}"]) > 0 for step in (3, 6) for rate in SHARES)
    assert all(float(a["seconds"]) < float(b["seconds"]) for a, b in pairwise(resumed))


def flat(value: Any) -> Any:
    """Nested values with tensors as lists of numbers."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flat(inner) for key, inner in value.items()}
    return [flat(inner) for inner in value] if isinstance(value, list) else value


def test_rows_that_will_be_written_again_are_dropped(corpus: Path, tmp_path: Path) -> None:
    """A process that is killed has logged steps after the last saved one."""
    out = tmp_path / "out"
    train(Run(corpus, out), RECIPE, stop_asked=after(3))
    log = out / "log.csv"
    cells = log.read_text().splitlines()[-1].split(",")
    log.write_text(log.read_text() + ",".join(["4", *cells[1:]]) + "\n" + "5,12")
    train(Run(corpus, out, resume=True), RECIPE)
    assert [int(row["step"]) for row in read_log(out)] == [1, 2, 3, 4, 5, 6]


def test_the_loss_falls_on_text_that_repeats(corpus: Path, tmp_path: Path) -> None:
    train(Run(corpus, tmp_path / "out"), recipe(steps=40, learning_rate=1e-2, log_every=20, validate_every=20))
    scores = [float(row["validation_full"]) for row in read_log(tmp_path / "out")]
    assert scores[1] < 5.0
    assert scores[1] < scores[0]


def test_a_run_is_not_overwritten_nor_continued_with_other_settings(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match="holds no run to resume"):
        train(Run(corpus, out, resume=True), RECIPE)
    train(Run(corpus, out, minutes=0.0), RECIPE)
    with pytest.raises(TrainingError, match="already holds a run"):
        train(Run(corpus, out), RECIPE)
    with pytest.raises(TrainingError, match=r"has other settings: \[training\] seed was 0, not 9"):
        train(Run(corpus, out, resume=True), recipe(seed=9))
    other = RECIPE.model_copy(update={"data": DataConfig(weights={"code": 1.0, "prose": 1.0})})
    with pytest.raises(TrainingError, match=r"has other settings: \[data\] weights was \{\}, not \{'code'"):
        train(Run(corpus, out, resume=True), other)
    with (corpus / "code.train.txt").open("a") as file:
        file.write("one more\0")
    with pytest.raises(TrainingError, match=r"reads another text: bytes by domain were \{'code': "):
        train(Run(corpus, out, resume=True), RECIPE)


def test_what_does_not_touch_the_parameters_may_change_on_resume(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(Run(corpus, out, minutes=0.0), RECIPE)
    changed = recipe(checkpointing=True, log_every=2, validate_every=2, save_every=1)
    assert train(Run(corpus, out, resume=True), changed).steps == 6


def test_a_damaged_state_is_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(Run(corpus, out, minutes=0.0), RECIPE)
    state = out / "training.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"training.pt is damaged, or of another version: "):
        train(Run(corpus, out, resume=True), RECIPE)


def test_a_run_keeps_the_shape_of_the_checkpoint_that_it_began_with(corpus: Path, tmp_path: Path) -> None:
    shape = SHAPE.model_copy(update={"d_trunk": 32})
    train(Run(corpus, tmp_path / "first"), RECIPE.model_copy(update={"model": shape}))
    train(Run(corpus, tmp_path / "second", initial=tmp_path / "first", minutes=0.0), RECIPE)
    assert train(Run(corpus, tmp_path / "second", resume=True), RECIPE).model.config == shape


def test_a_plain_run_and_one_from_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    train(Run(corpus, tmp_path / "plain"), recipe(plain=True, steps=2))
    assert not read_config(tmp_path / "plain").model.adapted
    before = weights(tmp_path / "plain")
    still = recipe(steps=1, learning_rate=1e-9, weight_decay=0.0)
    train(Run(corpus, tmp_path / "more", initial=tmp_path / "plain"), still)
    assert read_config(tmp_path / "more").model.adapted
    torch.testing.assert_close(weights(tmp_path / "more")["embedding.weight"], before["embedding.weight"])


def test_a_converted_model_counts_as_adapted_once_its_training_is_finished(corpus: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "converted")

    def adapted(output: str, **changes: object) -> bool:
        run = Run(corpus, tmp_path / output, initial=tmp_path / "converted", minutes=changes.pop("minutes", None))
        train(run, recipe(steps=2, **changes))
        saved = read_config(tmp_path / output).model
        assert saved == load_checkpoint(tmp_path / output).config
        assert saved.model_copy(update={"adapted": False}) == read_config(tmp_path / "converted").model
        return saved.adapted

    assert not read_config(tmp_path / "converted").model.adapted
    assert not adapted("stopped", minutes=0.0)
    assert not adapted("plain", plain=True)
    assert adapted("finished")


def test_subwords_are_not_trained_as_bytes(corpus: Path, tmp_path: Path) -> None:
    write_subword_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "converted")
    with pytest.raises(TrainingError, match=r"training reads bytes, and the tokens of .*converted are subwords"):
        train(Run(corpus, tmp_path / "out", initial=tmp_path / "converted"), RECIPE)
    subwords = RECIPE.model_copy(update={"model": SHAPE.model_copy(update={"vocab_size": 300})})
    with pytest.raises(ValueError, match="run: vocab_size = 300 must be 257 to read bytes"):
        train(Run(corpus, tmp_path / "out"), subwords)


def test_the_bytes_of_all_legs_are_counted(corpus: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    batch = CONFIG.sequences * CONFIG.length
    train(Run(corpus, first), recipe(steps=2))
    short = recipe(steps=3)
    train(Run(corpus, second, initial=first, minutes=0.0), short)  # stops after one step
    assert read_config(second).provenance["bytes"] == 3 * batch
    train(Run(corpus, second, resume=True), short)
    assert read_config(second).provenance == {"steps": 3, "bytes_before": 2 * batch, "bytes": 5 * batch, "seed": 0}


def test_the_same_seed_reads_the_same_bytes_and_sequences_begin_at_a_separator(corpus: Path) -> None:
    text = Corpus.open(corpus, "train", {"code": 0.5, "prose": 0.5})
    assert torch.equal(text.batch(1, 2, 8, 64), text.batch(1, 2, 8, 64))
    assert not torch.equal(text.batch(1, 2, 8, 64), text.batch(1, 3, 8, 64))
    first = text.batch(0, 0, 64, 64)[:, 0]
    assert 16 < (first == 256).sum() < 48
    assert text.batch(0, 0, 1, 100_000).max() == 256


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"code": 1.0}, "weights name"),
        ({"code": -1.0, "prose": 2.0}, "not negative"),
        ({"code": 0.0, "prose": 0.0}, "zero"),
    ],
)
def test_bad_weights_are_refused(corpus: Path, weights: dict[str, float], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        Corpus.open(corpus, "train", weights)


def test_missing_and_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="holds no <domain>"):
        Corpus.open(tmp_path, "train")
    (tmp_path / "prose.train.txt").write_bytes(b"\0\0")
    with pytest.raises(CorpusError, match="holds no documents"):
        Corpus.open(tmp_path, "train")
