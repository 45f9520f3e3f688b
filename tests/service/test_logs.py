from __future__ import annotations

import json
import logging
import sys

import pytest

from service.logs import JsonFormatter, TextFormatter


def record(message: str, fields: dict | None = None, exc_info: object = None) -> logging.LogRecord:
    made = logging.LogRecord("service.x", logging.WARNING, "x.py", 1, message, (), exc_info)
    if fields is not None:
        made.fields = fields
    return made


def test_a_json_line_is_one_line_whatever_is_in_it() -> None:
    line = JsonFormatter().format(record('two\nlines "quoted"', {"route": "/a\nb", "status": 200}))
    assert "\n" not in line
    parsed = json.loads(line)
    assert (parsed["level"], parsed["logger"], parsed["message"]) == ("warning", "service.x", 'two\nlines "quoted"')
    assert (parsed["route"], parsed["status"]) == ("/a\nb", 200)
    assert parsed["time"].endswith("+00:00")


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_an_exception_is_part_of_the_line(formatter: logging.Formatter) -> None:
    try:
        raise RuntimeError("planted")
    except RuntimeError:
        line = formatter.format(record("failed", {"request_id": "r1"}, sys.exc_info()))
    assert "RuntimeError: planted" in line
    assert "r1" in line.splitlines()[0]


def test_a_text_line_has_the_fields_behind_the_message() -> None:
    line = TextFormatter().format(record("request", {"status": 200, "key": None}))
    assert line.endswith("WARNING service.x: request status=200 key=null")
