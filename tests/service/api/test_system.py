from __future__ import annotations

import pytest

from model.cost import CostModel
from tests.service.servers import TINY, Running


def test_the_model_is_listed_with_its_floor(server: Running) -> None:
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["tiny"]
    assert listed["data"][0]["compute_floor"] == CostModel(TINY).floor
    assert server.client.get("/v1/models/tiny").json() == listed["data"][0]
    assert server.client.get("/v1/models/other").status_code == 404


def test_health_is_good_while_the_engine_moves(server: Running) -> None:
    answer = server.client.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_health_is_bad_while_a_step_hangs(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.context.engine, "stalled_for", lambda: 1e9)
    assert server.client.get("/health").status_code == 503


def test_metrics_are_prometheus_text_of_this_server(server: Running) -> None:
    answer = server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'rheostat_model_info{model_name="tiny"} 1.0' in answer.text


def test_a_request_id_comes_back_and_a_bad_one_is_replaced(server: Running) -> None:
    def answered(given: str) -> str:
        return server.client.get("/health", headers={"x-request-id": given}).headers["x-request-id"]

    assert answered("abc-1.2_3") == "abc-1.2_3"
    assert answered("x y") != "x y"
    assert len(answered("a" * 129)) == 32
