"""From a Hugging Face Mamba-2 folder to a checkpoint whose full budget equals the source; and matrices rounded to bf16.

Source: the parameter names of transformers' ``Mamba2ForCausalLM``; the block of Dao and Gu 2024, section 7.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model.checkpoint import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    SpecialTokens,
    load_checkpoint,
    read_config,
    save_checkpoint,
)
from model.config import ModelConfig, Positive, StrictModel
from model.lm import AdaptiveAttentionSystem
from model.subword import SubwordError, SubwordTokenizer

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
GENERATION_FILE = "generation_config.json"


def _plain_float(value: object) -> object:
    """Some versions of transformers write an infinite number as ``{"__float__": "Infinity"}``."""
    return float(value["__float__"]) if isinstance(value, dict) and set(value) == {"__float__"} else value


_Limit = Annotated[float, BeforeValidator(_plain_float)]


class SourceConfig(StrictModel):
    """The keys of a Mamba-2 ``config.json`` that decide what is computed; defaults are transformers'.

    Other keys (initialisation, token ids, versions) change no logit and are ignored.
    """

    model_config = ConfigDict(extra="ignore")

    model_type: Literal["mamba2"]
    vocab_size: Positive = 32768
    hidden_size: Positive = 4096
    num_hidden_layers: Positive = 64
    num_heads: Positive = 128
    head_dim: Positive = 64
    state_size: Positive = 128
    expand: Positive = 2
    conv_kernel: Positive = 4
    chunk_size: Positive = 256
    n_groups: int = 8
    layer_norm_epsilon: float = Field(default=1e-5, gt=0.0)
    time_step_limit: tuple[_Limit, _Limit] = (0.0, math.inf)
    hidden_act: Literal["silu", "swish"] = "silu"
    use_bias: Literal[False] = False
    use_conv_bias: bool = True
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.n_groups != 1:
            raise ValueError(f"n_groups = {self.n_groups} must be 1")
        if self.hidden_size * self.expand != self.num_heads * self.head_dim:
            raise ValueError(
                f"num_heads * head_dim = {self.num_heads * self.head_dim} must be hidden_size * expand = "
                f"{self.hidden_size * self.expand}"
            )
        return self


def read_source_config(folder: Path) -> SourceConfig:
    """The configuration of a Hugging Face Mamba-2 folder.

    Raises:
        CheckpointError: the file is missing or not JSON, or a key has a value that cannot be converted.
    """
    path = folder / CONFIG_FILE
    try:
        return SourceConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"no model at {folder}: {error.strerror} ({path.name})") from error
    except ValidationError as error:
        raise _invalid(path, error) from error


def _invalid(path: Path, error: ValidationError) -> CheckpointError:
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"])) or "file"
    got = f" (got {first['input']!r})" if first["loc"] else ""
    return CheckpointError(f"{path}: {key}: {first['msg']}{got}")


class SourceTokens(StrictModel):
    """The keys of a ``generation_config.json`` or ``config.json`` that say where sequences begin and end."""

    model_config = ConfigDict(extra="ignore")

    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None


def read_special_tokens(folder: Path) -> SpecialTokens:
    """Where sequences of a Hugging Face folder begin and end: as transformers' ``generate`` finds it.

    ``generation_config.json`` decides where there is one, else ``config.json``. Without a token that begins sequences,
    one that ends them does.

    Raises:
        CheckpointError: a file is damaged, or has neither token.
    """
    path = folder / GENERATION_FILE
    path = path if path.exists() else folder / CONFIG_FILE
    try:
        found = SourceTokens.model_validate_json(path.read_bytes())
        ids = found.eos_token_id
        ends = () if ids is None else (ids,) if isinstance(ids, int) else ids
        if found.bos_token_id is None and not ends:
            raise CheckpointError(f"{path}: one of bos_token_id and eos_token_id must be set")
        return SpecialTokens(start=ends[0] if found.bos_token_id is None else found.bos_token_id, ends=ends)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise _invalid(path, error) from error


def convert_config(
    source: SourceConfig, name: str, encoder_layers: int | None = None, decoder_layers: int | None = None
) -> ModelConfig:
    """The shape that holds a plain stack of n layers as encoder, trunk and decoder, in this order.

    A sixth of the layers, at least one, is the encoder, and as many the decoder, unless stated; the trunk has the rest.
    Nested state sizes are a quarter, a half and the whole. ``adapted`` is False: no weight has seen a held trunk.

    Raises:
        CheckpointError: no layer is left for the trunk, or a value is outside what the model supports.
    """
    layers = source.num_hidden_layers
    outer = max(1, layers // 6)
    encoder = outer if encoder_layers is None else encoder_layers
    decoder = min(outer, max(0, layers - encoder - 1)) if decoder_layers is None else decoder_layers
    trunk = layers - encoder - decoder
    if min(encoder, trunk) < 1 or decoder < 0:
        raise CheckpointError(
            f"num_hidden_layers = {layers} must leave at least one layer to the encoder (given {encoder}) "
            f"and to the trunk (left {trunk}), and no fewer than none to the decoder (given {decoder})"
        )
    least, most = source.time_step_limit
    sizes = {source.state_size // part for part in (4, 2, 1)} - {0}
    try:
        return ModelConfig(
            name=name,
            vocab_size=source.vocab_size,
            tied_head=source.tie_word_embeddings,
            adapted=False,
            d_model=source.hidden_size,
            d_trunk=source.hidden_size,
            encoder_layers=encoder,
            trunk_layers=trunk,
            decoder_layers=decoder,
            expand=source.expand,
            headdim=source.head_dim,
            d_state=source.state_size,
            d_state_levels=tuple(sorted(sizes)),
            d_conv=source.conv_kernel,
            dt_limits=(least, None if math.isinf(most) else most),
            chunk_size=source.chunk_size,
            block_size=source.chunk_size * math.ceil(512 / source.chunk_size),
            norm_eps=source.layer_norm_epsilon,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "model"
        raise CheckpointError(f"{key}: {first['msg']} (got {first['input']!r})") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of ``model.safetensors``, or of the shards that its index names.

    Raises:
        CheckpointError: a file is missing or damaged, or the index names a file outside the folder.
    """
    index = folder / INDEX_FILE
    names = [WEIGHTS_FILE]
    try:
        if not (folder / WEIGHTS_FILE).exists() and index.exists():
            content = json.loads(index.read_bytes())
            names = sorted(set(content["weight_map"].values()))
        weights: dict[str, Tensor] = {}
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index}: weight_map: {name!r} must be a file of the same folder")
            weights |= load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights in {folder}: {error}") from error
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: weight_map must map names of tensors to names of files ({error!r})") from error
    return weights


