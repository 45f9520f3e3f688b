"""The commands on a converted model of subwords, from its Hugging Face folder to its answers."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM

from model.checkpoint import load_tokenizer
from service.cli import main
from tests.model.subwords import write_subword_source

TEXTS = ["def parse(line):\n    return 日本 🎉\n" * 40, "é"]


@pytest.fixture
def source(tmp_path: Path) -> Mamba2ForCausalLM:
    model = write_subword_source(tmp_path / "source", {"chunk_size": 64})
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "ours"), "--name", "subwords"]) == 0
    return model


def test_generate_reads_and_writes_subwords(
    source: Mamba2ForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(tmp_path / "ours")
    ids = tokenizer.encode("The parser")
    prompt = torch.tensor([ids])
    expected = source.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=1
    )
    text = tokenizer.decode(expected[0, len(ids) :].tolist())
    arguments = ["generate", "The parser", "--checkpoint", str(tmp_path / "ours"), "--temperature", "0"]
    capsys.readouterr()
    assert main([*arguments, "--max-tokens", "12"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{text}\n"
    assert re.search(r"1\.0 tokens per tile, \d+ tokens read, 12 generated, \d+ tokens/s", printed.err)
    assert "not adapted" not in printed.err
    assert main([*arguments, "--max-tokens", "12", "--budget", "0.8"]) == 0
    assert "subwords: this model was not adapted to budgets below 1" in capsys.readouterr().err


def test_evaluate_reports_bits_per_byte_of_text(
    source: Mamba2ForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "documents.txt").write_text("\0".join(TEXTS), encoding="utf-8")
    tokenizer, nats = load_tokenizer(tmp_path / "ours"), 0.0
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.start, *tokenizer.tokens(text)]])
        log_p = source(ids).logits[0, :-1].double().log_softmax(-1)
        nats -= log_p.gather(-1, ids[0, 1:].unsqueeze(-1)).sum().item()
    size = sum(len(text.encode()) for text in TEXTS)
    arguments = ["evaluate", "--documents", str(tmp_path / "documents.txt"), "--checkpoint", str(tmp_path / "ours")]
    capsys.readouterr()
    assert main([*arguments, "--budgets", "1,floor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == size
    assert report["budgets"][0]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert report["budgets"][1]["flop_ratio"] < 0.9


def test_serve_takes_the_tokenizer_beside_the_weights(source: Mamba2ForCausalLM, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--checkpoint", str(tmp_path / "ours")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = iter(process.stderr.readline, "")
            messages = [json.loads(next(lines))["message"] for _ in range(2)]
            assert messages[1].startswith("subwords: this model was not adapted to budgets below 1")
            address = next(found for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            with httpx.Client(base_url=address.group(), timeout=60) as client:
                tokens = client.post("/tokenize", json={"prompt": TEXTS[0]}).json()["tokens"]
                assert tokens == load_tokenizer(tmp_path / "ours").encode(TEXTS[0])
                answer = client.post("/v1/completions", json={"prompt": TEXTS[0], "max_tokens": 3, "ignore_eos": True})
                assert answer.json()["usage"]["prompt_tokens"] == len(tokens)
        finally:
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
