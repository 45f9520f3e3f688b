"""``rheostat train``."""

from __future__ import annotations

import argparse
from pathlib import Path

from model.checkpoint import read_config
from model.config import ModelConfig
from model.device import choose_device, set_threads
from model.training.config import TrainingConfig
from model.training.loop import Run, train


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command on ``parser``."""
    defaults = TrainingConfig()
    parser.add_argument("corpus", type=Path, help="folder of <domain>.<train|valid>.txt[.xz], documents end in NUL")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoint, state and log")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--initial", type=Path, help="checkpoint to start from, with a fresh optimiser")
    parser.add_argument("--config", type=Path, help="folder of a checkpoint, or JSON of one, whose shape to use")
    parser.add_argument("--weights", type=_weights, help="sampling weights, such as code=0.55,prose=0.45")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--minutes", type=float, help="stop and save after this long")
    parser.add_argument("--checkpointing", action="store_true", help="less memory for long sequences, more time")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="others need a GPU")
    parser.add_argument("--plain", action="store_true", help="full resolution only: the plain Mamba-2 baseline")
    for name in ("steps", "sequences", "length", "seed", "warmup", "validate_every", "save_every"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    for name in (
        "learning_rate",
        "cooldown",
        "full_weight",
        "floor_share",
        "uniform_share",
        "weight_decay",
        "lambda_info",
        "lambda_compute",
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name))
    parser.add_argument("--shape", type=_shape, default={}, help="changes to the shape, such as d_model=128")


def run_train(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    set_threads(arguments.threads)
    chosen = {name: getattr(arguments, name) for name in TrainingConfig.model_fields if hasattr(arguments, name)}
    shape = ModelConfig() if arguments.config is None else read_config(arguments.config).model
    shape = ModelConfig.model_validate({**shape.model_dump(), **arguments.shape})
    run = Run(
        corpus=arguments.corpus,
        output=arguments.output,
        resume=arguments.resume,
        initial=arguments.initial,
        weights=arguments.weights,
        device=choose_device(arguments.device),
        minutes=arguments.minutes,
    )
    train(run, shape, TrainingConfig.model_validate(chosen))
    return 0


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not (name and equals and value) for name, equals, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} must read name=value,name=value")
    return [(name, value) for name, _, value in pairs]


def _weights(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in _pairs(text)}


def _shape(text: str) -> dict[str, int | str]:
    return {name: value if name == "name" else int(value) for name, value in _pairs(text)}
