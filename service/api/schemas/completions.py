"""``POST /v1/completions``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from service.api.schemas.fields import ApiModel, implies, refusal
from service.api.schemas.generation import LARGEST, MOST_CHOICES, NEUTRAL, RULES, GenerationRequest, Usage
from service.api.schemas.prompt import Prompts
from service.engine.sequence import ComputeUsage

MOST_LOGPROBS = 5
DEFAULT_LENGTH = 16


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "def parse(line):\n", "max_tokens": 64, "temperature": 0, "compute_budget": 0.5},
                {"prompt": [[256, 97, 98], [256, 99]], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0},
            ],
            "allOf": [*RULES, implies("max_tokens", {"const": 0}, "echo")],
        }
    )
    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = dict(NEUTRAL) | {"prompt_logprobs": (0,), "suffix": ("",)}

    prompt: Prompts
    """A string, a list of strings, a list of token ids (a byte is its own id, 256 separates documents; a
    converted model has the ids of its tokenizer), or a list of such lists; up to 128 prompts."""
    max_tokens: int | None = Field(default=None, ge=0, le=LARGEST)
    """Tokens to generate; 0 only with `echo`. By default 16, or the server's limit if that is lower."""
    echo: bool = False
    """Return the prompt in front of the text."""
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    """Report the log-probability of each token and of so many of the most probable; with `echo`, of the prompt too."""
    best_of: SkipJsonSchema[int | None] = Field(default=None, ge=1, le=MOST_CHOICES)
    """Only as `n`: there is no choosing between more. Not in the schema, which cannot say so."""

    @model_validator(mode="after")
    def _built(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise refusal("best_of", f"best_of: only the value of n, {self.n}, is supported; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise refusal("max_tokens", "max_tokens: must be at least 1 unless echo is true")
        return self


class Logprobs(ApiModel):
    """Log-probabilities of a choice's tokens: natural logarithms, at temperature 1 and before penalties.

    A token that is no whole character is written `bytes:\\xe2`; the separator is `<|document|>`.
    """

    tokens: list[str]
    """Of the echoed prompt, then of every generated token, those of a stop string included."""
    token_logprobs: list[float | None]
    """Null for a first token that was sent and not put in front by the server: nothing comes before it."""
    top_logprobs: list[dict[str, float] | None]
    """The most probable tokens, and the token itself; the same token has the same number as in `token_logprobs`."""
    text_offset: list[int]
    """The character of `text` that each token begins with, or in."""


class Choice(ApiModel):
    """One generated text, or a piece of it."""

    index: int
    """Choices of the first prompt come first."""
    text: str
    """The generated text, after the prompt where `echo` asks for it."""
    logprobs: Logprobs | None
    """Where they were asked for."""
    finish_reason: Literal["stop", "length"] | None
    """`stop`: a stop string or the end of the document."""
    compute: ComputeUsage | None = Field(default=None, exclude_if=lambda value: value is None)
    """What this choice spent; where there are several. In a stream it stands on the choice's last chunk."""


class Completion(ApiModel):
    """Answer of `POST /v1/completions`, whole or one chunk of a stream."""

    id: str
    """Of this answer; the same in every chunk of a stream."""
    object: Literal["text_completion"] = "text_completion"
    """Always `text_completion`."""
    created: int
    """Unix time in seconds."""
    model: str
    """The served model."""
    choices: list[Choice]
    """One per choice, those of the first prompt first; in a stream, news of one choice, and none in the chunk with the
    usage."""
    usage: Usage | None = None
    """What the request used; in a stream, in the last chunk, where it was asked for."""
