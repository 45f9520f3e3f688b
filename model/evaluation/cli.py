"""``rheostat evaluate``."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from model.checkpoint import EMBEDDED_CHECKPOINT, WEIGHTS_FILE, load_checkpoint, load_tokenizer
from model.device import choose_device, set_threads
from model.evaluation.arms import ADAPTIVE, ONLY, PLANNED_ARMS, REFITTED, STRICT_ARMS, WITHOUT, make_arms
from model.evaluation.earlier import EarlierPlain, read_results
from model.evaluation.experiment import Domain, Experiment
from model.evaluation.journal import Journal
from model.evaluation.passages import Protocol
from model.evaluation.points import FLOOR, make_points
from model.evaluation.references import compressed_bits
from model.evaluation.report import DomainReport, budget_rows
from model.evaluation.sources import read_calibration, read_domains
from model.evaluation.table import table
from model.lm import AdaptiveAttentionSystem
from model.tokenizer import Tokenizer

DEFAULT_BUDGETS = "1,0.85,0.55,0.35,floor"
DEFAULT_RATES = "1/2,1/4"


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command on ``parser``."""
    parser.add_argument(
        "--documents", type=_source, nargs="+", metavar="[NAME=]FILE",
        help="UTF-8 documents separated by NUL (.xz is read), one domain each, called as the file's first part",
    )  # fmt: skip
    parser.add_argument("--protocol", type=Protocol, choices=list(Protocol), default=Protocol.STRICT, help=(
        "P0: causal; P1: prompts planned, continuations scored; P2: all planned, an upper bound"
    ))  # fmt: skip
    parser.add_argument("--budgets", type=_budgets, help=f"numbers in (0, 1], or floor [{DEFAULT_BUDGETS}]")
    parser.add_argument(
        "--rates", type=_rates, help=f"points by the share of the trunk that runs, besides [{DEFAULT_RATES}]"
    )
    parser.add_argument("--arms", default=ADAPTIVE, help=(
        f"ways to place the trunk, with commas, or all; P0: {', '.join(STRICT_ARMS)}; else {', '.join(PLANNED_ARMS)}; "
        "single features run at the first of --rates"
    ))  # fmt: skip
    parser.add_argument("--calibration", type=Path, nargs="+", default=[], metavar="FILE", help=(
        f"validation documents to fit thresholds of {', '.join(REFITTED[:2])} and of single features to"
    ))  # fmt: skip
    parser.add_argument("--plain", type=Path, nargs="+", default=[], metavar="FOLDER", help=(
        "checkpoints of plain models to compare with"
    ))  # fmt: skip
    parser.add_argument("--plain-from", type=Path, metavar="FILE", help=(
        "results that --json wrote for the same documents, with plain models to compare with: they are not scored again"
    ))  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, default=EMBEDDED_CHECKPOINT, help="folder of a checkpoint")
    parser.add_argument("--max-bytes", type=_count, help="score at most this much of a domain, documents evenly spread")
    parser.add_argument("--document-bytes", type=_count, help=(
        "score at most so much of a document, so that --max-bytes hold more of them, and intervals are narrower"
    ))  # fmt: skip
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write one JSON object, or print it")
    parser.add_argument("--plot", type=_picture, metavar="FILE", help="draw the results, .svg or .png")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help=(
        "show results that --json wrote, instead of scoring"
    ))  # fmt: skip


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if arguments.plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'rheostat[plot]'")
    if arguments.source is None:
        set_threads(arguments.threads)
        results = _evaluate(arguments)
    else:
        results = _read(arguments)
    if arguments.plot is not None:
        from model.evaluation.plot import plot  # the picture's library is an extra

        plot(results, arguments.plot)
    print(json.dumps(results) if arguments.json == "-" else table(results))
    return 0


