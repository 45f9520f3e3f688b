"""A real server on a free port, in a thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import torch

from model.config import ModelConfig
from model.lm import AdaptiveAttentionSystem
from model.tokenizer import Tokenizer
from service.api.context import Context
from service.app import create_app
from service.keys import Keyring
from service.server import Server, ServerConfig
from service.settings import Settings

TINY = ModelConfig(
    name="tiny",
    d_model=32,
    d_trunk=48,
    trunk_layers=2,
    headdim=16,
    d_state=16,
    d_state_levels=(4, 16),
    chunk_size=16,
    max_tile_size=64,
    block_size=64,
    density_window=8,
)


def tiny_model(seed: int = 0, config: ModelConfig = TINY) -> AdaptiveAttentionSystem:
    """A small model with random weights that generates varied bytes."""
    torch.manual_seed(seed)
    model = AdaptiveAttentionSystem(config)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
        model.final_norm.weight.mul_(0.5)
    return model.eval().requires_grad_(False)


@dataclass
class Running:
    """A server and a client for it."""

    client: httpx.Client
    context: Context
    url: str

    def complete(self, **fields: object) -> dict:
        answer = self.client.post("/v1/completions", json={"prompt": "x", "temperature": 0} | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metric(self, name: str) -> float:
        """Sum of a metric's samples over its labels."""
        lines = self.client.get("/metrics").text.splitlines()
        values = [float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name]
        assert values, f"{name} is not exposed"
        return sum(values)

    def wait_until_idle(self) -> None:
        """Wait for every request to end, then assert that nothing is left of them."""
        deadline = time.monotonic() + 30
        while self.metric("rheostat_num_requests_running") + self.metric("rheostat_num_requests_waiting"):
            assert time.monotonic() < deadline, "requests are still open"
            time.sleep(0.02)
        while True:  # the gauges are set a moment before the thread forgets a request
            try:
                self.context.engine.check_integrity()
                break
            except AssertionError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.02)
        assert self.metric("rheostat_state_pool_bytes") == 0


@contextmanager
def serving(
    model: AdaptiveAttentionSystem,
    keys: Keyring | None = None,
    listener: socket.socket | None = None,
    tokenizer: Tokenizer | None = None,
    **settings: object,
) -> Iterator[Running]:
    """Serve ``model`` over HTTP as ``rheostat serve`` does, on a free port or on ``listener``."""
    chosen = Settings(port=0, **{"shutdown_seconds": 5} | settings)
    app = create_app(chosen, model, keys or Keyring([]), tokenizer)
    server = Server(ServerConfig(app, chosen), app.state.context.engine)
    thread = threading.Thread(target=server.run, args=([listener] if listener else None,))
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = (listener or server.servers[0].sockets[0]).getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Running(client, app.state.context, url)
    finally:
        server.should_exit = True
        thread.join()
