"""A converted model whose tokens are subwords, served over HTTP and held against transformers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM

from model.checkpoint import load_checkpoint, load_tokenizer
from model.config import ModelConfig
from model.convert import convert
from model.evaluation.strict import StrictEvaluation
from model.lm import AdaptiveAttentionSystem
from model.tokenizer import Tokenizer
from service.app import create_app
from service.keys import Keyring
from service.settings import Settings
from tests.model.subwords import END, VOCAB_SIZE, train_library, write_subword_source
from tests.service.servers import TINY, Running, serving

PROMPT = "def parse(line):\n    return 日本 🎉"
MIXED = "done – 日本語の 🎉🎉 é."


@pytest.fixture(scope="module", params=["untied", "tied"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mamba2ForCausalLM, Path]:
    """A source's model, and the checkpoint made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_subword_source(folder / "source", {"tie_word_embeddings": request.param == "tied"})
    convert(folder / "source", folder / "ours", name="subwords")
    return model, folder / "ours"


@pytest.fixture(scope="module")
def source(folders: tuple[Mamba2ForCausalLM, Path]) -> Mamba2ForCausalLM:
    return folders[0]


@pytest.fixture(scope="module")
def tokenizer(folders: tuple[Mamba2ForCausalLM, Path]) -> Tokenizer:
    return load_tokenizer(folders[1])


@pytest.fixture(scope="module")
def shared(folders: tuple[Mamba2ForCausalLM, Path], tokenizer: Tokenizer) -> Iterator[Running]:
    with serving(load_checkpoint(folders[1]), tokenizer=tokenizer, max_prompt_bytes=500, max_tokens=100) as running:
        yield running


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    yield shared
    shared.wait_until_idle()


def generate(source: Mamba2ForCausalLM, ids: list[int], count: int) -> list[int]:
    """What transformers generates greedily, the end included where it comes to one."""
    prompt = torch.tensor([ids])
    output = source.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=1
    )
    return output[0, len(ids) :].tolist()


def script(monkeypatch: pytest.MonkeyPatch, tokens: list[int], pause: float = 0.0) -> None:
    """Let the server generate these tokens, whatever the model says, and wait so many seconds before each."""
    rest = list(tokens)

    def scripted(_: object, sequences: list) -> list[int]:
        time.sleep(pause)
        return [rest.pop(0) for _ in sequences]

    monkeypatch.setattr("service.engine.model_runner.sample", scripted)


def events(server: Running, path: str, body: dict) -> list[dict]:
    answer = server.client.post(path, json=body | {"stream": True})
    assert answer.status_code == 200, answer.text
    return [json.loads(block.removeprefix("data: ")) for block in answer.text.split("\n\n")[:-2]]


@pytest.mark.parametrize("prompt", [PROMPT, "The parser", "é", f"one document{END}and another"])
def test_greedy_completions_are_those_of_transformers(
    server: Running, source: Mamba2ForCausalLM, tokenizer: Tokenizer, prompt: str
) -> None:
    ids = tokenizer.encode(prompt)
    expected = generate(source, ids, 40)
    for sent in (prompt, ids):
        answer = server.complete(prompt=sent, max_tokens=40, logprobs=0)
        choice = answer["choices"][0]
        assert choice["text"] == tokenizer.decode(expected)
        assert choice["logprobs"]["tokens"] == [tokenizer.token_name(token) for token in expected]
        assert choice["finish_reason"] == ("stop" if expected[-1] == 0 else "length")
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert answer["usage"]["completion_tokens"] == len(expected)


