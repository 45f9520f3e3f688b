from __future__ import annotations

import pytest

from model.cost import CostModel
from tests.service.servers import TINY, Running

COST = CostModel(TINY)


def test_the_answer_has_openais_shape(server: Running) -> None:
    answer = server.complete(prompt="hello", max_tokens=5)
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert len(answer["choices"]) == 1
    choice = answer["choices"][0]
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (6, 5, 11)


@pytest.mark.parametrize("budget", [1.0, 0.8, 0.6])
def test_the_budget_is_kept_and_the_bill_is_analytic(server: Running, budget: float) -> None:
    compute = server.complete(prompt="budget " * 250, max_tokens=100, compute_budget=budget)["usage"]["compute"]
    assert (compute["requested"], compute["granted"], compute["reason"]) == (budget, budget, "requested")
    assert compute["spent"] == pytest.approx(budget, rel=0.05)
    read, generated = 1751 + 99, 100
    assert compute["full_flops"] == COST.full_flops(read, generated)
    analysed = read if budget < 1 else 0
    assert compute["spent_flops"] == COST.flops(read, compute["tiles"], generated, analysed).total
    assert compute["mean_tile_bytes"] == read / compute["tiles"]
    assert compute["depth"] is None


def test_a_budget_under_the_floor_is_granted_the_floor_and_says_so(server: Running) -> None:
    compute = server.complete(prompt="budget " * 250, max_tokens=10, compute_budget=0.001)["usage"]["compute"]
    assert (compute["requested"], compute["reason"], compute["tiles"]) == (0.001, "floor", 0)
    assert compute["mean_tile_bytes"] is None
    assert compute["granted"] == compute["spent"]
    assert compute["spent_flops"] == COST.flops(1751 + 9, 0, 10, 0).total


def test_the_header_sets_the_budget_and_the_body_wins(server: Running) -> None:
    def asked(headers: dict[str, str], **fields: object) -> float:
        body = {"prompt": "x", "max_tokens": 1} | fields
        answer = server.client.post("/v1/completions", json=body, headers=headers)
        return answer.json()["usage"]["compute"]["requested"]

    assert asked({"X-Compute-Budget": "0.75"}) == 0.75
    assert asked({"X-Compute-Budget": '{"target": 0.7, "min": 0.5}'}) == 0.7
    assert asked({"X-Compute-Budget": "0.75"}, compute_budget=0.9) == 0.9
    assert asked({}) == 1.0


def test_a_range_is_granted_its_target_while_there_is_no_load(server: Running) -> None:
    compute = server.complete(compute_budget={"target": 0.9, "min": 0.2})["usage"]["compute"]
    assert (compute["requested"], compute["granted"]) == (0.9, 0.9)


def test_greedy_text_repeats_and_seeds_repeat(server: Running) -> None:
    def text(**fields: object) -> str:
        return server.complete(max_tokens=40, **fields)["choices"][0]["text"]

    assert text() == text()
    assert text(temperature=1.5, seed=3) == text(temperature=1.5, seed=3)
    assert text(temperature=1.5, seed=3) != text(temperature=1.5, seed=4)


def test_a_stop_string_ends_the_text_before_itself(server: Running) -> None:
    whole = server.complete(max_tokens=60, ignore_eos=True)["choices"][0]["text"]
    stop = whole[20:23]
    answer = server.complete(max_tokens=60, ignore_eos=True, stop=["never to be seen", stop])
    assert answer["choices"][0]["text"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 60


@pytest.mark.parametrize("prompt", ["", "a", "x" * 63, "x" * 64, "x" * 65, "é" * 1000])
def test_prompts_of_every_size(server: Running, prompt: str) -> None:
    usage = server.complete(prompt=prompt, max_tokens=3)["usage"]
    assert usage["prompt_tokens"] == len(prompt.encode()) + 1


def test_fields_that_leave_the_answer_as_it_is_are_taken(server: Running) -> None:
    plain = server.complete(temperature=0)
    answer = server.complete(
        temperature=0, model="tiny", n=1, best_of=1, echo=False, logprobs=None, repetition_penalty=1.0,
        presence_penalty=0, user="u", logit_bias={}, suffix=None, min_p=0.0, top_k=-1, stop=None, seed=None,
        something_new=[1],
    )  # fmt: skip
    assert answer["choices"] == plain["choices"]


def test_counters_grow_by_what_a_request_used(server: Running) -> None:
    names = ["rheostat_prompt_tokens_total", "rheostat_generation_tokens_total", "rheostat_compute_flops_total"]
    before = [server.metric(name) for name in names]
    usage = server.complete(prompt="count me", max_tokens=7)["usage"]
    grown = [server.metric(name) - value for name, value in zip(names, before, strict=True)]
    assert grown == [usage["prompt_tokens"], usage["completion_tokens"], usage["compute"]["spent_flops"]]
