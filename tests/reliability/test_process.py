"""The command itself, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from model.checkpoint import save_checkpoint
from tests.service.servers import tiny_model

KEY = "0123456789abcdef"


def test_serve_takes_all_its_settings_and_writes_json_lines_only(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tmp_path / "tiny")
    file = tmp_path / "settings.toml"
    file.write_text(f'checkpoint = "{tmp_path / "tiny"}"\nmax_tokens = 3\nport = 1\ndevice = "cpu"\n')
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RHEOSTAT_")}
    environment |= {"RHEOSTAT_SETTINGS_FILE": str(file), "RHEOSTAT_API_KEY": KEY, "RHEOSTAT_MAX_RUNNING": "2"}
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0"]
    lines: list[dict] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            for text in process.stderr:
                lines.append(json.loads(text))
                if found := re.search(r"http://127\.0\.0\.1:\d+", lines[-1]["message"]):
                    break
            body = {"prompt": "never to be logged", "ignore_eos": True}
            headers = {"Authorization": f"Bearer {KEY}", "x-request-id": "only-once"}
            with httpx.Client(base_url=found.group(), timeout=60) as client:
                assert client.post("/v1/completions", json=body).status_code == 401
                assert client.post("/v1/completions", json=body | {"max_tokens": 4}, headers=headers).status_code == 400
                answer = client.post("/v1/completions", json=body | {"max_tokens": 3}, headers=headers)
            assert answer.json()["usage"]["completion_tokens"] == 3
        finally:
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
    lines += [json.loads(text) for text in rest.splitlines()]
    assert [line["status"] for line in lines if line["message"] == "request"] == [401, 400, 200]
    served = [line for line in lines if line.get("request_id") == "only-once" and line["status"] == 200]
    assert len(served) == 1
    assert (served[0]["key"], served[0]["completion_tokens"], served[0]["finish_reasons"]) == ("default", 3, ["length"])
    assert any("API keys: 1" in line["message"] for line in lines)
    assert KEY not in json.dumps(lines)
    assert "never to be logged" not in json.dumps(lines)
