from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.service.servers import serving, tiny_model


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with (
        serving(tiny_model(), max_tokens=50) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_a_completion_with_a_budget(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="x", max_tokens=8, temperature=0, extra_body={"compute_budget": 0.7, "ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.compute["requested"] == 0.7


def test_a_stream_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="tiny", prompt="x", max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.compute["granted"] == 1.0
    whole = client.completions.create(model="tiny", prompt="x", max_tokens=8, temperature=0)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text


def test_errors_are_openais_and_name_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt="x", max_tokens=51)
    assert error.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_choices_scores_and_bills(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["one", "two"], n=2, max_tokens=6, logprobs=2, echo=True, seed=1,
        extra_body={"compute_budget": 0.7, "ignore_eos": True},
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(len(choice.logprobs.token_logprobs) == 3 + 6 for choice in answer.choices)
    assert answer.usage.compute["spent_flops"] == sum(choice.compute["spent_flops"] for choice in answer.choices)
    assert answer.usage.prompt_tokens_details.scored_tokens == answer.usage.prompt_tokens == 8


MESSAGES = [{"role": "user", "content": "hi"}]


def test_a_conversation(client: openai.OpenAI) -> None:
    fields = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2, extra_body={"compute_budget": 0.7})
    assert answer.usage.compute["requested"] == 0.7
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    content = answer.choices[0].message.content
    # The client's helper takes an answer that was cut off by its length for an error.
    stopped = fields | {"stop": content[5], "extra_body": {"compute_budget": 0.7}}
    with client.chat.completions.stream(**stopped) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == content[: content.index(content[5])]
    assert final.choices[0].finish_reason == "stop"


def test_an_asynchronous_client(client: openai.OpenAI) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as other:
            fields = {"model": "tiny", "prompt": "x", "max_tokens": 8, "temperature": 0}
            whole = await other.completions.create(**fields)
            stream = await other.completions.create(**fields, stream=True)
            return whole.choices[0].text, "".join([chunk.choices[0].text async for chunk in stream])

    whole, streamed = asyncio.run(ask())
    assert whole == streamed
