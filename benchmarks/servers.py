"""Servers as processes of their own, on free ports, and what they say of themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

GAUGES = ("rheostat_num_requests_running", "rheostat_num_requests_waiting", "rheostat_state_pool_bytes")
"""What is left of no request once all have ended."""
_START_SECONDS, _IDLE_SECONDS = 180.0, 60.0


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    address: tuple[str, int]

    def metrics(self) -> dict[str, float]:
        """Every sample by name with labels, and by name alone the sum over labels (but for buckets)."""
        samples: dict[str, float] = {}
        with urllib.request.urlopen(f"http://{self.address[0]}:{self.address[1]}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        for line in lines:
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
                if "{" in name:
                    family = name.partition("{")[0]
                    samples[family] = samples.get(family, 0.0) + float(value)
        return samples

    def wait_until_idle(self) -> None:
        """Wait until the gauges say that nothing runs or waits.

        Raises:
            TimeoutError: a minute was not enough.
        """
        deadline = time.monotonic() + _IDLE_SECONDS
        while left := {name: value for name in GAUGES if (value := self.metrics()[name])}:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server does not come to rest: {left}")
            time.sleep(0.05)

    def resident_bytes(self) -> int:
        """Memory that the process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None, "a running process has a size"
        return int(found[1]) * 1024


@contextmanager
def rheostat(*options: str, threads: int | None = None) -> Iterator[Server]:
    """``rheostat serve`` with these options."""
    chosen = ["--port", "0", "--log-format", "text", *options, *(["--threads", str(threads)] if threads else [])]
    with _running(["service.cli", "serve", *chosen]) as server:
        yield server


@contextmanager
def transformers_handler(folder: Path, threads: int | None = None) -> Iterator[Server]:
    """A FastAPI handler around transformers' ``generate``, for the model in ``folder``."""
    options = [str(folder), *(["--threads", str(threads)] if threads else [])]
    with _running(["benchmarks.transformers_handler", *options]) as server:
        yield server


@contextmanager
def _running(module: list[str]) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            process = subprocess.Popen(
                [sys.executable, "-m", *module], stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        try:
            yield Server(process, ("127.0.0.1", _port(process, log)))
        finally:
            process.terminate()
            process.wait(60)


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    """That of the address which uvicorn names once it listens."""
    deadline = time.monotonic() + _START_SECONDS
    while not (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text(encoding="utf-8"))):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
        time.sleep(0.1)
    return int(found[1])
