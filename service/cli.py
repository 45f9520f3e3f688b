"""The command ``rheostat``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError

from model.convert import add_convert_arguments, run_convert
from model.corpus.cli import add_data_arguments, run_data
from model.evaluation.cli import add_evaluate_arguments, run_evaluate
from model.training.cli import add_train_arguments, run_train
from model.training.density import add_fit_arguments, run_fit
from model.training.plot import add_plot_arguments, run_plot
from service.generate import add_generate_arguments, run_generate
from service.settings import ENVIRONMENT_PREFIX, Settings, setting_options


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status. Bad input ends with one line on standard error and status 2."""
    try:
        chosen = _parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = chosen.run
        status = run(chosen)
        sys.stdout.flush()
        return status
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return _complain(f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}")
    except (ValueError, FileNotFoundError) as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read has seen enough, as head does; nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rheostat", description="Adaptive state-space language models.")
    parser.add_argument("--version", action="version", version=f"rheostat {version('rheostat')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str,
        text: str,
        add: Callable[[argparse.ArgumentParser], None],
        run: Callable[[argparse.Namespace], int],
    ) -> None:
        sub = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        add(sub)
        sub.set_defaults(run=run)

    command("serve", "Serve a checkpoint over HTTP.", _add_serve_arguments, _run_serve)
    command("generate", "Generate text in the terminal.", add_generate_arguments, run_generate)
    command("data", "Build training and evaluation text.", add_data_arguments, run_data)
    command("train", "Train a model, or go on with a run.", add_train_arguments, run_train)
    command("fit-density", "Fit a checkpoint's density anew.", add_fit_arguments, run_fit)
    command("plot-training", "Draw the curves of runs side by side.", add_plot_arguments, run_plot)
    command("evaluate", "Bits per byte and compute on documents, per budget.", add_evaluate_arguments, run_evaluate)
    command("convert", "Make a checkpoint from a Hugging Face Mamba-2 folder.", add_convert_arguments, run_convert)
    return parser


def _complain(message: str) -> int:
    print(f"rheostat: {message}", file=sys.stderr)
    return 2


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        f"Every option can be set by an environment variable too, as {ENVIRONMENT_PREFIX}MAX_RUNNING, and in a TOML "
        "file, as max_running = 8. An option wins over the environment, and that over the file."
    )
    for name in Settings.model_fields:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, **setting_options(name), default=argparse.SUPPRESS)


def _run_serve(arguments: argparse.Namespace) -> int:
    # Imported here: the other commands need no web server.
    from model.checkpoint import load_checkpoint, load_tokenizer
    from model.device import choose_device
    from service.app import create_app
    from service.engine.budget import NOT_ADAPTED
    from service.keys import load_keys
    from service.logs import configure_logs
    from service.server import Server, ServerConfig

    chosen: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name in Settings.model_fields}
    settings = Settings(**chosen)
    keys = load_keys(settings.keys_file, settings.api_key)
    configure_logs(settings.log_format)
    device = choose_device(settings.device)
    tokenizer = load_tokenizer(settings.checkpoint)
    model = load_checkpoint(settings.checkpoint, device)
    access = f"API keys: {len(keys)}" if len(keys) else "no API keys: open to all who reach it"
    logger = logging.getLogger(__name__)
    logger.info("serving %s on %s, %s", model.config.name, device, access)
    if not model.config.adapted:
        logger.warning("%s: %s", model.config.name, NOT_ADAPTED)
    app = create_app(settings, model, keys, tokenizer)
    Server(ServerConfig(app, settings), app.state.context.engine).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
