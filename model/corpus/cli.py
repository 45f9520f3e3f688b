"""``rheostat data``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from model.corpus.build import Build, build
from model.corpus.errors import BuildError
from model.corpus.excerpts import excerpts
from model.corpus.recipe import DEFAULT_RECIPE, load_recipe


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands and their arguments on ``parser``."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_build(commands.add_parser("build", help=_BUILD, description=_BUILD, formatter_class=parser.formatter_class))
    _add_excerpts(
        commands.add_parser("excerpts", help=_EXCERPTS, description=_EXCERPTS, formatter_class=parser.formatter_class)
    )


def run_data(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    run: Callable[[argparse.Namespace], int] = arguments.run_data
    return run(arguments)


_BUILD = "Build training and evaluation text from pinned packages."
_EXCERPTS = "Take a small evaluation text per domain from a built corpus, with notices."


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, help="folder to make; must not exist")
    parser.add_argument("--cache", type=Path, default=_default_cache(), help="folder of fetched archives, kept")
    parser.add_argument("--only", nargs="+", metavar="DOMAIN", help="domains to build, such as code prose")
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE, help="TOML file")
    parser.add_argument("--jobs", type=_positive, default=os.cpu_count(), help="fetched and read at once")
    parser.set_defaults(run_data=_run_build)


def _add_excerpts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("built", type=Path, help="folder of a built corpus")
    parser.add_argument("output", type=Path, help="folder to make; must not exist")
    parser.add_argument("--bytes", type=_positive, default=40_000, help="of each domain")
    parser.set_defaults(run_data=_run_excerpts)


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rheostat" / "corpus"


def _run_build(arguments: argparse.Namespace) -> int:
    settings = Build(arguments.output, arguments.cache, arguments.only, arguments.jobs)
    recipe = load_recipe(arguments.recipe)
    try:
        manifest = build(settings, recipe)
    except OSError as error:
        raise BuildError(f"cannot build {arguments.output}: {error}") from error
    print(f"{'split':<24}  {'documents':>9}  {'bytes':>13}")
    for name, figures in manifest["files"].items():
        print(f"{name:<24}  {figures['documents']:>9,}  {figures['bytes']:>13,}")
    for source in manifest["sources"]:
        if source["drifted"]:
            print(f"{source['name']}: the recipe pins {source['pinned']}, this is {source['version']}")
    return 0


def _run_excerpts(arguments: argparse.Namespace) -> int:
    for name, figures in excerpts(arguments.built, arguments.output, arguments.bytes).items():
        print(f"{name:<24}  {figures['documents']:>9,}  {figures['bytes']:>13,}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
