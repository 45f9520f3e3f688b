from __future__ import annotations

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
