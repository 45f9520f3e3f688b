"""One of the processes that ``test_distributed.py`` launches through torchrun: several runs, and what each left.

``torchrun ... -m tests.model.training.rank_process CORPUS OUTPUT`` writes ``OUTPUT/<run>.<rank>.pt`` with the model's
tensors, or the message that the run ended with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

import model.training.optimizer
from model.training.distributed import Ranks, join_ranks
from model.training.faults import BrokenRunError, TrainingError
from model.training.loop import Run, train
from model.training.loss import Loss, compute_loss
from model.training.recipe import Recipe
from tests.model.training.runs import RECIPE, after, recipe
from tests.model.training.test_distributed import EQUAL


def main(corpus: Path, output: Path) -> None:
    torch.set_num_threads(1)
    with join_ranks("cpu") as (ranks, _):

        def run(name: str, chosen: Recipe, steps: int | None = None) -> None:
            try:
                stop = (lambda: False) if steps is None else after(steps)
                trained = train(Run(corpus, output / name), chosen, ranks, stop)
                left: object = trained.model.state_dict() | {"steps": torch.tensor(trained.steps)}
            except (TrainingError, BrokenRunError) as error:
                left = str(error)
            torch.save(left, output / f"{name}.{ranks.rank}.pt")

        for name, chosen in EQUAL.items():
            run(name, chosen)
        run("elastic", RECIPE)
        run("indivisible", recipe(sequences=3))
        run("stopped", RECIPE, 2 if ranks.rank == 1 else None)
        plant(ranks, not_a_number)
        run("nan", RECIPE)
        plant(ranks, out_of_memory)
        run("lost", RECIPE)  # the last one: the first process has lost the second


def plant(ranks: Ranks, fault: Callable[[Loss], None]) -> None:
    """Let ``fault`` change the loss of the second process in step 5."""
    calls = []

    def faulty(*arguments: object) -> Loss:
        calls.append(None)
        loss = compute_loss(*arguments)
        if ranks.rank == 1 and len(calls) == 5:
            fault(loss)
        return loss

    model.training.optimizer.compute_loss = faulty


def not_a_number(loss: Loss) -> None:
    loss.total = loss.total * float("nan")


def out_of_memory(_: Loss) -> None:
    raise MemoryError


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
