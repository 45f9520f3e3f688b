"""At full budget the model is a plain Mamba-2, held against an independent implementation: transformers'."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM

from model.config import ModelConfig
from model.lm import AdaptiveAttentionSystem
from tests.model.shapes import SMALL, random_model, random_tokens


def transplant(model: AdaptiveAttentionSystem) -> Mamba2ForCausalLM:
    """The same weights in transformers' Mamba-2, for a model of one width."""
    config = model.config
    blocks = [*model.encoder, *model.trunk, *model.decoder]
    other = Mamba2ForCausalLM(
        Mamba2Config(
            num_heads=config.heads(config.d_model), head_dim=config.headdim, vocab_size=config.vocab_size,
            hidden_size=config.d_model, state_size=config.d_state, num_hidden_layers=len(blocks), expand=config.expand,
            conv_kernel=config.d_conv, n_groups=1, chunk_size=32, layer_norm_epsilon=config.norm_eps, use_cache=False,
            tie_word_embeddings=False, residual_in_fp32=True,
            time_step_limit=(config.dt_limits[0], config.dt_limits[1] or math.inf),
        )
    )  # fmt: skip
    weights = {
        "backbone.embeddings.weight": model.embedding.weight,
        "backbone.norm_f.weight": model.final_norm.weight,
        "lm_head.weight": model.head_weight,
    }
    for index, block in enumerate(blocks):
        mixer, name = block.mixer, f"backbone.layers.{index}"
        weights[f"{name}.norm.weight"] = block.norm.weight
        weights[f"{name}.mixer.conv1d.weight"] = mixer.conv_weight.unsqueeze(1)
        weights[f"{name}.mixer.conv1d.bias"] = mixer.conv_bias
        for part in ("dt_bias", "A_log", "D"):
            weights[f"{name}.mixer.{part}"] = getattr(mixer, part)
        for part in ("in_proj", "norm", "out_proj"):
            weights[f"{name}.mixer.{part}.weight"] = getattr(mixer, part).weight
    other.load_state_dict(weights)
    return other.eval()


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 1),
        ({}, 77),
        ({"expand": 4, "headdim": 32, "chunk_size": 8}, 64),
        ({"d_state": 24, "d_state_levels": (24,), "d_conv": 3}, 50),
        ({"d_model": 48, "d_trunk": 48, "headdim": 8, "trunk_layers": 3, "decoder_layers": 0}, 33),
        ({"tied_head": False, "vocab_size": 500}, 20),
        ({"dt_limits": (0.02, 0.06)}, 40),
    ],
)
def test_full_budget_equals_an_independent_mamba2(changes: dict, length: int) -> None:
    config = ModelConfig(**{**SMALL.model_dump(), "d_trunk": 32, **changes})
    model = random_model(config)
    tokens = random_tokens(2, length)
    if not config.tied_head:
        model.output.weight.normal_()
    with torch.no_grad():
        expected = transplant(model)(tokens).logits
        assert expected.std() > 0.1, "the comparison is of something"
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)


def test_firing_at_every_byte_is_full_budget() -> None:
    model, tokens = random_model(), random_tokens(2, 70)
    torch.testing.assert_close(
        model(tokens, torch.ones_like(tokens, dtype=torch.bool)), model(tokens), atol=1e-5, rtol=0
    )
