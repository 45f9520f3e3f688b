"""What completions and chat completions share."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pydantic import Field, model_validator

from service.api.schemas.fields import ApiModel, Budget, Request, StopStrings, implies, refusal
from service.engine.sequence import ComputeUsage

MOST_CHOICES = 128
LARGEST = 1 << 31
MOST_PRIORITY = 100

NEUTRAL: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "add_special_tokens": (True,),
        "allowed_token_ids": ([],),
        "bad_words": ([],),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1,),
        "logit_bias": ({},),
        "min_tokens": (0,),
        "response_format": ({"type": "text"},),
        "skip_special_tokens": (True,),
        "stop_token_ids": ([],),
        "structured_outputs": ({},),
        "use_beam_search": (False,),
    }
)


RULES = (implies("stream_options", {"type": "object"}, "stream"),)
"""What holds between fields, as JSON schema."""


class StreamOptions(Request):
    """Options of a streamed answer."""

    include_usage: bool = False
    """Send a last chunk with `usage` and no choices."""


class GenerationRequest(Request):
    """Fields of every request that generates."""

    model: str | None = None
    """The served model; another name is a 404."""
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    """Choices per prompt; the i-th (from 0) draws with `seed + i`."""
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    """0 takes the most probable token."""
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    """Draw from the smallest set of most probable tokens that holds this much."""
    top_k: int = Field(default=0, ge=-1, le=LARGEST)
    """Draw from so many most probable tokens; 0 or -1 from all."""
    min_p: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    """Drop tokens less probable than this share of the most probable one."""
    repetition_penalty: float = Field(default=1.0, ge=0.1, le=10, allow_inf_nan=False)
    """Divides positive and multiplies negative logits of tokens that the prompt or the text has."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    """Taken off the logits of tokens that were generated."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    """Taken off the logits of tokens that were generated, once for each time."""
    seed: int | None = Field(default=None, ge=-(1 << 63), le=1 << 63)
    """The same request with the same seed gives the same text, whatever runs beside it."""
    stop: StopStrings = ()
    """The text ends before the first of these: a string, or up to 16 of 1 to 256 bytes."""
    ignore_eos: bool = False
    """Go on after the end of the document."""
    stream: bool = False
    """Answer with server-sent events."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    priority: int = Field(default=0, ge=-MOST_PRIORITY, le=MOST_PRIORITY)
    """Requests with a lower one go first; among equals the server shares its compute fairly."""
    compute_budget: Budget | None = Field(default=None, examples=[0.5, {"target": 0.6, "min": 0.3}])
    """The share of full-resolution FLOPs that the request may spend: a number in (0, 1], or an object with target and
    min. The server's default if absent."""

    @model_validator(mode="after")
    def _consistent(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", "stream_options is only allowed when stream is true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class PromptTokensDetails(ApiModel):
    """More about the prompt."""

    cached_tokens: int
    """Prompt tokens whose states were kept from an earlier request; they cost nothing and are on no bill."""
    scored_tokens: int
    """Prompt tokens that were scored: read by the causal rule, with the head at every position."""


class Usage(ApiModel):
    """What a request used, all its choices together."""

    prompt_tokens: int
    """Tokens of the prompts, one put in front of each included; choices of a prompt share them."""
    completion_tokens: int
    """Tokens generated, all choices together."""
    total_tokens: int
    """Both together."""
    prompt_tokens_details: PromptTokensDetails
    """More about the prompts."""
    compute: ComputeUsage
    """What was asked for, granted and spent."""
    note: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Present where less than full compute was granted, and the model was never trained for that."""