def _read(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.documents:
        raise ValueError("--from shows results that were scored before: --documents has no place beside it")
    return read_results(arguments.source)


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    if not arguments.documents:
        raise ValueError("--documents is required")
    domains = read_domains(arguments.documents, arguments.max_bytes, arguments.document_bytes)
    # P1 scores parts of documents, which no compressor can be asked for.
    compared = () if arguments.protocol is Protocol.SERVING else domains
    references = {domain.name: compressed_bits(domain.documents) for domain in compared}
    earlier = None if arguments.plain_from is None else EarlierPlain(arguments.plain_from, arguments.protocol)
    if earlier is not None:
        for domain in domains:
            earlier.check(domain.name, references.get(domain.name, {}))
    tokenizer = load_tokenizer(arguments.checkpoint)
    device = choose_device(arguments.device)
    model = load_checkpoint(arguments.checkpoint, device)
    tokenizer.require_vocabulary(model.config.name, model.config.vocab_size)
    experiment = _experiment(arguments, model, tokenizer, domains)
    file = None if arguments.json in (None, "-") else Path(arguments.json)
    journal = Journal(file and file.with_name(f"{file.name}.partial"), _identity(arguments, domains))
    scores = {domain.name: experiment.run(domain, journal) for domain in domains}
    if earlier is not None:
        for name, documents in scores.items():
            earlier.lend(name, documents)
    every = [document for documents in scores.values() for document in documents]
    results = {
        "model": model.config.name,
        "protocol": str(experiment.protocol),
        "documents": len(every),
        "bytes": sum(document.bytes for document in every),
        "budgets": budget_rows(experiment, every),
        "domains": {
            domain.name: {
                **DomainReport(experiment, scores[domain.name]).as_dict(),
                "references": references.get(domain.name, {}),
            }
            for domain in domains
        },
    }
    if file is not None:
        fresh = file.with_name(f"{file.name}.new")
        fresh.write_text(json.dumps(results) + "\n")
        os.replace(fresh, file)
    journal.close()
    return results


def _experiment(
    arguments: argparse.Namespace, model: AdaptiveAttentionSystem, tokenizer: Tokenizer, domains: Sequence[Domain]
) -> Experiment:
    protocol: Protocol = arguments.protocol
    names = [name.strip() for name in arguments.arms.split(",")]
    if names == ["all"]:
        names = list(STRICT_ARMS if protocol is Protocol.STRICT else PLANNED_ARMS)
        if not model.density.measured:  # there is one feature: arms of others would tell nothing
            names = [name for name in names if name not in (*ONLY, *WITHOUT)]
    names = [ADAPTIVE, *(name for name in dict.fromkeys(names) if name != ADAPTIVE)]
    budgets, rates = arguments.budgets, arguments.rates
    if budgets is None:
        budgets = _budgets(DEFAULT_BUDGETS if rates is None else f"1,{FLOOR}")
        rates = _rates(DEFAULT_RATES) if rates is None else rates
    points = make_points(model.cost, budgets, rates or [])
    # One point tells what a feature is worth; eight arms of features at every point would double the time.
    feature_points = frozenset([f"rate {rates[0]}"] if rates else [point.label for point in points])
    calibration = read_calibration(arguments.calibration, domains, arguments.document_bytes, tokenizer)
    depths = dict.fromkeys(point.rates.depth for point in points)
    return Experiment(
        model=model,
        tokenizer=tokenizer,
        protocol=protocol,
        placing={depth: make_arms(model, names, protocol, calibration, depth) for depth in depths},
        points=points,
        feature_points=feature_points,
        plain=_plain(arguments.plain, model, tokenizer),
    )


def _plain(folders: Sequence[Path], model: AdaptiveAttentionSystem, tokenizer: Tokenizer) -> dict[str, Any]:
    models: dict[str, AdaptiveAttentionSystem] = {}
    for folder in folders:
        plain = load_checkpoint(folder, model.device)
        tokenizer.require_vocabulary(plain.config.name, plain.config.vocab_size)
        if folder.name in models:
            raise ValueError(f"two plain checkpoints are called {folder.name!r}")
        models[folder.name] = plain
    return models


def _identity(arguments: argparse.Namespace, domains: Sequence[Domain]) -> str:
    """What a journal's scores depend on, the program included."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(source.read_bytes())
    for folder in (arguments.checkpoint, *arguments.plain):
        digest.update((folder / WEIGHTS_FILE).read_bytes())
    for domain in domains:
        digest.update(repr((domain.name, domain.documents)).encode())
    options = ("protocol", "budgets", "rates", "arms", "calibration", "plain")
    digest.update(repr([getattr(arguments, name) for name in options]).encode())
    return digest.hexdigest()


def _source(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if equals and not Path(text).exists():
        return name, Path(path)
    return Path(text).name.split(".")[0], Path(text)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .svg or .png")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} must be in a folder that exists")
    return path


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _budgets(text: str) -> list[float | str]:
    chosen: list[float | str] = []
    for part in text.split(","):
        try:
            value = part.strip() if part.strip() == FLOOR else float(part)
        except ValueError:
            value = 0.0
        if isinstance(value, float) and not 0.0 < value <= 1.0:
            raise argparse.ArgumentTypeError(f"budget {part!r} must be a number in (0, 1] or {FLOOR!r}")
        chosen.append(value)
    return chosen


def _rates(text: str) -> list[Fraction]:
    chosen = []
    for part in text.split(","):
        try:
            value = Fraction(part.strip())
        except (ValueError, ZeroDivisionError):
            value = Fraction(0)
        if not 0 < value <= 1:
            raise argparse.ArgumentTypeError(f"rate {part!r} must be a number in (0, 1], such as 1/2")
        chosen.append(value)
    return chosen
