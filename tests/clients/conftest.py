"""The server as its users start it, in the environment named by ``SERVER_BIN``, with the embedded checkpoint."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

BIN = Path(os.environ["SERVER_BIN"])
KEY = "clients-0123456789abcdef"
MODEL = "rheostat-small"


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[str]

    def metrics(self) -> dict[str, float]:
        """Sum of each metric over its labels."""
        totals: dict[str, float] = {}
        headers = {"Authorization": f"Bearer {KEY}"}
        for line in httpx.get(f"{self.url}/metrics", headers=headers).text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                totals[name.split("{")[0]] = totals.get(name.split("{")[0], 0.0) + float(value)
        return totals

    def check_idle(self) -> None:
        """Assert that within half a minute nothing is left of any request, and that the server is healthy."""
        gauges = ("rheostat_num_requests_running", "rheostat_num_requests_waiting", "rheostat_state_pool_bytes")
        deadline = time.monotonic() + 30
        while left := {name: value for name, value in self.metrics().items() if name in gauges and value}:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        assert set(gauges) <= set(self.metrics())
        assert self.process.poll() is None
        assert httpx.get(f"{self.url}/health").status_code == 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--port", "0", "--log-format", "text", "--max-tokens", "512", "--max-prompt-bytes", "8192"]
    environment = os.environ | {"RHEOSTAT_API_KEY": KEY}
    with log.open("w") as output:
        process = subprocess.Popen([BIN / "rheostat", "serve", *options], stderr=output, env=environment, text=True)
    try:
        yield Server(_address(process, log), process)
    finally:
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM


def _address(process: subprocess.Popen[str], log: Path) -> str:
    deadline = time.monotonic() + 120
    while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return found[0]
