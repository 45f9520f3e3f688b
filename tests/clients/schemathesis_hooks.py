"""What the API asks of valid data and JSON Schema cannot say; docs/api.md does."""

from __future__ import annotations

import schemathesis

MOST_CHOICES = 128


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case) -> bool:
    """Leave out valid bodies with a ``min`` above its ``target``, or more choices than a request may make."""
    valid = case.meta is not None and case.meta.generation.mode is schemathesis.GenerationMode.POSITIVE
    return not valid or not isinstance(case.body, dict) or (_in_order(case.body) and _few(case.body))


def _in_order(body: dict) -> bool:
    budget = body.get("compute_budget")
    return not isinstance(budget, dict) or budget.get("min", budget["target"]) <= budget["target"]


def _few(body: dict) -> bool:
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and not isinstance(prompt[0], int | float)
    return (body.get("n") or 1) * (len(prompt) if several else 1) <= MOST_CHOICES
