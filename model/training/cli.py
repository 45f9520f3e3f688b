"""``rheostat train``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from pydantic.fields import FieldInfo

from model.device import choose_device, set_threads
from model.training.config import TrainingConfig
from model.training.distributed import join_ranks
from model.training.faults import BrokenRunError
from model.training.loop import Run, train
from model.training.recipe import read_recipe, shipped_recipes
from model.training.stopping import StopRequest

BY_SIZE = "by-size"


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command on ``parser``."""
    parser.add_argument("corpus", type=Path, help="folder of <domain>.<train|valid>.txt[.xz], documents end in NUL")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoint, state and log")
    parser.add_argument(
        "--recipe", default="small", help=f"a TOML file, or one of those shipped: {', '.join(shipped_recipes())}"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--initial", type=Path, help="checkpoint to start from, its shape included; fresh optimiser")
    parser.add_argument(
        "--grow",
        type=Path,
        help="plain checkpoint whose blocks become encoder and decoder, around a new trunk",
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--minutes", type=float, help="stop and save after this long")
    over = parser.add_argument_group("over the recipe", "Each wins over what the recipe says.")
    over.add_argument("--shape", type=_shape, default={}, help="of [model], such as d_model=128,trunk_layers=6")
    over.add_argument(
        "--weights",
        type=sampling_weights,
        help=f"of [data], sampling weights such as code=0.55,prose=0.45, or {BY_SIZE}",
    )
    for name, field in TrainingConfig.model_fields.items():
        over.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **_option(field))


def run_train(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status: 1 of a run that broke off, 128 + n of one that signal n stopped."""
    set_threads(arguments.threads)
    torch.set_flush_denormal(True)  # faint gradients cost a CPU a hundred times the time of others
    try:
        return _run_train(arguments)
    finally:
        torch.set_flush_denormal(False)


def _run_train(arguments: argparse.Namespace) -> int:
    if arguments.initial and arguments.shape:
        raise ValueError("--shape cannot change the shape of --initial, which is the checkpoint's")
    if arguments.initial and arguments.grow:
        raise ValueError("--initial and --grow are two ways to begin")
    training = {name: value for name, value in vars(arguments).items() if name in TrainingConfig.model_fields}
    weights = {} if arguments.weights is None else {"weights": arguments.weights}
    recipe = read_recipe(arguments.recipe, {"model": arguments.shape, "training": training, "data": weights})
    with join_ranks(choose_device(arguments.device)) as (ranks, device), StopRequest() as stop:
        run = Run(
            corpus=arguments.corpus,
            output=arguments.output,
            resume=arguments.resume,
            initial=arguments.initial,
            grow=arguments.grow,
            device=device,
            minutes=arguments.minutes,
        )
        try:
            trained = train(run, recipe, ranks, lambda: stop.signal is not None)
        except BrokenRunError as fault:
            print(f"rheostat: {fault}", file=sys.stderr)
            return 1
    if trained.steps == recipe.training.steps:
        return 0
    if ranks.leads:
        resume = "the same command with --resume goes on"
        print(f"rheostat: stopped after step {trained.steps}, saved in {run.output}; {resume}", file=sys.stderr)
    return 0 if stop.signal is None else 128 + stop.signal


def _option(field: FieldInfo) -> dict[str, Any]:
    """Arguments for argparse's ``add_argument``, for the option of a setting; the recipe checks its bounds."""
    described: dict[str, Any] = {"help": (field.description or "").replace("%", "%%").replace("\n", " ")}
    if field.annotation is bool:
        return described | {"action": argparse.BooleanOptionalAction}
    if get_origin(field.annotation) is Literal:
        return described | {"choices": get_args(field.annotation)}
    return described | {"type": field.annotation}


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not (name and equals and value) for name, equals, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} must read name=value,name=value")
    return [(name, value) for name, _, value in pairs]


def sampling_weights(text: str) -> dict[str, float]:
    """Sampling weight by domain, from ``name=value,name=value``; empty for weights by size."""
    return {} if text == BY_SIZE else {name: float(value) for name, value in _pairs(text)}


def _shape(text: str) -> dict[str, Any]:
    return {name: _value(value) for name, value in _pairs(text)}


def _value(text: str) -> Any:
    """A number or truth value as JSON writes it; anything else is text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