def name_mapping(config: ModelConfig, *, conv_bias: bool = True) -> dict[str, str]:
    """Ours -> transformers' name of every parameter of a plain Mamba-2 stack."""
    names = {"embedding.weight": "backbone.embeddings.weight", "final_norm.weight": "backbone.norm_f.weight"}
    if not config.tied_head:
        names["output.weight"] = "lm_head.weight"
    parts = {
        "norm.weight": "norm.weight", "mixer.in_proj.weight": "mixer.in_proj.weight",
        "mixer.conv_weight": "mixer.conv1d.weight", "mixer.dt_bias": "mixer.dt_bias", "mixer.A_log": "mixer.A_log",
        "mixer.D": "mixer.D", "mixer.norm.weight": "mixer.norm.weight",
        "mixer.out_proj.weight": "mixer.out_proj.weight",
    }  # fmt: skip
    if conv_bias:
        parts["mixer.conv_bias"] = "mixer.conv1d.bias"
    stages = {"encoder": config.encoder_layers, "trunk": config.trunk_layers, "decoder": config.decoder_layers}
    places = [f"{stage}.{index}" for stage, count in stages.items() for index in range(count)]
    for layer, place in enumerate(places):
        names |= {f"{place}.{ours}": f"backbone.layers.{layer}.{theirs}" for ours, theirs in parts.items()}
    return names


def convert_weights(
    config: ModelConfig, weights: Mapping[str, Tensor], *, conv_bias: bool = True
) -> AdaptiveAttentionSystem:
    """A model of shape ``config`` with a Mamba-2 stack's ``weights``, in fp32; at full budget it is that stack.

    What the source lacks starts neutral: no stretch, no fold between state sizes, the early exit's norm is the last.

    Raises:
        CheckpointError: a tensor is missing, superfluous or of another shape, or a tied head is not the embedding.
    """
    model = AdaptiveAttentionSystem(config)
    names = name_mapping(config, conv_bias=conv_bias)
    left = dict(weights)
    head = left.pop("lm_head.weight", None) if config.tied_head else None
    own = model.state_dict()
    for ours, theirs in names.items():
        value = left.pop(theirs, None)
        if value is None:
            raise CheckpointError(f"{theirs} is missing from the weights")
        expected = own[ours].shape
        if theirs.endswith("conv1d.weight"):
            expected = torch.Size((expected[0], 1, expected[1]))
        if value.shape != expected:
            raise CheckpointError(f"{theirs}: shape {tuple(value.shape)} must be {tuple(expected)}")
        own[ours].copy_(value.float().reshape(own[ours].shape))
    if left:
        raise CheckpointError(f"{min(left)}: no part of a Mamba-2 of this config ({len(left)} such tensors)")
    if head is not None and not torch.equal(head.float(), own["embedding.weight"]):
        raise CheckpointError("lm_head.weight must equal backbone.embeddings.weight where tie_word_embeddings is true")
    own["exit_norm.weight"].copy_(own["final_norm.weight"])
    return model.eval().requires_grad_(False)


