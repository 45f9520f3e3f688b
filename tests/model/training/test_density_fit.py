from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_checkpoint, read_config, save_checkpoint
from model.training.density import Evidence, fit_density, read_evidence, with_density
from service.cli import main
from tests.model.shapes import PROPAGATING, SHALLOW, SMALL, random_model, random_tokens

WIDER = SMALL.model_copy(update={"density_hidden": 8, "window_size": 16})


def test_the_fit_finds_what_the_output_says_about_the_worth() -> None:
    torch.manual_seed(0)
    model = random_model()
    hidden = torch.randn(6000, SMALL.d_model)
    worth = (hidden[:, 0] > 0.0).float()
    parts = [Evidence(torch.randn(6000, 4), hidden.half(), worth)] * 30
    before = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("density.")}
    assert fit_density(model.density, parts) < 0.7 * worth.var()  # a constant has the variance, six units are few
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_evidence_is_what_full_resolution_saves_over_none() -> None:
    model, tokens = random_model(), random_tokens(2, 65)
    (found,) = read_evidence(model, tokens, foresight=1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:, None]
    never = torch.zeros_like(inputs, dtype=torch.bool)
    logits = [model(inputs, fires) for fires in (None, never)]
    costs = [-value.log_softmax(-1).gather(-1, targets)[..., 0] / math.log(2.0) for value in logits]
    torch.testing.assert_close(found.worth, (costs[1] - costs[0]).clamp(-8, 8).flatten(), atol=1e-4, rtol=1e-4)
    assert found.features.shape == (128, 4)
    assert found.inputs.shape == (128, SMALL.d_model)


def test_evidence_of_a_stage_is_what_it_saves_over_those_below() -> None:
    model, tokens = random_model(SHALLOW), random_tokens(2, 65)
    found = read_evidence(model, tokens, foresight=1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:, None]
    logits = [model(inputs, torch.zeros_like(inputs, dtype=torch.bool), depth=1)]
    logits += [model(inputs, depth=depth) for depth in SHALLOW.depths]
    costs = [-value.log_softmax(-1).gather(-1, targets)[..., 0] / math.log(2.0) for value in logits]
    for stage, one in enumerate(found):
        worth = (costs[stage] - costs[stage + 1]).clamp(-8, 8).flatten()
        torch.testing.assert_close(one.worth, worth, atol=1e-4, rtol=1e-4)
        assert one.inputs.shape == (128, SHALLOW.d_trunk if stage else SHALLOW.d_model)


def test_another_density_changes_nothing_at_full_budget() -> None:
    model, tokens = random_model(), random_tokens(1, 60)
    other = with_density(model, WIDER)
    assert other.density.inner.shape[0] == 8
    with torch.inference_mode():
        assert torch.equal(other(tokens), model(tokens))


def test_the_command_writes_a_checkpoint_that_serves(corpus: Path, tmp_path: Path) -> None:
    save_checkpoint(random_model(), tmp_path / "old", {"bytes": 7})
    options = ["--units", "8", "--window", "16", "--length", "128", "--sequences", "16", "--weights", "by-size"]
    command = ["fit-density", str(corpus), "--initial", str(tmp_path / "old"), "--output", str(tmp_path / "new")]
    assert main([*command, *options]) == 0
    config = read_config(tmp_path / "new")
    assert config.model == WIDER
    assert config.provenance == {"bytes": 7, "density_bytes": 16 * 128, "density_seed": 0}
    thresholds = load_checkpoint(tmp_path / "new").tiles.log_thresholds
    assert (thresholds.diff() <= 0).all()


def test_a_density_may_do_without_what_is_measured(corpus: Path, tmp_path: Path) -> None:
    save_checkpoint(random_model(), tmp_path / "old")
    options = ["--no-measured", "--inertia", "1", "--restart-bytes", "0", "--length", "128", "--sequences", "16"]
    command = ["fit-density", str(corpus), "--initial", str(tmp_path / "old"), "--output", str(tmp_path / "new")]
    assert main([*command, *options]) == 0
    model = load_checkpoint(tmp_path / "new")
    assert not model.config.density_measured
    assert (model.config.inertia, model.config.restart_bytes) == (1.0, 0.0)
    assert model.config.window_size == SMALL.window_size
    assert model.cost.unit.density < random_model().cost.unit.density
    inputs, outer = random_tokens(1, 40), model.density.outer
    density = model.analyse(inputs)
    assert density.std() > 0.0
    with torch.no_grad():
        outer.zero_()
    assert load_checkpoint(tmp_path / "new").analyse(inputs).equal(density)
    assert model.analyse(inputs).std() < 1e-6  # nothing else is read


def test_where_states_read_between_fires_a_byte_s_own_worth_is_foreseen(corpus: Path, tmp_path: Path) -> None:
    save_checkpoint(random_model(PROPAGATING), tmp_path / "old")
    for name, more in (("default", []), ("one", ["--foresight", "1"]), ("many", ["--foresight", "64"])):
        options = ["--initial", str(tmp_path / "old"), "--output", str(tmp_path / name), "--sequences", "16"]
        assert main(["fit-density", str(corpus), *options, "--length", "128", *more]) == 0
    fitted = [load_checkpoint(tmp_path / name).analyse(random_tokens(1, 40)) for name in ("default", "one", "many")]
    assert fitted[0].equal(fitted[1])
    assert not fitted[0].equal(fitted[2])


def test_a_missing_corpus_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(random_model(), tmp_path / "old")
    command = ["fit-density", str(tmp_path), "--initial", str(tmp_path / "old"), "--output", str(tmp_path / "new")]
    assert main(command) == 2
    assert "train.txt" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
