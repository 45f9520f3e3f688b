from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from tests.service.servers import Running, serving, tiny_model

PATIENCE = {"header_seconds": 1, "body_seconds": 1, "write_seconds": 1, "keep_alive_seconds": 2}


@pytest.fixture(scope="session", autouse=True)
def open_files() -> None:
    """Both ends of a thousand connections live in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


@pytest.fixture(scope="package")
def shared() -> Iterator[Running]:
    limits = {"max_running": 2, "max_waiting": 8, "max_tokens": 1 << 20, "max_body_bytes": 1 << 18}
    with serving(tiny_model(), **PATIENCE, **limits) as running:
        yield running


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    """A server with little patience. After each test it answers, and nothing is left of what was done to it."""
    yield shared
    assert shared.complete(max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2
    shared.wait_until_idle()
