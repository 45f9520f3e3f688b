"""``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from service.api.schemas.fields import ApiModel, Request, Text, implies, refusal
from service.api.schemas.generation import LARGEST, NEUTRAL, RULES, GenerationRequest, Usage
from service.engine.sequence import ComputeUsage

MOST_MESSAGES = 1024
MOST_TOP_LOGPROBS = 20
DEFAULT_LENGTH = 256

Role = Literal["system", "developer", "user", "assistant"]


class ContentPart(Request):
    """A piece of a message; only text is taken."""

    type: Literal["text"]
    """Always `text`."""
    text: Text
    """The text."""


class Message(Request):
    """One message of a conversation."""

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {"tool_calls": ([],), "function_call": ({},), "audio": ({},)}

    role: Role
    """Who speaks."""
    content: Text | list[ContentPart]
    """Text, or parts of text, which are joined."""

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "messages": [{"role": "user", "content": "What does a parser do?"}],
                    "max_completion_tokens": 64,
                    "compute_budget": 0.5,
                }
            ],
            "allOf": [*RULES, implies("top_logprobs", {"type": "integer", "minimum": 1}, "logprobs")],
        }
    )
    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = dict(NEUTRAL) | {
        "add_generation_prompt": (True,),
        "audio": ({},),
        "chat_template": ("",),
        "continue_final_message": (False,),
        "echo": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "tool_choice": ("auto", "none"),
        "tools": ([],),
    }

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    """The conversation so far; as one text, at most as many bytes as a prompt may have."""
    max_completion_tokens: int | None = Field(default=None, ge=1, le=LARGEST)
    """Tokens to generate; 256, or the server's limit if that is lower."""
    max_tokens: int | None = Field(default=None, ge=1, le=LARGEST)
    """The older name of `max_completion_tokens`, which wins."""
    logprobs: bool = False
    """Report the log-probability of each generated token."""
    top_logprobs: int = Field(default=0, ge=0, le=MOST_TOP_LOGPROBS)
    """And of so many of the most probable; only with `logprobs`."""

    @model_validator(mode="after")
    def _built(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "top_logprobs is only allowed when logprobs is true")
        return self

    @property
    def length(self) -> tuple[str, int | None]:
        """The field that says how many tokens to generate, and what it says; None where none does."""
        if self.max_tokens is not None and self.max_completion_tokens is None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens


class TopLogprob(ApiModel):
    """A token and its log-probability."""

    token: str
    """A token that is no whole character is written `bytes:\\xe2`; the separator is `<|document|>`."""
    logprob: float
    """Natural logarithm of its probability."""
    bytes: list[int]
    """Its bytes, none for the separator and special tokens."""


class TokenLogprob(TopLogprob):
    """A generated token, its log-probability, and the most probable tokens in its place."""

    top_logprobs: list[TopLogprob]
    """The most probable tokens, best first."""


class ChatLogprobs(ApiModel):
    """Log-probabilities of generated tokens: natural logarithms, at temperature 1 and before penalties."""

    content: list[TokenLogprob]
    """One entry per token."""


class AssistantMessage(ApiModel):
    """The generated message."""

    role: Literal["assistant"] = "assistant"
    """Always `assistant`."""
    content: str
    """The answer."""
    refusal: None = None
    """Always null."""


class ChatChoice(ApiModel):
    """One generated message."""

    index: int
    """Number of the choice."""
    message: AssistantMessage
    """The answer."""
    logprobs: ChatLogprobs | None
    """Where they were asked for."""
    finish_reason: Literal["stop", "length"]
    """`stop`: a stop string or the end of the document; `length`: as long as was asked for."""
    compute: ComputeUsage | None = Field(default=None, exclude_if=lambda value: value is None)
    """What this choice spent; where there are several."""


class ChatCompletion(ApiModel):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    """Of this answer."""
    object: Literal["chat.completion"] = "chat.completion"
    """Always `chat.completion`."""
    created: int
    """Unix time in seconds."""
    model: str
    """The served model."""
    choices: list[ChatChoice]
    """One per choice, in order."""
    usage: Usage
    """What the request used."""


class Delta(ApiModel):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """On the first chunk of a choice."""
    content: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """New text."""


class ChunkChoice(ApiModel):
    """A piece of one generated message."""

    index: int
    """Number of the choice."""
    delta: Delta
    """What is new."""
    logprobs: ChatLogprobs | None
    """Of the tokens that are new, where they were asked for."""
    finish_reason: Literal["stop", "length"] | None
    """In the last chunk of a choice."""
    compute: ComputeUsage | None = Field(default=None, exclude_if=lambda value: value is None)
    """What this choice spent; on its last chunk, where there are several."""


class ChatChunk(ApiModel):
    """One chunk of a streamed chat completion."""

    id: str
    """The same in every chunk of an answer."""
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    """Always `chat.completion.chunk`."""
    created: int
    """Unix time in seconds."""
    model: str
    """The served model."""
    choices: list[ChunkChoice]
    """News of one choice; empty in the chunk that carries the usage."""
    usage: Usage | None = None
    """In the last chunk, where it was asked for."""
