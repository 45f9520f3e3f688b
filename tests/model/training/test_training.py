"""Whole runs on a tiny corpus."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.checkpoint import load_checkpoint, read_config
from model.config import ModelConfig
from model.convert import convert
from model.training.config import TrainingConfig
from model.training.data import Corpus, CorpusError
from model.training.faults import TrainingError
from model.training.log import read_log
from model.training.loop import Run, train
from model.training.recipe import Recipe
from tests.model.shapes import SMALL
from tests.model.subwords import write_subword_source
from tests.model.test_convert import write_source

SHAPE = ModelConfig(**{**SMALL.model_dump(), "name": "run"})
CONFIG = TrainingConfig(
    steps=6, sequences=2, length=128, warmup=2, validate_every=3, validation_sequences=2, save_every=3, floor_share=0.3
)
RECIPE = Recipe(model=SHAPE, training=CONFIG)


def recipe(**training: object) -> Recipe:
    return RECIPE.model_copy(update={"training": CONFIG.model_copy(update=training)})


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split in ("train", "valid"):
        text = "\0".join(f"document {n}: " + "the quick brown fox jumps. " * 12 for n in range(20)) + "\0"
        (folder / f"prose.{split}.txt").write_text(text)
        (folder / f"code.{split}.txt").write_text(text.replace("fox", "def"))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder).state_dict()


def test_a_stopped_and_resumed_run_ends_where_an_uninterrupted_one_does(corpus: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(Run(corpus, whole), RECIPE)
    stopped = train(Run(corpus, parts, minutes=0.0), RECIPE)  # stops after one step
    assert not torch.equal(stopped.model.embedding.weight, weights(whole)["embedding.weight"])
    train(Run(corpus, parts, resume=True), RECIPE)
    for name, value in weights(whole).items():
        assert torch.equal(weights(parts)[name], value), name


def test_the_loss_falls_on_text_that_repeats(corpus: Path, tmp_path: Path) -> None:
    train(Run(corpus, tmp_path / "out"), recipe(steps=40, learning_rate=1e-2, validate_every=20))
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
    with pytest.raises(TrainingError, match="has other settings"):
        train(Run(corpus, out, resume=True), recipe(seed=9))


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
