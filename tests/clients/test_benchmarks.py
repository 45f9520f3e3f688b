"""Load generators, unmodified: guidellm and AIPerf, a short streamed run each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.clients.conftest import KEY, MODEL, ROOT, Server, run

AIPERF_BIN = Path(os.environ["AIPERF_BIN"])


def test_guidellm(server: Server, tmp_path: Path) -> None:
    """It ends once it has seen enough: at times its last request is still in progress, and is given up."""
    before = server.metrics()
    prompts, report = tmp_path / "prompts.txt", tmp_path / "report.json"
    prompts.write_text("".join(f"How many lines does file {number} have?\n" for number in range(8)))
    command = [
        Path(sys.executable).with_name("guidellm"), "run", "--disable-console",
        "--backend", f"kind=openai_http,target={server.url},api_key={KEY},request_format=/v1/completions",
        "--profile", "kind=concurrent,streams=2",
        "--constraint", "kind=max_requests,count=6",
        "--data", f"kind=text_file,path={prompts}",
        "--output", f"kind=json,path={report}",
    ]  # fmt: skip
    run(command, 180)
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] in (5, 6)
    assert totals["errored"] == totals["incomplete"] == 0
    server.check_idle()
    after = server.metrics()
    reasons = ("length", "stop", "abort", "error")  # sampled, so an answer may end its document before its length
    names = [f'rheostat_request_success_total{{finished_reason="{reason}"}}' for reason in reasons]
    length, stop, abort, error = (after[name] - before[name] for name in names)
    assert length + stop >= totals["successful"]
    assert length + stop + abort in (5, 6)
    assert error == 0
    assert all(json.loads(request["request_args"])["stream"] for request in benchmark["requests"]["successful"])
    assert all(request["output"] for request in benchmark["requests"]["successful"])


def test_aiperf(server: Server, tmp_path: Path) -> None:
    """In an environment of its own, with its synthetic prompts, for which it needs a tokenizer."""
    tokenizer, artifacts = tmp_path / "tokenizer", tmp_path / "artifacts"
    run([AIPERF_BIN / "python", ROOT / "tests/clients/byte_tokenizer.py", tokenizer], 60)
    before = server.metrics()
    command = [
        AIPERF_BIN / "aiperf", "profile", "--model", MODEL, "--url", server.url, "--api-key", KEY,
        "--endpoint-type", "completions", "--streaming", "--tokenizer", tokenizer, "--use-server-token-count",
        "--concurrency", "2", "--request-count", "6", "--isl", "64", "--osl", "16",
        "--extra-inputs", "ignore_eos:true", "--extra-inputs", "compute_budget:0.5",
        "--artifact-dir", artifacts, "--ui", "none",
    ]  # fmt: skip
    run(command, 180)
    report = json.loads((artifacts / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == report["completed_request_count"]["avg"] == 6
    assert report["error_summary"] == []
    assert report["input_sequence_length"]["avg"] == 65  # 64 bytes and the separator
    assert report["output_sequence_length"]["avg"] == 16
    after = server.metrics()
    assert after["rheostat_generation_tokens_total"] - before["rheostat_generation_tokens_total"] == 6 * 16
    server.check_idle()
