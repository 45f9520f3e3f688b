"""``rheostat evaluate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from model.checkpoint import EMBEDDED_CHECKPOINT, load_checkpoint, load_tokenizer
from model.device import choose_device, set_threads
from model.evaluation.strict import StrictEvaluation
from model.training.data import read_documents

FLOOR = "floor"


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command on ``parser``."""
    parser.add_argument("--documents", type=Path, required=True, help="UTF-8 documents separated by NUL (.xz is read)")
    parser.add_argument("--budgets", type=_budgets, default="1,0.5,0.25,floor", help="numbers in (0, 1], or floor")
    parser.add_argument("--checkpoint", type=Path, default=EMBEDDED_CHECKPOINT, help="folder of a checkpoint")
    parser.add_argument("--max-bytes", type=int, help="score about this much, whole documents evenly spread")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    set_threads(arguments.threads)
    documents = spread(read_documents(arguments.documents), arguments.max_bytes)
    tokenizer = load_tokenizer(arguments.checkpoint)
    model = load_checkpoint(arguments.checkpoint, choose_device(arguments.device))
    asked: list[float | str] = arguments.budgets
    budgets = [model.cost.floor if budget == FLOOR else float(budget) for budget in asked]
    evaluation = StrictEvaluation(model, budgets, tokenizer)
    with tqdm(total=sum(map(len, documents)), unit="B", unit_scale=True) as bar:
        for document in documents:
            evaluation.add(document, bar.update)
    rows = [
        {"budget": budget, "bits_per_byte": score.bits_per_byte, "flop_ratio": score.flop_ratio}
        for budget, score in zip(asked, evaluation.scores, strict=True)
    ]
    total = evaluation.scores[0].bytes
    if arguments.json:
        name = model.config.name
        print(json.dumps({"model": name, "documents": len(documents), "bytes": total, "budgets": rows}))
        return 0
    print(f"{len(documents)} documents, {total:,} bytes, {model.config.name}")
    print(f"{'budget':>8}  {'bits per byte':>13}  {'FLOPs / full':>12}")
    for row in rows:
        print(f"{row['budget']:>8}  {row['bits_per_byte']:13.4f}  {row['flop_ratio']:12.4f}")
    return 0


def spread(documents: list[bytes], max_bytes: int | None) -> list[bytes]:
    """Whole documents, evenly spread over the list, of about ``max_bytes`` in all (None: every one)."""
    total = sum(map(len, documents))
    if max_bytes is None or total <= max_bytes:
        return documents
    count = max(1, len(documents) * max_bytes // total)
    return [documents[index * len(documents) // count] for index in range(count)]


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
