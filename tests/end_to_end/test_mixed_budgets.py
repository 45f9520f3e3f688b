from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from model.checkpoint import EMBEDDED_CHECKPOINT, load_checkpoint
from tests.service.servers import Running, serving

TEXT = """def parse(line):
    \"\"\"Return the fields of a line, split at commas.\"\"\"
    fields = line.strip().split(",")
    return [field.strip() for field in fields if field]

The parser reads a file line by line. Empty lines are ignored, and every other line must hold the same number of
fields as the first. """


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(load_checkpoint(EMBEDDED_CHECKPOINT), max_running=8) as running:
        yield running
        running.wait_until_idle()


def request(number: int) -> dict[str, object]:
    """A request of its own length and budget; every fourth one samples."""
    numbers = random.Random(number)
    start = numbers.randrange(len(TEXT))
    return {
        "prompt": (TEXT * 6)[start : start + numbers.randrange(1, 1400)],
        "max_tokens": numbers.randrange(1, 40),
        "compute_budget": 1.0 if number % 5 == 0 else round(numbers.uniform(0.2, 1.0), 3),
        "temperature": 0.8 if number % 4 == 0 else 0,
        "seed": number,
        "ignore_eos": True,
    }


def test_sixteen_mixed_clients_get_what_each_gets_alone_and_the_bill_adds_up(server: Running) -> None:
    requests = [request(number) for number in range(16)]
    alone = [server.complete(**fields) for fields in requests]
    before = [server.metric(f"rheostat_compute_{name}_total") for name in ("flops", "full_flops")]
    with ThreadPoolExecutor(16) as clients:
        together = list(clients.map(lambda fields: server.complete(**fields), requests))
    for one, other in zip(alone, together, strict=True):
        assert other["choices"] == one["choices"]
        assert other["usage"] == one["usage"]
    after = [server.metric(f"rheostat_compute_{name}_total") for name in ("flops", "full_flops")]
    bills = [answer["usage"]["compute"] for answer in together]
    assert after[0] - before[0] == sum(bill["spent_flops"] for bill in bills)
    assert after[1] - before[1] == sum(bill["full_flops"] for bill in bills)


@pytest.mark.parametrize("budget", [1.0, 0.7, 0.5, 0.4])
def test_the_budget_is_kept_within_five_percent_on_a_long_prompt(server: Running, budget: float) -> None:
    prompt = (TEXT * 20)[:4000]
    compute = server.complete(prompt=prompt, max_tokens=64, compute_budget=budget, ignore_eos=True)["usage"]["compute"]
    assert compute["reason"] == "requested"
    assert compute["spent"] == pytest.approx(budget, rel=0.05)
