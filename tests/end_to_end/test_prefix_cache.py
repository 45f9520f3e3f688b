"""Prompts that begin like earlier ones, over HTTP."""

from __future__ import annotations

import pytest

from service.keys import load_keys
from tests.service.servers import TINY, serving, tiny_model

BLOCK = TINY.block_size
KEYS = """
[one]
key = "0123456789abcdef-one"
[two]
key = "0123456789abcdef-two"
"""


@pytest.mark.parametrize("budget", [1.0, 0.8, 0.3])
def test_a_known_beginning_costs_nothing_and_changes_no_answer(budget: float) -> None:
    system = "".join(chr(97 + i * i % 23) for i in range(3 * BLOCK))
    fields = {"max_tokens": 12, "ignore_eos": True, "logprobs": 2, "temperature": 0, "compute_budget": budget}
    prompts = [system + "first", system + "second question", system[: BLOCK + 3], system + "first"]
    with serving(tiny_model()) as plain, serving(tiny_model(), prefix_cache_bytes=1 << 24) as cached:
        for prompt, blocks in zip(prompts, [0, 3, 1, 3], strict=True):
            expected, answer = plain.complete(prompt=prompt, **fields), cached.complete(prompt=prompt, **fields)
            assert answer["choices"] == expected["choices"]
            usage = answer["usage"]
            assert usage["prompt_tokens"] == expected["usage"]["prompt_tokens"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == blocks * BLOCK
            if blocks:
                assert usage["compute"]["spent_flops"] < expected["usage"]["compute"]["spent_flops"]
        assert cached.metric("rheostat_prompt_tokens_cached_total") == 7 * BLOCK
        assert 'rheostat_state_pool_bytes{kind="used"} 0.0' in cached.client.get("/metrics").text


def test_nobody_finds_what_another_key_has_asked(tmp_path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(KEYS)
    with serving(tiny_model(), load_keys(file, None), prefix_cache_bytes=1 << 24) as server:

        def cached_tokens(key: str, budget: float = 1.0) -> int:
            body = {"prompt": "a" * (2 * BLOCK), "max_tokens": 1, "compute_budget": budget}
            headers = {"Authorization": f"Bearer 0123456789abcdef-{key}"}
            answer = server.client.post("/v1/completions", json=body, headers=headers)
            return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert [cached_tokens(key) for key in ("one", "two", "one", "two")] == [0, 0, 2 * BLOCK, 2 * BLOCK]
        assert cached_tokens("one", budget=0.8) == 0
