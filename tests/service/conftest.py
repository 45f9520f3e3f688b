from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.service.servers import Running, serving, tiny_model


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Running]:
    with serving(tiny_model(), max_running=4, max_waiting=64, max_prompt_bytes=2000, max_tokens=200) as running:
        yield running


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    """The shared server; after each test nothing may be left of its requests."""
    yield shared_server
    shared_server.wait_until_idle()
