"""The server as its users start it, in the environment named by ``SERVER_BIN``, with the embedded checkpoint."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(os.environ["SERVER_BIN"])
KEY = "clients-0123456789abcdef"
MODEL = "rheostat-small"


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[str]

    def metrics(self) -> dict[str, float]:
        """The value of each metric with each set of labels, and under the bare name the sum over them."""
        totals: dict[str, float] = {}
        headers = {"Authorization": f"Bearer {KEY}"}
        for line in httpx.get(f"{self.url}/metrics", headers=headers).text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                for key in {name, name.split("{")[0]}:
                    totals[key] = totals.get(key, 0.0) + float(value)
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


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    """``rheostat serve`` with these options on a free port, its log in ``folder``, and ``KEY`` among its keys."""
    log = folder / "log"
    command = [BIN / "rheostat", "serve", "--port", "0", "--log-format", "text", *options]
    with log.open("w") as output:
        process = subprocess.Popen(command, stderr=output, env=os.environ | {"RHEOSTAT_API_KEY": KEY}, text=True)
    try:
        yield Server(_address(process, log), process)
    finally:
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), "--max-tokens", "512", "--max-prompt-bytes", "8192") as running:
        yield running


def run(command: list[str | Path], seconds: float, environment: Mapping[str, str] | None = None) -> str:
    """What a client prints. The test fails if its exit status is not 0, or it takes longer."""
    done = subprocess.run(
        command,
        env=os.environ | dict(environment or {}),
        cwd=ROOT,
        timeout=seconds,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def _address(process: subprocess.Popen[str], log: Path) -> str:
    deadline = time.monotonic() + 120
    while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return found[0]