def test_scores_are_those_of_transformers(server: Running, source: Mamba2ForCausalLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    log_p = source(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    choice = server.complete(prompt=PROMPT, max_tokens=1, echo=True, logprobs=2)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    expected = log_p[:-1].gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1).tolist()
    assert logprobs["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
    assert logprobs["token_logprobs"][-1] == pytest.approx(log_p[-1].max().item(), abs=1e-4)
    for row, top in zip(log_p, logprobs["top_logprobs"][1:], strict=True):
        best = row.topk(2)
        names = [tokenizer.token_name(token) for token in best.indices.tolist()]
        assert [top[name] for name in names] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert choice["text"].startswith(PROMPT)


@pytest.mark.parametrize("budget", [1.0, 0.8, 0.01])
def test_scores_are_those_of_the_strict_evaluation(
    server: Running, folders: tuple[Mamba2ForCausalLM, Path], tokenizer: Tokenizer, budget: float
) -> None:
    text = PROMPT * 8
    evaluation = StrictEvaluation(load_checkpoint(folders[1]), [budget], tokenizer)
    evaluation.add(text.encode())
    score = evaluation.scores[0]
    ids = [tokenizer.start, *tokenizer.tokens(text)]
    choice = server.complete(prompt=ids, max_tokens=0, echo=True, logprobs=0, compute_budget=budget)["choices"][0]
    bits = -sum(choice["logprobs"]["token_logprobs"][1:]) / math.log(2)
    assert bits == pytest.approx(score.bits, rel=1e-5)
    assert score.bytes == len(text.encode()) > len(ids)


def test_stepping_equals_transformers(folders: tuple[Mamba2ForCausalLM, Path]) -> None:
    source, checkpoint = folders
    model = load_checkpoint(checkpoint)
    tokens = torch.randint(0, VOCAB_SIZE, (2, 40))
    state, rates = model.allocate_state(2), torch.ones(2, dtype=torch.float64)
    stepped = torch.stack([model.step(column, state, rates).logits for column in tokens.unbind(1)], 1)
    torch.testing.assert_close(stepped, source(tokens).logits, atol=1e-4, rtol=0)


def test_offsets_point_at_the_character_a_token_begins_with(server: Running, tokenizer: Tokenizer) -> None:
    choice = server.complete(prompt=MIXED, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    tokens = tokenizer.tokens(MIXED)
    ends = [len(tokenizer.join(tokens[:count])) for count in range(len(tokens))]
    expected = [len(MIXED.encode()[:end].decode("utf-8", "ignore")) for end in ends]
    assert choice["text"] == MIXED
    assert choice["logprobs"]["text_offset"] == expected
    assert len(set(expected)) < len(expected), "a character is split"


def test_streamed_text_is_whole_characters(
    server: Running, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokenizer.tokens(MIXED)
    assert any("bytes:" in tokenizer.token_name(token) for token in tokens)
    script(monkeypatch, tokens, pause=0.03)  # longer than text of a stream waits for company
    body = {"prompt": "日", "max_tokens": len(tokens), "temperature": 0, "echo": True}
    pieces = [chunk["choices"][0]["text"] for chunk in events(server, "/v1/completions", body)]
    assert "".join(pieces) == f"日{MIXED}"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 5


@pytest.mark.parametrize(
    ("stop", "expected"), [("本語", "done – 日"), ("🎉 é", "done – 日本語の 🎉"), (["x", "ne –"], "do"), ("on", "d")]
)
def test_stop_strings_end_a_text_inside_of_tokens_and_across_them(
    server: Running, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, stop: object, expected: str
) -> None:
    script(monkeypatch, [*tokenizer.tokens(MIXED), *tokenizer.tokens(" and more, never read")])
    choice = server.complete(max_tokens=60, stop=stop)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (expected, "stop")


def test_the_end_token_ends_a_text_unless_it_is_ignored(
    server: Running, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [*tokenizer.tokens("one"), 0, *tokenizer.tokens("two")]
    script(monkeypatch, tokens)
    choice = server.complete(max_tokens=len(tokens), logprobs=0)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"][-1]) == ("one", "stop", END)
    script(monkeypatch, tokens)
    assert server.complete(max_tokens=len(tokens), ignore_eos=True)["choices"][0]["text"] == "onetwo"


def test_penalties_count_tokens(server: Running, source: Mamba2ForCausalLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    logits = source(torch.tensor([ids])).logits[0, -1]
    said = sorted(set(ids))
    logits[said] = torch.where(logits[said] > 0, logits[said] / 1.7, logits[said] * 1.7)
    choice = server.complete(prompt=PROMPT, max_tokens=1, repetition_penalty=1.7, logprobs=0)["choices"][0]
    assert choice["logprobs"]["tokens"] == [tokenizer.token_name(int(logits.argmax()))]


@pytest.mark.parametrize("prompt", [[400], [[5, 400]], [[-1]], [10**30], ["x" * 2001]])
def test_bad_prompts_are_named(server: Running, prompt: object) -> None:
    answer = server.client.post("/v1/completions", json={"prompt": prompt})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"
    assert "token" in answer.json()["error"]["message"]


def test_every_id_of_the_model_may_be_sent(server: Running) -> None:
    assert server.complete(prompt=[0, 256, 399], max_tokens=3, ignore_eos=True)["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("prompt", ["", [[]]])
def test_an_empty_prompt_begins_with_the_start(server: Running, source: Mamba2ForCausalLM, prompt: object) -> None:
    answer = server.complete(prompt=prompt, max_tokens=1, echo=True, logprobs=0)
    assert answer["usage"]["prompt_tokens"] == 1
    log_p = source(torch.tensor([[0]])).logits[0, -1].double().log_softmax(-1)
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx([log_p.max().item()], abs=1e-4)


def test_chat_reads_the_plain_template(server: Running, source: Mamba2ForCausalLM, tokenizer: Tokenizer) -> None:
    expected = generate(source, tokenizer.encode("User: 日本?\n\nAssistant: "), 12)
    body = {"messages": [{"role": "user", "content": "日本?"}], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = server.client.post("/v1/chat/completions", json=body | {"logprobs": True, "top_logprobs": 2}).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content][: len(expected)] == [
        list(tokenizer.token_bytes(token)) for token in expected
    ]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    pieces = [chunk["choices"][0] for chunk in events(server, "/v1/chat/completions", body)]
    streamed = "".join(piece["delta"].get("content") or "" for piece in pieces)
    assert streamed == answer["choices"][0]["message"]["content"]


def test_tokenizing_and_back(server: Running, tokenizer: Tokenizer) -> None:
    answer = server.client.post("/tokenize", json={"prompt": MIXED}).json()
    assert answer["tokens"] == tokenizer.encode(MIXED)
    assert answer["count"] == len(answer["tokens"])
    back = server.client.post("/detokenize", json={"tokens": [0, *answer["tokens"]]})
    assert back.json() == {"prompt": MIXED}
    assert server.client.post("/tokenize", json={"prompt": "", "add_special_tokens": False}).json()["tokens"] == []
    for tokens in ([400], [-1]):
        bad = server.client.post("/detokenize", json={"tokens": tokens})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "tokens")


def test_a_tiling_has_a_position_per_token(server: Running, tokenizer: Tokenizer) -> None:
    answer = server.client.post("/v1/tilings", json={"text": PROMPT, "budgets": [1, 0.8]}).json()
    assert answer["tokens"] == tokenizer.encode(PROMPT)
    assert len(answer["density"]) == len(answer["tokens"])
    assert answer["tilings"][0]["tiles"][-1]["end"] == len(answer["tokens"])


def test_lower_budgets_are_kept_and_say_that_the_model_was_not_adapted(server: Running) -> None:
    assert server.client.get("/v1/models").json()["data"][0]["adapted"] is False
    full = server.complete(max_tokens=5)["usage"]
    assert "note" not in full
    lower = server.complete(prompt=PROMPT * 4, max_tokens=60, compute_budget=0.8, ignore_eos=True)["usage"]
    assert lower["compute"]["spent"] < 0.9
    assert "was not adapted to budgets below 1" in lower["note"]
    body = {"prompt": "x", "max_tokens": 2, "compute_budget": 0.8, "stream_options": {"include_usage": True}}
    assert events(server, "/v1/completions", body)[-1]["usage"]["note"] == lower["note"]


def test_texts_begin_with_what_the_tokenizer_puts_in_front(tmp_path: Path) -> None:
    library = train_library(special=("<unused>", "<s>"))
    library.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    source = write_subword_source(tmp_path / "source", library=library, bos_token_id=1, eos_token_id=2)
    convert(tmp_path / "source", tmp_path / "ours")
    tokenizer = load_tokenizer(tmp_path / "ours")
    ids = [1, *tokenizer.tokens("The parser")]
    with serving(load_checkpoint(tmp_path / "ours"), tokenizer=tokenizer) as server:
        expected = tokenizer.decode(token for token in generate(source, ids, 10) if token != 2)
        answer = server.complete(prompt="The parser", max_tokens=10, echo=True, logprobs=0)
        assert answer["choices"][0]["text"] == f"The parser{expected}"
        assert answer["usage"]["prompt_tokens"] == len(ids)
        first = answer["choices"][0]["logprobs"]
        assert first["tokens"][0] == tokenizer.token_name(ids[1])
        assert first["token_logprobs"][0] is not None
        sent = server.complete(prompt=ids, max_tokens=10, echo=True, logprobs=0)["choices"][0]["logprobs"]
        assert (sent["tokens"][0], sent["token_logprobs"][0]) == ("<s>", None)
        assert sent["token_logprobs"][1:] == first["token_logprobs"]
        plain = server.client.post("/tokenize", json={"prompt": "The parser", "add_special_tokens": False}).json()
        assert plain["tokens"] == ids[1:]


def test_a_model_of_another_vocabulary_is_refused() -> None:
    config = ModelConfig(**{**TINY.model_dump(), "vocab_size": 300})
    with pytest.raises(ValueError, match="tiny: vocab_size = 300 must be 257 to read bytes"):
        create_app(Settings(), AdaptiveAttentionSystem(config), Keyring([]))
