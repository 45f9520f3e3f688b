from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM

from model.checkpoint import load_checkpoint, read_config
from model.convert import convert, round_matrices
from service.cli import main
from tests.service.servers import serving

PLAIN = {
    "vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 16, "state_size": 16,
    "n_groups": 1, "chunk_size": 16, "initializer_range": 0.1,
}  # fmt: skip


def write_source(folder: Path, changes: dict | None = None, *, shard_size: str = "1GB") -> Mamba2ForCausalLM:
    """A Hugging Face folder with random weights at which nothing is at rest, and its model."""
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**{**PLAIN, **(changes or {})})).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("conv1d.bias", "dt_bias", "A_log", "D", "norm.weight", "norm_f.weight")):
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif name.endswith("embeddings.weight"):
            parameter.mul_(8)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 1),
        ({"chunk_size": 8}, 77),
        ({"expand": 4, "num_heads": 4, "head_dim": 32, "chunk_size": 32}, 45),
        ({"num_heads": 8, "head_dim": 8, "state_size": 24, "conv_kernel": 3}, 50),
        ({"tie_word_embeddings": True, "num_hidden_layers": 7}, 33),
        ({"vocab_size": 500, "layer_norm_epsilon": 1e-3, "use_conv_bias": False}, 20),
        ({"time_step_limit": (0.02, 0.06)}, 40),
    ],
)
def test_full_budget_equals_the_source(tmp_path: Path, changes: dict, length: int) -> None:
    source = write_source(tmp_path / "source", changes)
    config = convert(tmp_path / "source", tmp_path / "ours")
    model = load_checkpoint(tmp_path / "ours")
    tokens = torch.randint(0, config.vocab_size, (2, length))
    expected = source(tokens).logits
    assert expected.std() > 0.1, "the comparison is of something"
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)
    state = model.allocate_state(2)
    rates = torch.ones(2, dtype=torch.float64)
    stepped = torch.stack([model.step(column, state, rates).logits for column in tokens.unbind(1)], 1)
    torch.testing.assert_close(stepped, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("encoder", "decoder"), [(1, 0), (2, 2), (3, 1)])
def test_the_split_changes_nothing_at_full_budget(tmp_path: Path, encoder: int, decoder: int) -> None:
    source = write_source(tmp_path / "source", {"num_hidden_layers": 5})
    options = ["--encoder-layers", str(encoder), "--decoder-layers", str(decoder), "--name", "split"]
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "ours"), *options]) == 0
    model = load_checkpoint(tmp_path / "ours")
    config = model.config
    layers = (config.name, config.encoder_layers, config.trunk_layers, config.decoder_layers)
    assert layers == ("split", encoder, 5 - encoder - decoder, decoder)
    tokens = torch.randint(0, 257, (1, 30))
    torch.testing.assert_close(model(tokens), source(tokens).logits, atol=1e-4, rtol=0)


def test_shards_are_taken(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", shard_size="30KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    convert(tmp_path / "source", tmp_path / "ours")
    tokens = torch.randint(0, 257, (1, 30))
    ours = load_checkpoint(tmp_path / "ours")(tokens)
    torch.testing.assert_close(ours, source(tokens).logits, atol=1e-4, rtol=0)


def test_matrices_are_rounded_on_the_way_or_afterwards(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "at-once"), "--bf16"]) == 0
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "exact"), "--name", "at-once"]) == 0
    assert main(["convert", str(tmp_path / "exact"), str(tmp_path / "later"), "--bf16"]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("at-once", "later", "exact")]
    assert weights[0] == weights[1]
    assert len(weights[0]) < 0.7 * len(weights[2])
    assert read_config(tmp_path / "later") == read_config(tmp_path / "exact")
    round_matrices(source)
    tokens = torch.randint(0, 257, (1, 30))
    ours = load_checkpoint(tmp_path / "later")(tokens)
    torch.testing.assert_close(ours, source(tokens).logits, atol=1e-4, rtol=0)


def test_a_checkpoint_is_not_converted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours")
    for options in ([], ["--bf16", "--name", "other"]):
        assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "none"), *options]) == 2
        assert "is a checkpoint already; all that it can be given is --bf16" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "none" / ".." / "ours"), "--bf16"]) == 2
    assert "the checkpoint needs a folder of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_groups": 2}, "n_groups = 2 must be 1"),
        ({"use_bias": True}, "use_bias: Input should be False (got True)"),
        ({"hidden_act": "gelu"}, "hidden_act: Input should be 'silu' or 'swish' (got 'gelu')"),
        ({"model_type": "mamba"}, "model_type: Input should be 'mamba2' (got 'mamba')"),
        ({"num_heads": 5}, "num_heads * head_dim = 80 must be hidden_size * expand = 64"),
        ({"state_size": "16"}, "state_size: Input should be a valid integer (got '16')"),
        ({"num_hidden_layers": 1}, "num_hidden_layers = 1 must leave at least one layer"),
        ({"state_size": 8}, "backbone.layers.0.mixer.in_proj.weight: shape (164, 32) must be (148, 32)"),
        ({"num_hidden_layers": 4}, "backbone.layers.3.norm.weight is missing"),
        ({"num_hidden_layers": 2}, "backbone.layers.2.mixer.A_log: no part of a Mamba-2 of this config"),
        ({"tie_word_embeddings": True}, "lm_head.weight must equal backbone.embeddings.weight"),
    ],
)
def test_what_cannot_be_converted_is_named(
    tmp_path: Path, changes: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    assert main(["convert", str(tmp_path), str(tmp_path / "ours")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_damaged_and_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "ours")]) == 2
    assert "no model at" in capsys.readouterr().err
    write_source(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    assert main(["convert", str(tmp_path), str(tmp_path / "ours")]) == 2
    assert "cannot read the weights" in capsys.readouterr().err
    save_file(weights, tmp_path / "outside.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "../outside.safetensors")}))
    assert main(["convert", str(tmp_path), str(tmp_path / "ours")]) == 2
    assert "must be a file of the same folder" in capsys.readouterr().err
    index.write_text("[]")
    assert main(["convert", str(tmp_path), str(tmp_path / "ours")]) == 2
    assert "weight_map must map" in capsys.readouterr().err


def test_a_converted_model_serves_and_says_that_it_is_not_adapted(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours")
    tokens = [256, *b"abc"]
    for _ in range(8):
        tokens.append(int(source(torch.tensor([tokens])).logits[0, -1].argmax()))
    with serving(load_checkpoint(tmp_path / "ours")) as server:
        assert server.client.get("/v1/models").json()["data"][0]["adapted"] is False
        answer = server.complete(prompt="abc", max_tokens=8, ignore_eos=True)
        text = bytes(token for token in tokens[4:] if token != 256).decode("utf-8", errors="replace")
        assert answer["choices"][0]["text"] == text
        assert server.complete(prompt="abc", max_tokens=8, compute_budget=0.8)["usage"]["compute"]["spent"] < 1
