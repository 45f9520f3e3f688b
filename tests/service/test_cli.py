"""The command as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "strict.json"


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    command = f"import sys; from service.cli import main; sys.exit(main(['evaluate', '--from', {str(RESULTS)!r}]))"
    with subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
