"""What the routes work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from model.cost import CostModel
from model.tokenizer import Tokenizer
from service.engine.engine_thread import EngineThread
from service.keys import Keyring, RateLimiter
from service.metrics import Metrics
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Context:
    """The parts of one server; made by the app, given to every route."""

    settings: Settings
    keys: Keyring
    rates: RateLimiter
    engine: EngineThread
    metrics: Metrics
    cost: CostModel
    tokenizer: Tokenizer
    model_name: str
    adapted: bool
    """Whether the model was trained for budgets below 1."""
    started: int
    """Unix time in seconds."""

    @property
    def max_model_len(self) -> int:
        """Prompt and generated tokens that one request may have."""
        return self.settings.max_prompt_bytes + self.settings.max_tokens


def get_context(request: Request) -> Context:
    """The context of the app that a request came to."""
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


ContextDependency = Annotated[Context, Depends(get_context)]
