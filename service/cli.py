"""The command ``rheostat``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model.convert import add_convert_arguments, run_convert
from model.evaluation.cli import add_evaluate_arguments, run_evaluate
from model.training.cli import add_train_arguments, run_train
from service.generate import add_generate_arguments, run_generate
from service.settings import Settings


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status. Bad input ends with one line on standard error and status 2."""
    try:
        chosen = _parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = chosen.run
        return run(chosen)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return _complain(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    except (ValueError, FileNotFoundError) as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return 130


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
    command("train", "Train a model, or go on with a run.", add_train_arguments, run_train)
    command("evaluate", "Bits per byte and compute on documents, per budget.", add_evaluate_arguments, run_evaluate)
    command("convert", "Make a checkpoint from a Hugging Face Mamba-2 folder.", add_convert_arguments, run_convert)
    return parser


def _complain(message: str) -> int:
    print(f"rheostat: {message}", file=sys.stderr)
    return 2


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Settings()
    parser.add_argument("--host", default=defaults.host)
    parser.add_argument("--port", type=int, default=defaults.port)
    parser.add_argument("--checkpoint", type=Path, default=defaults.checkpoint, help="folder")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default=defaults.device)
    parser.add_argument("--threads", type=int, default=defaults.threads, help="CPU threads of the model")
    parser.add_argument("--max-running", type=int, default=defaults.max_running, help="sequences in one batch")
    parser.add_argument("--max-waiting", type=int, default=defaults.max_waiting, help="requests that may queue")


def _run_serve(arguments: argparse.Namespace) -> int:
    # Imported here: the other commands need no web server.
    import uvicorn

    from model.checkpoint import load_checkpoint
    from model.device import choose_device, set_threads
    from service.app import create_app

    chosen: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name in Settings.model_fields}
    settings = Settings(**chosen)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    set_threads(settings.threads)
    device = choose_device(settings.device)
    model = load_checkpoint(settings.checkpoint, device)
    logger = logging.getLogger(__name__)
    logger.info("serving %s on %s", model.config.name, device)
    if not model.config.adapted:
        logger.warning("%s was not adapted to budgets below 1: they are kept, but answers get worse", model.config.name)
    uvicorn.run(
        create_app(settings, model),
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=settings.shutdown_seconds,
        log_config=None,
        access_log=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
