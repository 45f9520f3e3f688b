"""Log lines: one JSON object each, or plain text."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What a line carries besides its message: ``logger.info(text, extra={"fields": {...}})``."""
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


class JsonFormatter(logging.Formatter):
    """``time`` (UTC), ``level``, ``logger``, ``message``, the line's fields, and ``exception`` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; line breaks in values are escaped, so that no value can pass for a line of its own."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= fields_of(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, logger and message, then the fields as ``name=value`` with JSON values."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, logging's name
        """The line without its traceback."""
        fields = [f" {name}={json.dumps(value, default=str)}" for name, value in fields_of(record).items()]
        return super().formatMessage(record) + "".join(fields)


def configure_logs(form: Literal["json", "text"]) -> None:
    """Send every logger's lines from INFO on to standard error, in one form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
