from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model.checkpoint import EMBEDDED_CHECKPOINT, load_checkpoint
from model.cost import CostModel
from model.evaluation.strict import StrictEvaluation
from model.tokenizer import DOCUMENT, ByteTokenizer
from service.api.logprobs import TextOffsets
from tests.model.shapes import random_model, step_through
from tests.service.servers import Running, serving, tiny_model

TEXT = (
    "def parse(line):\n    return [field.strip() for field in line.split(',')]\n\n"
    "The parser reads a file line by line – äöü – and every line must hold the same number of fields. "
) * 9
IDS = [DOCUMENT, *TEXT.encode()]
BUDGETS = [1.0, 0.8, 0.5, 0.3, 0.01]


@pytest.fixture(scope="module")
def embedded() -> Iterator[Running]:
    with serving(load_checkpoint(EMBEDDED_CHECKPOINT), max_running=8) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture(scope="module")
def restless() -> Iterator[Running]:
    """A model whose every parameter is moved, so that firing depends on the text."""
    with serving(random_model(), max_running=8) as running:
        yield running
        running.wait_until_idle()


def scored(server: Running, prompt: object, **fields: object) -> dict:
    """A request as lm-evaluation-harness sends it."""
    return server.complete(**({"prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1} | fields))


def token_logprobs(answer: dict, choice: int = 0) -> list[float]:
    return answer["choices"][choice]["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_echoed_prompt_scores_as_it_does_offline(embedded: Running, budget: float) -> None:
    model = load_checkpoint(EMBEDDED_CHECKPOINT)
    answer = scored(embedded, [IDS], compute_budget=budget)
    evaluation = StrictEvaluation(model, [budget])
    evaluation.add(TEXT.encode())
    score = evaluation.scores[0]
    bits = -sum(token_logprobs(answer)[1:-1]) / math.log(2)
    assert bits / score.bytes == pytest.approx(score.bits_per_byte, abs=1e-4)
    # The server has also read the last byte, to predict the one that it generated.
    compute, extra = answer["usage"]["compute"], model.cost.full_flops(1, 1)
    assert compute["full_flops"] == score.full_flops + extra
    last_fired = compute["tiles"] - score.fires
    assert last_fired in (0, 1)
    rates = model.cost.rates(budget)
    last = model.cost.flops(1, last_fired, 1, int(model.cost.analysed(rates.decode)), depth=rates.depth)
    assert compute["spent_flops"] == score.spent_flops + last.total


@pytest.mark.parametrize("budget", [1.0, 0.8, 0.6, 0.01])
def test_every_position_scores_as_reading_byte_by_byte_does(restless: Running, budget: float) -> None:
    model = random_model()
    rates = torch.tensor([model.cost.rates(budget).decode], dtype=torch.float64)
    logits, fires = step_through(model, torch.tensor([IDS]), rates)
    expected = logits[0, :-1].double().log_softmax(-1).gather(-1, torch.tensor(IDS[1:]).unsqueeze(-1)).squeeze(-1)
    answer = scored(restless, [IDS], compute_budget=budget)
    given = token_logprobs(answer)
    assert given[0] is None
    assert given[1:-1] == pytest.approx(expected.tolist(), abs=1e-4)
    assert answer["usage"]["compute"]["tiles"] == int(fires.sum())
    chosen = logits[0, -1].double().log_softmax(-1).max().item()
    assert given[-1] == pytest.approx(chosen, abs=1e-4)


def test_a_score_is_the_same_whatever_stands_beside_it(restless: Running) -> None:
    prompts = [IDS[:1] + IDS[start : start + 150 + 31 * start] for start in (1, 4, 9, 2)]
    alone = [scored(restless, [prompt], compute_budget=0.7)["choices"][0] for prompt in prompts]
    listed = scored(restless, prompts, compute_budget=0.7)["choices"]
    with ThreadPoolExecutor(8) as clients:
        noise = [
            clients.submit(restless.complete, prompt=TEXT, max_tokens=40, compute_budget=budget, ignore_eos=True)
            for budget in (1.0, 0.6, 0.01)
        ]
        busy = list(clients.map(lambda ids: scored(restless, [ids], compute_budget=0.7)["choices"][0], prompts))
        for future in noise:
            future.result()
    for number, choice in enumerate(alone):
        assert listed[number] == choice | {"index": number, "compute": listed[number]["compute"]}
        assert busy[number] == choice


def test_greedy_is_decided_by_the_identical_float(restless: Running) -> None:
    answer = scored(restless, [IDS], max_tokens=20, ignore_eos=True, logprobs=3)
    logprobs = answer["choices"][0]["logprobs"]
    generated = zip(logprobs["token_logprobs"][len(IDS) :], logprobs["top_logprobs"][len(IDS) :], strict=True)
    assert all(logprob == max(top.values()) for logprob, top in generated)
    prompt = zip(logprobs["token_logprobs"][1 : len(IDS)], logprobs["top_logprobs"][1 : len(IDS)], strict=True)
    assert any(logprob != max(top.values()) for logprob, top in prompt)
    assert all(len(top) in (3, 4) for top in logprobs["top_logprobs"][1:])
    for token, logprob, top in zip(
        logprobs["tokens"][1:], logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True
    ):
        assert top[token] == logprob


def test_entries_follow_the_ids_that_were_sent(server: Running) -> None:
    with_separator = scored(server, [[DOCUMENT, 97, 98]])["choices"][0]["logprobs"]
    assert with_separator["tokens"][:3] == ["<|document|>", "a", "b"]
    assert (with_separator["token_logprobs"][0], with_separator["top_logprobs"][0]) == (None, None)
    without = scored(server, [97, 98])["choices"][0]["logprobs"]
    assert without["tokens"] == with_separator["tokens"][1:]
    assert without["token_logprobs"] == with_separator["token_logprobs"][1:]
    assert scored(server, "ab")["choices"][0]["logprobs"] == without
    alone = scored(server, [[DOCUMENT]], max_tokens=0)["choices"][0]
    assert alone["text"] == ""
    assert alone["logprobs"] == {
        "tokens": ["<|document|>"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]
    }  # fmt: skip


def test_scoring_without_generating(server: Running) -> None:
    answer = scored(server, "score me", max_tokens=0)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("score me", "length")
    assert len(choice["logprobs"]["tokens"]) == 8
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["compute"]["full_flops"] == CostModel(tiny_model().config).full_flops(9, 9)


def test_usage_shows_where_a_prompt_was_scored(server: Running) -> None:
    assert scored(server, ["abc", "de"])["usage"]["prompt_tokens_details"]["scored_tokens"] == 7
    for fields in ({"echo": False}, {"logprobs": None}):
        assert scored(server, "abc", **fields)["usage"]["prompt_tokens_details"]["scored_tokens"] == 0


def test_offsets_point_at_the_character_of_each_token(server: Running) -> None:
    prompt = "aé€𝄞b"
    choice = scored(server, prompt, max_tokens=0)["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == prompt
    assert logprobs["tokens"][:3] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4]


def test_generated_tokens_have_scores_without_echo(server: Running) -> None:
    answer = server.complete(max_tokens=12, logprobs=0, ignore_eos=True)
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 12
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top == {token: logprob}


@pytest.mark.parametrize("fields", [{"echo": True}, {"echo": False}, {"echo": True, "max_tokens": 0}])
def test_a_stream_has_the_same_scores_in_pieces(server: Running, fields: dict[str, object]) -> None:
    body = {"prompt": "é stream " * 20, "temperature": 0, "max_tokens": 20, "logprobs": 2, "ignore_eos": True} | fields
    whole = server.complete(**body)["choices"][0]
    answer = server.client.post("/v1/completions", json=body | {"stream": True})
    chunks = [json.loads(block.removeprefix("data: ")) for block in answer.text.split("\n\n")[:-2]]
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for piece in pieces for value in piece["logprobs"][name]] == values


def test_token_texts_are_distinct() -> None:
    assert len({ByteTokenizer().token_name(token) for token in range(257)}) == 257


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"ab", [0, 1]), ("é€".encode(), [0, 0, 1, 1, 1]), (b"\xffa", [0, 1]), (b"\xc3a", [0, 1]),
        (b"\xe2\x82a", [0, 0, 1]),
    ],
)  # fmt: skip
def test_offsets_in_any_bytes(content: bytes, expected: list[int]) -> None:
    offsets = TextOffsets()
    assert [offsets.place(bytes([byte])) for byte in content] == expected
    text = content.decode("utf-8", "replace")
    assert expected[-1] == len(text) - 1
