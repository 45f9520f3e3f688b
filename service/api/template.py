"""Conversations as plain text, for a model that only continues text."""

from __future__ import annotations

from collections.abc import Iterable

from service.api.schemas.chat import Message, Role

_NAMES: dict[Role, str] = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}

TURN_STOPS = tuple(f"{gap}{name}:" for name in ("User", "Assistant", "System") for gap in ("\n", "\n\n"))
"""How the next turn would begin: a base model does not stop by itself where an answer ends."""


def render(messages: Iterable[Message]) -> str:
    """``User: ...`` and so on, an empty line between turns, ending where the assistant's next turn begins.

    Nothing is escaped: text that looks like a turn is read as one.
    """
    turns = "".join(f"{_NAMES[message.role]}: {message.text}\n\n" for message in messages)
    return f"{turns}{_NAMES['assistant']}: "
