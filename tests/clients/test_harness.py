"""lm-evaluation-harness, unmodified: its scores and texts over HTTP are those of the checkpoint without a server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.conftest import BIN, MODEL, ROOT, Server, run, serving

TASKS = ROOT / "tests/clients/harness"
LENGTH = 40
"""Bytes that the task generates."""
KEYS = {1.0: "clients-full-0123456789", 0.5: "clients-half-0123456789"}
PLAIN_KEY = KEYS[1.0]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a key for each of two budgets."""
    folder = tmp_path_factory.mktemp("keyed")
    tables = [
        f'[b{place}]\nkey = "{key}"\ndefault_budget = {budget}\n' for place, (budget, key) in enumerate(KEYS.items())
    ]
    (folder / "keys.toml").write_text("\n".join(tables))
    with serving(folder, "--keys-file", str(folder / "keys.toml")) as server:
        yield server


def arguments(server: Server, budget: float) -> dict[str, object]:
    """Model arguments: the budget is the key's default where there is such a key, and a header elsewhere."""
    key = KEYS.get(budget, PLAIN_KEY)
    common = {
        "model": MODEL,
        "base_url": f"{server.url}/v1/completions",
        "auth_token": key,
        "custom_prefix_token_id": 256,
        "max_length": 8192,
        "max_retries": 1,
    }
    header = {"Authorization": f"Bearer {key}", "X-Compute-Budget": str(budget)}
    return common if budget in KEYS else common | {"header": header}


def evaluated(server: Server, budget: float, folder: Path) -> dict[str, list[dict]]:
    """The harness's record of each document, in order, by task."""
    tasks = ("rheostat_choices", "rheostat_rolling", "rheostat_generation")
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "local-completions",
        "--model_args", json.dumps(arguments(server, budget)),
        "--batch_size", "4", "--include_path", TASKS, "--tasks", ",".join(tasks),
        "--log_samples", "--output_path", folder,
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    run(command, 300, offline | {"OPENAI_API_KEY": KEYS.get(budget, PLAIN_KEY)})
    records = {}
    for task in tasks:
        (path,) = folder.rglob(f"samples_{task}_*.jsonl")
        records[task] = sorted(map(json.loads, path.read_text("utf-8").splitlines()), key=lambda each: each["doc_id"])
    return records


def documents(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text("utf-8").splitlines()]


def offline(budget: float, score: list[str], generate: list[str]) -> dict[str, list]:
    """What the checkpoint itself says, in the server's environment."""
    asked = json.dumps({"budget": budget, "score": score, "generate": generate, "length": LENGTH})
    command = [BIN / "python", "-m", "tests.clients.offline"]
    return json.loads(subprocess.run(command, input=asked, cwd=ROOT, text=True, check=True, capture_output=True).stdout)


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.25])
def test_scores_and_texts_are_those_without_a_server(keyed: Server, budget: float, tmp_path: Path) -> None:
    records = evaluated(keyed, budget, tmp_path)
    choices, rolling, generation = (documents(name) for name in ("choices", "rolling", "generation"))
    pairs = [(row["text"], row["text"] + ending) for row in choices for ending in row["endings"]]
    texts = [text for pair in pairs for text in pair] + [row["text"] for row in rolling]
    expected = offline(budget, texts, [row["text"] for row in generation])

    scores = iter(expected["score"])
    endings = [-before + after for before, after in ((next(scores), next(scores)) for _ in pairs)]
    found = [float(answer[0][0]) for record in records["rheostat_choices"] for answer in record["resps"]]
    assert found == pytest.approx(endings, abs=1e-4)
    whole = [float(record["resps"][0][0]) for record in records["rheostat_rolling"]]
    assert whole == pytest.approx(list(scores), abs=1e-4)
    assert [record["resps"][0][0] for record in records["rheostat_generation"]] == expected["generate"]
    assert len(found) == 18
    assert len(whole) == 5
    keyed.check_idle()
    assert keyed.metrics()["rheostat_compute_flops_total"] > 0


def test_budgets_differ(keyed: Server) -> None:
    """Else the comparison above would hold for a server that ignores them."""
    text = documents("rolling")[4]["text"]
    full, half, quarter = (offline(budget, [text], [])["score"][0] for budget in (1.0, 0.5, 0.25))
    assert min(abs(full - half), abs(half - quarter), abs(full - quarter)) > 1e-2
