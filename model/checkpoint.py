"""Checkpoints: a folder with the weights as safetensors and the shape as strict JSON. No code is ever loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from model.config import ModelConfig, StrictModel
from model.lm import AdaptiveAttentionSystem
from model.ops.words import exact_in_bf16
from model.subword import SubwordError, SubwordTokenizer
from model.tokenizer import ByteTokenizer, Tokenizer

EMBEDDED_CHECKPOINT = Path(__file__).parent / "weights" / "rheostat-small"

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
"""Only where tokens are no bytes."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another shape."""


TokenId = Annotated[int, Field(ge=0)]


class SpecialTokens(StrictModel):
    """What a ``tokenizer.json`` does not say."""

    start: TokenId
    """Begins a sequence where the tokenizer puts nothing in front."""
    ends: tuple[TokenId, ...]
    """End a generation."""


class CheckpointConfig(StrictModel):
    """Content of ``config.json``."""

    format: Literal[1] = 1
    model: ModelConfig
    special_tokens: SpecialTokens | None = None
    """Of the tokenizer beside the weights; None where tokens are bytes."""
    provenance: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """How the weights came to be; for people, nothing reads it."""


def read_config(folder: Path) -> CheckpointConfig:
    """The configuration of a checkpoint.

    Raises:
        CheckpointError: the file is missing, not JSON, or has an unknown key or a bad value.
    """
    path = folder / CONFIG_FILE
    try:
        return CheckpointConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"no checkpoint at {folder}: {error.strerror} ({path.name})") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "file"
        raise CheckpointError(f"{path}: {key}: {first['msg']} (got {first['input']!r})") from error


def load_checkpoint(folder: Path, device: str | torch.device = "cpu") -> AdaptiveAttentionSystem:
    """The model of a checkpoint, ready to serve (evaluation mode, no gradients).

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    config = read_config(folder)
    model = AdaptiveAttentionSystem(config.model)
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {folder / WEIGHTS_FILE}: {error}") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {error}") from error
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint: the file beside the weights, or bytes where there is none.

    Raises:
        CheckpointError: the file is missing, unusable or superfluous, or the vocabulary is not that of bytes.
    """
    config, path = read_config(folder), folder / TOKENIZER_FILE
    special, model = config.special_tokens, config.model
    if special is None and path.exists():
        raise CheckpointError(f"{folder / CONFIG_FILE}: special_tokens is missing, which {TOKENIZER_FILE} needs")
    try:
        if special is not None:
            return SubwordTokenizer.read(path, model.vocab_size, special.start, special.ends)
        tokenizer = ByteTokenizer()
        tokenizer.require_vocabulary(model.name, model.vocab_size)
    except SubwordError as error:
        raise CheckpointError(str(error)) from error
    except ValueError as error:
        raise CheckpointError(f"{error}, and there is no {path} to read others") from error
    return tokenizer


def save_checkpoint(
    model: AdaptiveAttentionSystem,
    folder: Path,
    provenance: Mapping[str, str | int | float | bool] | None = None,
    special_tokens: SpecialTokens | None = None,
) -> None:
    """Write a checkpoint, without its tokenizer; each file appears whole or not at all.

    A matrix of which bf16 has every number is written in bf16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = CheckpointConfig(model=model.config, special_tokens=special_tokens, provenance=dict(provenance or {}))
    weights = {name: _smallest(value.detach().cpu().contiguous()) for name, value in model.state_dict().items()}
    partial = folder / f"{WEIGHTS_FILE}.partial"
    partial.write_bytes(save(weights))  # save_file makes a file that only its owner may read, whatever the umask
    partial.replace(folder / WEIGHTS_FILE)
    text = folder / f"{CONFIG_FILE}.partial"
    text.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    text.replace(folder / CONFIG_FILE)


def _smallest(value: Tensor) -> Tensor:
    return value.to(torch.bfloat16) if value.dim() == 2 and exact_in_bf16(value) else value
