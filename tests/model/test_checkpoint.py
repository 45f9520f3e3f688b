from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import EMBEDDED_CHECKPOINT, CheckpointError, load_checkpoint, read_config, save_checkpoint
from model.config import ModelConfig
from model.convert import round_matrices
from tests.model.shapes import SMALL, random_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(random_model(), tmp_path, {"steps": 3})
    return tmp_path


def edit(folder: Path, **model: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model"].update(model)
    path.write_text(json.dumps(config))


def test_a_checkpoint_comes_back_bit_for_bit(folder: Path) -> None:
    saved, loaded = random_model().state_dict(), load_checkpoint(folder).state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in saved.items())
    assert read_config(folder).provenance == {"steps": 3}
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_matrices_that_bf16_has_take_half_the_room_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    model = random_model()
    save_checkpoint(model, tmp_path / "fp32")
    round_matrices(model)
    save_checkpoint(model, tmp_path / "bf16")
    stored = load_file(tmp_path / "bf16" / "model.safetensors")
    assert stored["trunk.0.mixer.in_proj.weight"].dtype == torch.bfloat16
    assert stored["trunk.0.mixer.A_log"].dtype == torch.float32
    loaded = load_checkpoint(tmp_path / "bf16").state_dict()
    assert all(value.dtype == loaded[name].dtype for name, value in model.state_dict().items())
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("bf16", "fp32")]
    assert sizes[0] < 0.65 * sizes[1]


def test_whoever_may_read_the_config_may_read_the_weights(folder: Path) -> None:
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_a_loaded_model_is_ready_to_serve(folder: Path) -> None:
    model = load_checkpoint(folder)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, r"model\.surprise: Extra inputs"),
        ({"d_model": "32"}, r"model\.d_model: .*got '32'"),
        ({"d_model": 0}, r"model\.d_model: .*greater than or equal to 1"),
        ({"headdim": 24}, "must be a multiple of headdim"),
        ({"d_state_levels": [16, 8]}, "d_state_levels"),
        ({"dt_limits": [0.1, 0.01]}, r"dt_limits = \(0\.1, 0\.01\) must be at least 0, and rise"),
        ({"dt_limits": [-0.1, None]}, "dt_limits"),
        ({"tied_head": False}, r"does not fit config\.json"),
        ({"name": "a b"}, r"model\.name"),
        ({"trunk_layers": 3}, r"does not fit config\.json"),
    ],
)
def test_a_bad_value_is_named(folder: Path, change: dict, message: str) -> None:
    edit(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_weights_of_its_own_for_the_head_come_back(tmp_path: Path) -> None:
    model = random_model(ModelConfig(**{**SMALL.model_dump(), "tied_head": False, "dt_limits": (0.001, 0.1)}))
    save_checkpoint(model, tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded.head_weight, model.output.weight)
    assert not torch.equal(loaded.head_weight, loaded.embedding.weight)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors", b"\xff" * 64])
def test_missing_or_damaged_weights_are_named(folder: Path, content: bytes | None) -> None:
    weights = folder / "model.safetensors"
    weights.unlink() if content is None else weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        load_checkpoint(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")


def test_the_embedded_checkpoint_was_trained_and_calibrated() -> None:
    model = load_checkpoint(EMBEDDED_CHECKPOINT)
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 4e6
    assert read_config(EMBEDDED_CHECKPOINT).provenance["bytes"] >= 8e6
    for table in (model.tiles.log_thresholds, model.tiles.log_prices):
        assert (table.diff() <= 0).all(), "a higher rate never has a higher threshold"
        assert table[0] > table[-1]
