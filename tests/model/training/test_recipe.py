"""Recipes: strict files, options over them, and what the shipped ones promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.checkpoint import EMBEDDED_CHECKPOINT, read_config
from model.config import ModelConfig
from model.cost import CostModel
from model.lm import AdaptiveAttentionSystem
from model.training.config import TrainingConfig
from model.training.recipe import Recipe, RecipeError, read_recipe, shipped_recipes
from service.cli import main

PLAIN = ("plain-floor", "plain-middle", "plain-full")


def full_flops(recipe: Recipe) -> int:
    return CostModel(recipe.model).full_flops(1, 1)


def test_the_shipped_recipes_are_found() -> None:
    assert set(shipped_recipes()) == {"small", "base", *PLAIN}


def test_small_has_the_shape_of_the_embedded_checkpoint() -> None:
    embedded = read_config(EMBEDDED_CHECKPOINT).model
    assert read_recipe("small").model == embedded.model_copy(update={"least_rates": ()}), "those are fitted"


def test_base_has_about_16_million_parameters_and_a_low_floor() -> None:
    recipe = read_recipe("base")
    count = sum(parameter.numel() for parameter in AdaptiveAttentionSystem(recipe.model).parameters())
    assert count == pytest.approx(16e6, rel=0.02)
    assert 2 * count < 40e6  # bytes on disk in bf16
    assert CostModel(recipe.model).floor < 0.25
    assert recipe.training.precision == "bf16"


def test_plain_models_cost_what_they_are_compared_with() -> None:
    floor, middle, full = (full_flops(read_recipe(name)) for name in PLAIN)
    recipe = read_recipe("small").model
    small, (first,) = CostModel(recipe), recipe.shallow_depths
    assert full == pytest.approx(small.full_flops(1, 1), rel=0.01)
    assert floor == small.flops(1, 0, 1, 0, depth=first).total
    assert middle == small.flops(1, 1, 1, 0, depth=first).total


def test_plain_models_read_the_bytes_that_small_reads_at_its_learning_rates() -> None:
    small = read_recipe("small")
    shared = ("steps", "sequences", "length", "seed", "learning_rate", "warmup", "cooldown", "weight_decay", "clip")
    for name in PLAIN:
        recipe = read_recipe(name)
        assert recipe.training.plain
        assert recipe.data == small.data
        for key in shared:
            assert getattr(recipe.training, key) == getattr(small.training, key), (name, key)


def test_a_file_is_read_and_changes_win_over_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "[model]\nd_state_levels = [32, 64]\n[training]\nsteps = 7\nlength = 128\n[data.weights]\nnotes = 1\n"
    )
    recipe = read_recipe(path, {"training": {"length": 256}, "model": {"d_trunk": 192}, "data": {}})
    assert recipe.model == ModelConfig(d_state_levels=(32, 64), d_trunk=192)
    assert recipe.training == TrainingConfig(steps=7, length=256)
    assert recipe.data.weights == {"notes": 1.0}
    path.write_text("")
    assert read_recipe(path) == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nstepz = 100", "[training] stepz = 100: unknown key; did you mean steps?"),
        ("[training]\nqqq = 'x'", "[training] qqq = 'x': unknown key; known: steps, sequences, "),
        ("[training]\nsteps = 0", "[training] steps = 0: Input should be greater than or equal to 1"),
        ("[training]\nsteps = '9'", "[training] steps = '9': Input should be a valid integer"),
        ("[training]\nlearning_rate = nan", "[training] learning_rate = nan: Input should be "),
        (
            "[model]\nd_state_levels = [8, 0]",
            "[model] d_state_levels.1 = 0: Input should be greater than or equal to 1",
        ),
        ("[model]\nd_model = 10", "[model]: expand * d_model = 20 must be a multiple of headdim = 64"),
        ("[data.weights]\ncode = 'x'", "[data] weights.code = 'x': Input should be a valid number"),
        ("[trainig]\nsteps = 1", "[trainig]: unknown table; did you mean training?"),
        ("training = 3", "[training]: Input should be an object"),
        ("[training", " is not valid TOML: "),
    ],
)
def test_a_bad_file_is_refused_with_file_key_value_and_expectation(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, {"training": {}})
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_a_bad_change_is_not_blamed_on_the_file() -> None:
    with pytest.raises(RecipeError, match=r"^command line: \[training\] steps = 0: Input should be greater"):
        read_recipe("small", {"training": {"steps": 0}})


def test_a_missing_recipe_names_those_that_are_shipped() -> None:
    with pytest.raises(RecipeError, match="no recipe 'tiny': No such file or directory, and those shipped are base, "):
        read_recipe("tiny")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "tiny"], "no recipe 'tiny'"),
        (["--steps", "0"], "command line: [training] steps = 0: "),
        (["--shape", "d_modell=3"], "command line: [model] d_modell = 3: unknown key; did you mean d_model?"),
        (["--shape", "d_trunk=wide"], "command line: [model] d_trunk = 'wide': Input should be a valid integer"),
        (["--shape", "d_trunk=256", "--initial", "x"], "--shape cannot change the shape of --initial"),
        (["--weights", "code=1"], "weights name code; the corpus has prose: give weights of these, or by size"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "valid"):
        (tmp_path / f"prose.{split}.txt").write_text("some text\0")
    assert main(["train", str(tmp_path), "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_options_win_over_the_recipe(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / f"prose.{split}.txt").write_text("some text\0")
    recipe, out = tmp_path / "mine.toml", tmp_path / "out"
    recipe.write_text(
        '[model]\nname = "mine"\nd_model = 64\nd_trunk = 64\ntrunk_layers = 2\n[training]\nsteps = 9\nlength = 64\n'
        "sequences = 1\nvalidation_sequences = 1\n[data.weights]\nprose = 2\n"
    )
    options = ["--recipe", str(recipe), "--output", str(out), "--device", "cpu"]
    changes = ["--steps", "1", "--shape", "trunk_layers=1", "--plain", "--weights", "by-size"]
    assert main(["train", str(tmp_path), *options, *changes]) == 0
    saved = read_config(out)
    assert (saved.model.name, saved.model.d_model, saved.model.trunk_layers) == ("mine", 64, 1)
    assert (saved.provenance["steps"], saved.provenance["bytes"], saved.model.adapted) == (1, 64, False)
