"""openai-python, unmodified."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.clients.conftest import KEY, MODEL, Server, serving

BUDGET = {"compute_budget": 0.5, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "What does a parser do?"}]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client
    server.check_idle()


def test_completions_whole_and_streamed_are_the_same(client: openai.OpenAI) -> None:
    ask = {"model": MODEL, "prompt": "def parse(line):\n", "max_tokens": 32, "temperature": 0, "extra_body": BUDGET}
    whole = client.completions.create(**ask)
    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].text
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 32
    assert whole.usage.compute["requested"] == 0.5


def test_chat_whole_and_streamed_are_the_same(client: openai.OpenAI) -> None:
    ask = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 24, "temperature": 0, "extra_body": BUDGET}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.choices[0].finish_reason == "length"


def test_async_requests_side_by_side(server: Server) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:

            async def streamed() -> str:
                ask = {"model": MODEL, "messages": MESSAGES, "max_tokens": 16, "temperature": 0, "stream": True}
                stream = await client.chat.completions.create(**ask, extra_body=BUDGET)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            async def completed() -> str:
                ask = {"model": MODEL, "prompt": "import ", "max_tokens": 16, "temperature": 0}
                return (await client.completions.create(**ask, extra_body=BUDGET)).choices[0].text

            texts = await asyncio.gather(streamed(), completed(), streamed(), completed())
            assert texts[:2] == texts[2:]
            assert all(texts)

    asyncio.run(run())
    server.check_idle()


def test_a_wrong_key_and_a_wrong_budget_are_their_errors(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=MODEL, prompt="x", extra_body={"compute_budget": 0})
    assert error.value.param == "compute_budget"


def test_a_refusal_for_haste_is_tried_again_when_the_server_says(tmp_path: Path) -> None:
    """The client's own pauses, half a second and one, would have it refused again before the six seconds are over."""
    slow_key = "clients-slow-0123456789"
    (tmp_path / "keys.toml").write_text(f'[slow]\nkey = "{slow_key}"\nrequests_per_minute = 10\n')
    ask = {"model": MODEL, "prompt": "x", "max_tokens": 1, "temperature": 0}
    with (
        serving(tmp_path, "--keys-file", str(tmp_path / "keys.toml")) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=slow_key, max_retries=0) as client,
    ):
        with pytest.raises(openai.RateLimitError) as refused:
            exhaust(client, ask)
        assert refused.value.code == "rate_limit_exceeded"
        assert int(refused.value.response.headers["retry-after"]) >= 2
        answer = client.with_options(max_retries=2).completions.create(**ask)
        assert answer.usage.completion_tokens == 1
        assert server.metrics()["rheostat_request_rejected_total"] == 2
        server.check_idle()


def exhaust(client: openai.OpenAI, ask: dict) -> None:
    for _ in range(60):
        client.completions.create(**ask)
