"""schemathesis, unmodified, on the server's OpenAPI document: all checks, valid and invalid data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.clients.conftest import KEY, ROOT, run, serving

CASES = 2000


def test_no_case_breaks_the_document(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with serving(tmp_path, "--max-tokens", "64", "--max-prompt-bytes", "8192") as server:
        command = [
            Path(sys.executable).with_name("schemathesis"), "--config-file", ROOT / "tests/clients/schemathesis.toml",
            "run", f"{server.url}/openapi.json", "--checks", "all", "--header", f"Authorization: Bearer {KEY}",
            "--report", "json", "--report-json-path", report,
        ]  # fmt: skip
        run(command, 420, {"PYTHONPATH": str(ROOT)})
        found = json.loads(report.read_text())
        assert found["complete"]
        assert found["test_cases"]["generated"] >= CASES
        assert found["test_cases"]["with_failures"] == found["test_cases"]["errored"] == 0
        assert found["operations"]["tested"] == found["operations"]["total"]
        server.check_idle()
