from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from model.adaptive.density import FEATURES
from model.lm import AdaptiveAttentionSystem
from model.tokenizer import DOCUMENT
from tests.model.shapes import PROPAGATING, SHALLOW, UNMEASURED, random_model
from tests.service.servers import Running, serving

TEXT = "The parser reads é line by line, and every line must hold the same number of fields. " * 5
BUDGETS = [1.0, 0.8, 0.6, 0.01]


@pytest.fixture(scope="module")
def model() -> AdaptiveAttentionSystem:
    return random_model()


@pytest.fixture(scope="module")
def restless(model: AdaptiveAttentionSystem) -> Iterator[Running]:
    with serving(model) as running:
        yield running
        running.wait_until_idle()


def tilings(server: Running, **fields: object) -> dict:
    answer = server.client.post("/v1/tilings", json={"text": TEXT, "budgets": BUDGETS} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_density_and_features_are_those_of_the_whole_text(restless: Running, model: AdaptiveAttentionSystem) -> None:
    answer = tilings(restless)
    tokens = torch.tensor([[DOCUMENT, *TEXT.encode()]])
    assert answer["tokens"] == tokens[0].tolist()
    assert answer["density"] == pytest.approx(model.analyse(tokens)[0].tolist(), rel=1e-3, abs=1e-5)
    assert set(answer["features"]) == set(FEATURES)
    features = torch.tensor(list(answer["features"].values())).T
    level, smoothed = 0.0, []
    for position, bits in enumerate(model.density.combine(features.float()).tolist(), start=1):
        level += (bits - level) / min(position, model.config.window_size)
        smoothed.append(level)
    assert smoothed == pytest.approx(answer["density"], rel=1e-3, abs=1e-5)


def test_a_density_that_measures_nothing_has_one_feature() -> None:
    with serving(random_model(UNMEASURED)) as running:
        features = tilings(running)["features"]
        running.wait_until_idle()
    assert [name for name, values in features.items() if values is None] == list(FEATURES[:-1])
    assert len(features["learned"]) == 1 + len(TEXT.encode())


def test_tiles_cost_what_the_trunk_does_where_its_states_read_on() -> None:
    model = random_model(PROPAGATING)
    cost = model.cost
    with serving(model) as running:
        full, *between, floor = tilings(running, budgets=[1, 0.8, 0.5, 0.2])["tilings"]
        running.wait_until_idle()
    length = 1 + len(TEXT.encode())
    assert [tile["compute_cost"] for tile in full["tiles"]] == [cost.unit.trunk] * length
    assert floor["tiles"] == []
    for tiling in between:
        costs = sum(tile["compute_cost"] for tile in tiling["tiles"])
        assert tiling["spent_flops"] - costs == length * (cost.unit.encoder + cost.unit.decoder + cost.unit.density)


@pytest.mark.parametrize("rule", ["plan", "online"])
def test_each_budget_places_the_stage_that_it_can_pay_for(rule: str) -> None:
    model = random_model(SHALLOW)
    cost, budgets = model.cost, [1.0, 0.9, 0.75, 0.7, 0.55, 0.4, 0.01]
    depths = [cost.rates(budget).depth for budget in budgets]
    assert set(depths) == {None, 1, 2}
    with serving(model) as running:
        answer = tilings(running, budgets=budgets, rule=rule)
        scored = {"logprobs": 0} if rule == "online" else {}
        for given, budget in zip(answer["tilings"], budgets, strict=True):
            text = {"prompt": TEXT, "max_tokens": 0, "echo": True, "compute_budget": budget}
            read = running.complete(**text, **scored)["usage"]["compute"]
            for name in ("spent_flops", "full_flops", "spent", "reason", "depth"):
                assert given[name] == read[name], (budget, name)
            assert read["depth"] == cost.rates(budget).depth
            inside = sum(tile["compute_cost"] for tile in given["tiles"])
            assert inside <= read["spent_flops"]
        one = tilings(running, budgets=[0.4], rule=rule)
        running.wait_until_idle()
    length = 1 + len(TEXT.encode())
    densities = sum(cost.density(depth) for depth in SHALLOW.depths)
    unit = length * (cost.unit.encoder + densities + cost.below(None))
    assert answer["usage"]["compute"]["spent_flops"] == unit, "two stages are run to place the third"
    assert one["usage"]["compute"]["spent_flops"] == length * (cost.unit.encoder + cost.density(1))
    assert one["density"] == answer["density"]


@pytest.mark.parametrize(("number", "budget"), list(enumerate(BUDGETS)))
def test_a_plan_is_what_reading_the_text_as_a_prompt_does(restless: Running, number: int, budget: float) -> None:
    given = tilings(restless)["tilings"][number]
    read = restless.complete(prompt=TEXT, max_tokens=0, echo=True, compute_budget=budget)["usage"]["compute"]
    for name in ("spent_flops", "full_flops", "spent", "granted", "reason", "mean_tile_bytes"):
        assert given[name] == read[name], name
    assert sum(tile["compute_cost"] > 0 for tile in given["tiles"]) == read["tiles"]


@pytest.mark.parametrize(("number", "budget"), list(enumerate(BUDGETS)))
def test_the_online_rule_is_that_of_scoring(restless: Running, number: int, budget: float) -> None:
    given = tilings(restless, rule="online")["tilings"][number]
    fields = {"prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 0}
    read = restless.complete(**fields, compute_budget=budget)["usage"]["compute"]
    for name in ("spent_flops", "full_flops", "spent", "mean_tile_bytes"):
        assert given[name] == read[name], name


@pytest.mark.parametrize("rule", ["plan", "online"])
def test_tiles_cover_the_text_and_their_losses_follow_from_the_density(
    restless: Running, model: AdaptiveAttentionSystem, rule: str
) -> None:
    answer = tilings(restless, rule=rule)
    density, length = answer["density"], len(answer["tokens"])
    for tiling in answer["tilings"][:3]:
        tiles = tiling["tiles"]
        assert (tiles[0]["start"], tiles[-1]["end"]) == (0, length)
        assert all(one["end"] == other["start"] for one, other in pairwise(tiles))
        assert all(tile["compute_cost"] == model.cost.unit.trunk for tile in tiles[:-1])
        for tile in tiles[1:]:
            inside = range(tile["start"], tile["end"] - bool(tile["compute_cost"]))
            ages = torch.arange(1, len(inside) + 1)
            lost = sum(
                d * s for d, s in zip((density[i] for i in inside), model.tiles.staleness(ages).tolist(), strict=True)
            )
            assert tile["info_loss"] == pytest.approx(lost, rel=1e-4, abs=1e-6)
        assert tiling["info_loss"] == pytest.approx(sum(tile["info_loss"] for tile in tiles), abs=1e-9)
    full, floor = answer["tilings"][0], answer["tilings"][-1]
    assert (len(full["tiles"]), full["info_loss"], full["spent"]) == (length, 0.0, 1.0)
    assert (floor["tiles"], floor["reason"], floor["mean_tile_bytes"]) == ([], "floor", None)
    losses = [tiling["info_loss"] for tiling in answer["tilings"]]
    assert losses == sorted(losses), "what is saved is paid for in bits"


def test_the_analysis_itself_is_billed(restless: Running, model: AdaptiveAttentionSystem) -> None:
    names = ["rheostat_compute_flops_total", "rheostat_compute_full_flops_total", "rheostat_prompt_tokens_total"]
    before = [restless.metric(name) for name in names]
    usage = tilings(restless)["usage"]
    grown = [restless.metric(name) - value for name, value in zip(names, before, strict=True)]
    assert grown == [usage["compute"]["spent_flops"], usage["compute"]["full_flops"], usage["prompt_tokens"]]
    unit = model.cost.unit
    assert usage["compute"]["spent_flops"] == usage["prompt_tokens"] * (unit.encoder + unit.density)


@pytest.mark.parametrize("text", ["", "a", "x" * 63, "x" * 64])
def test_texts_of_every_size(restless: Running, text: str) -> None:
    answer = tilings(restless, text=text, budgets=[0.7])
    assert len(answer["density"]) == len(text) + 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": None}, "text"), ({"text": 1}, "text"), ({"text": "\ud800"}, "text"), ({"text": "x" * 16385}, "text"),
        ({"budgets": []}, "budgets"), ({"budgets": [0]}, "budgets"), ({"budgets": [1.1]}, "budgets"),
        ({"budgets": [float("nan")]}, "budgets"), ({"budgets": [0.5] * 9}, "budgets"), ({"budgets": 0.5}, "budgets"),
        ({"rule": "guess"}, "rule"), ({"compute_budget": 0.5}, "compute_budget"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(restless: Running, fields: dict, param: str) -> None:
    body = json.dumps({"text": "x"} | fields)
    answer = restless.client.post("/v1/tilings", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_another_model_is_not_found(restless: Running) -> None:
    answer = restless.client.post("/v1/tilings", json={"text": "x", "model": "other"})
    assert answer.status_code == 404