def convert(
    source: Path,
    output: Path,
    name: str | None = None,
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
    *,
    bf16: bool = False,
) -> ModelConfig:
    """Write a checkpoint at ``output`` from the Hugging Face folder ``source``; ``tokenizer.json`` is kept beside it.

    ``bf16``: see :func:`round_matrices`.

    Raises:
        CheckpointError: the source is incomplete, damaged, or no Mamba-2 that the model can hold, or its tokenizer is
            none that can be served.
    """
    found = read_source_config(source)
    chosen = name or re.sub(r"[^A-Za-z0-9._-]+", "-", source.resolve().name).lstrip("._-")[:64] or "converted"
    config = convert_config(found, chosen, encoder_layers, decoder_layers)
    special = _check_tokenizer(source, config)
    model = convert_weights(config, read_weights(source), conv_bias=found.use_conv_bias)
    if bf16:
        round_matrices(model)
    save_checkpoint(model, output, {"converted_from": source.name, "layers": found.num_hidden_layers}, special)
    if special is not None:
        shutil.copyfile(source / TOKENIZER_FILE, output / TOKENIZER_FILE)
    return config


def round_matrices(model: nn.Module) -> None:
    """Round embedding and projections to bf16, in place: on a CPU a step of one stream then reads half as much.

    States and everything that is computed stay in fp32. Steps and passes see the same rounded numbers.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.copy_(module.weight.to(torch.bfloat16))
    model.train(model.training)  # what was kept of the weights no longer holds


def round_checkpoint(source: Path, output: Path) -> ModelConfig:
    """Write the checkpoint ``source`` with its matrices rounded to bf16 at ``output``.

    Raises:
        CheckpointError: the source is incomplete or damaged.
    """
    found, model = read_config(source), load_checkpoint(source)
    round_matrices(model)
    save_checkpoint(model, output, found.provenance, found.special_tokens)
    if found.special_tokens is not None:
        shutil.copyfile(source / TOKENIZER_FILE, output / TOKENIZER_FILE)
    return found.model


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint already; one that cannot be read does not."""
    try:
        content = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "format" in content


def _check_tokenizer(source: Path, config: ModelConfig) -> SpecialTokens | None:
    """What serving the source's ``tokenizer.json`` needs; None where there is none."""
    path = source / TOKENIZER_FILE
    if not path.exists():
        return None
    special = read_special_tokens(source)
    try:
        SubwordTokenizer.read(path, config.vocab_size, special.start, special.ends)
    except SubwordError as error:
        raise CheckpointError(str(error)) from error
    return special


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``rheostat convert`` on ``parser``."""
    parser.add_argument(
        "source", type=Path, help="folder with config.json and model.safetensors (or shards and index); or a checkpoint"
    )
    parser.add_argument("output", type=Path, help="folder for the checkpoint")
    parser.add_argument("--name", help="of the model; the source folder's unless given")
    parser.add_argument("--encoder-layers", type=int, help="first layers that run at every token; a sixth unless given")
    parser.add_argument("--decoder-layers", type=int, help="last layers that run at every token; a sixth unless given")
    parser.add_argument(
        "--bf16", action="store_true", help="round matrices to bf16: half the file, and less to read in a step on a CPU"
    )


def run_convert(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    chosen: dict[str, Any] = {key: getattr(arguments, key) for key in ("name", "encoder_layers", "decoder_layers")}
    if arguments.output.resolve() == arguments.source.resolve():
        raise CheckpointError(f"{arguments.output} is the source: the checkpoint needs a folder of its own")
    if _is_checkpoint(arguments.source):
        if not arguments.bf16 or any(value is not None for value in chosen.values()):
            raise CheckpointError(f"{arguments.source} is a checkpoint already; all that it can be given is --bf16")
        config = round_checkpoint(arguments.source, arguments.output)
        print(f"{config.name}: matrices rounded to bf16 at {arguments.output}.")
        return 0
    config = convert(arguments.source, arguments.output, **chosen, bf16=arguments.bf16)
    print(
        f"{config.name}: {config.encoder_layers} + {config.trunk_layers} + {config.decoder_layers} layers "
        f"(encoder, trunk, decoder) at {arguments.output}. At full budget it equals the source; "
        "it is not adapted to lower ones."
    )
    return 0
