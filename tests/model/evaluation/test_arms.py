from __future__ import annotations

import numpy as np
import pytest
import torch

from model.adaptive.density import FEATURES
from model.adaptive.tiling import Pace
from model.cost import Rates
from model.evaluation.arms import (
    ADAPTIVE,
    BLIND,
    PLANNED_ARMS,
    REFITTED,
    SHUFFLED,
    STRETCH,
    STRICT_ARMS,
    StretchTiles,
    Text,
    ThresholdTiles,
    make_arms,
    nearness,
    restrict,
    shuffle_runs,
    shuffle_tiles,
    smooth_features,
)
from model.evaluation.passages import Protocol, read_features
from model.ops.tiling import FARTHEST, Bytes, pacing_error
from model.training.calibration import calibrate_tiles
from tests.model.evaluation.texts import CALIBRATION, TOKENS, document, read
from tests.model.shapes import SMALL, random_model

RATES = Rates(0.4, 0.4)


def sizes(fires: Bytes) -> list[int]:
    return np.diff(np.flatnonzero(fires) + 1, prepend=0).tolist()


def lengths(fires: Bytes, value: int) -> list[int]:
    runs = np.split(fires, np.flatnonzero(np.diff(fires)) + 1)
    return sorted(len(run) for run in runs if run[0] == value)


@pytest.mark.parametrize("name", STRICT_ARMS)
def test_only_shuffled_places_depend_on_what_follows(name: str) -> None:
    model = random_model()
    model.tiles.log_tau.fill_(-2.0)  # staleness hardly matters, so that the density decides
    calibrate_tiles(model.tiles, model.analyse(TOKENS).numpy())
    head, tail, other = document(700, 1), document(300, 2), document(300, 3)
    one, two = (read(model, Protocol.STRICT, [head + rest])[0] for rest in (tail, other))
    (arm,) = make_arms(model, [name], Protocol.STRICT, CALIBRATION)
    places = [arm.place(text.passage, arm.signal(text), RATES) for text in (one, two)]
    assert 0 < places[0][:700].sum() < 700
    # The token read at 700 is the last of the head, for the start stands before it.
    assert np.array_equal(places[0][:701], places[1][:701]) == (name not in SHUFFLED)
    blind = name in BLIND[:3] or np.ptp(arm.signal(one)) == 0.0
    assert np.array_equal(places[0], places[1]) == blind


@pytest.mark.parametrize(("name", "ahead"), [(name, name in (ADAPTIVE, "threshold")) for name in PLANNED_ARMS])
def test_plans_depend_on_no_byte_after_their_block_and_some_on_all_of_it(name: str, ahead: bool) -> None:
    model = random_model()
    block = SMALL.block_size
    content = document(4 * block, 1)
    one = read(model, Protocol.ORACLE, [content])[0]
    (arm,) = make_arms(model, [name], Protocol.ORACLE, CALIBRATION)
    signal = arm.signal(one)
    places = arm.place(one.passage, signal, RATES)
    dense = signal.copy()
    dense[3 * block - block // 2 :] *= 50.0
    changed = arm.place(one.passage, dense, RATES)
    assert np.array_equal(places[: 2 * block], changed[: 2 * block])
    before = slice(2 * block, 3 * block - block // 2)
    assert np.array_equal(places[before], changed[before]) != ahead
    assert arm.looks_ahead == ahead


def test_shuffled_plans_keep_what_they_are_made_of() -> None:
    fires = (np.random.default_rng(0).random(500) < 0.3).astype(np.uint8)
    tiles, runs = (shuffle(fires, np.random.default_rng(1)) for shuffle in (shuffle_tiles, shuffle_runs))
    assert sorted(sizes(tiles)) == sorted(sizes(fires))
    assert sizes(tiles) != sizes(fires)
    for value in (0, 1):
        assert lengths(runs, value) == lengths(fires, value)
    assert not np.array_equal(runs, fires)
    for shuffle in (shuffle_tiles, shuffle_runs):
        assert not shuffle(np.zeros(9, np.uint8), np.random.default_rng(1)).any()
        assert shuffle(np.ones(9, np.uint8), np.random.default_rng(1)).all()


def test_a_shuffled_arm_has_the_tiles_of_the_shipped_rule() -> None:
    model = random_model()
    (text,) = read(model, Protocol.STRICT, [document(1000, 4)])
    arms = make_arms(model, [ADAPTIVE, *SHUFFLED], Protocol.STRICT, None)
    shipped, tiles, runs = (arm.place(text.passage, arm.signal(text), RATES) for arm in arms)
    assert sorted(sizes(tiles)) == sorted(sizes(shipped))
    assert lengths(runs, 1) == lengths(shipped, 1)


def test_the_threshold_rule_is_its_plain_twin() -> None:
    tiles, random = ThresholdTiles(SMALL), np.random.default_rng(0)
    tiles.log_spread.fill_(-0.5)
    signal, pace, rate, log_threshold = random.lognormal(size=600), Pace(40, 30, 10, 11.5), 0.3, 0.4
    expected, fires, quota = [], 10.0, 11.5
    for offset, value in enumerate(np.log(signal)):
        quota += rate
        error = pacing_error(fires, quota, 40.0 + offset + 1, rate)
        fired = error < 0 if abs(error) >= FARTHEST else value >= 0.4 + tiles.spread * (error + 4.0 * error**3)
        expected.append(int(fired))
        fires += fired
    assert tiles.online(signal, rate, pace, log_threshold).tolist() == expected
    assert 0 < sum(expected) < 600


def test_a_threshold_plan_takes_the_largest_values_as_many_as_are_due() -> None:
    signal = np.array([3.0, 1.0, 4.0, 1.5, 9.0, 2.0])
    fires = ThresholdTiles(SMALL).plan(signal, 0.5, Pace(10, 9, 5, 5.0))
    assert fires.tolist() == [1, 0, 1, 0, 1, 0]
    assert ThresholdTiles(SMALL).plan(signal, 0.5, Pace(10, 9, 5, 1.0)).sum() == 0


def test_blind_stretches_go_on_from_document_to_document() -> None:
    positions = np.arange(10 * STRETCH, dtype=np.float64)
    fires = StretchTiles(SMALL).online(positions, 0.25, Pace(0, 0, 0, 0.0))
    assert lengths(fires, 1)[:2] == [STRETCH, STRETCH]
    assert lengths(fires, 0)[-1] == 3 * STRETCH
    model = random_model()
    texts = read(model, Protocol.STRICT, [document(90, 1), document(550, 2)])
    (arm,) = make_arms(model, ["stretches"], Protocol.STRICT, None)
    parts = [arm.place(text.passage, arm.signal(text), Rates(0.25, 0.25)) for text in texts]
    assert np.array_equal(np.concatenate(parts), fires)


def test_whitespace_is_nearest_at_itself() -> None:
    assert nearness(np.array([True, False, False, True])).tolist() == [1.0, 0.5, 1 / 3, 1.0]
    model = random_model()
    (text,) = read(model, Protocol.STRICT, [document(2000, 5)])
    (arm,) = make_arms(model, ["whitespace"], Protocol.STRICT, CALIBRATION)
    fires = arm.place(text.passage, arm.signal(text), Rates(0.1, 0.1)).astype(bool)
    assert fires[text.passage.spaces].sum() > 0.8 * fires.sum()


def test_fewer_features_keep_the_mean_and_the_deviation_of_the_log_density() -> None:
    model = random_model()
    analyzer, features = model.density, read_features(model, TOKENS)
    with torch.no_grad():
        analyzer.raw_weight.copy_(torch.tensor([-1.0, 0.5, -4.0, 1.0]))
    analyzer.update_statistics(features, 1.0)
    whole = analyzer.combine(features).log()
    for index in range(4):
        kept = [other == index for other in range(len(FEATURES))]
        part = restrict(analyzer, kept, features)(features).log()
        assert part.mean().item() == pytest.approx(whole.mean().item(), abs=1e-3)
        assert part.std().item() == pytest.approx(whole.std().item(), rel=1e-3)
        by_feature = part.flatten()[features[..., index].flatten().argsort()]
        assert (by_feature.diff() >= -1e-5).all()
        assert part.std() > 0.1
    with torch.no_grad():
        analyzer.raw_weight[2] = -torch.inf
    silent = restrict(analyzer, [index == 2 for index in range(len(FEATURES))], features)(features)
    assert silent.max() == silent.min()
    whole = analyzer.combine(features).log()
    everything = restrict(analyzer, [True] * len(FEATURES), features)
    torch.testing.assert_close(everything(features).log(), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["only", "without"])
def test_arms_of_features_read_those_that_they_are_named_after(kind: str) -> None:
    model = random_model()
    (text,) = read(model, Protocol.STRICT, [document(400, 1)])
    (arm,) = make_arms(model, [f"{kind}-predictive_entropy"], Protocol.STRICT, CALIBRATION)
    for index, feature in enumerate(FEATURES[:4]):
        features = text.features.clone()
        features[:, index] += 1.0
        same = np.array_equal(arm.signal(text), arm.signal(Text(text.passage, features)))
        assert same == ((feature == "predictive_entropy") == (kind == "without")), feature


def test_density_is_that_of_the_model() -> None:
    model = random_model()
    ours = smooth_features(model.density, read_features(model, TOKENS), model.density.combine)
    np.testing.assert_allclose(ours, model.analyse(TOKENS).numpy(), rtol=1e-6)


def test_thresholds_of_other_signals_are_fitted_and_the_model_stays_as_it_is() -> None:
    model = random_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arms = make_arms(model, REFITTED, Protocol.STRICT, CALIBRATION)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(not torch.equal(arm.tiles.log_thresholds, model.tiles.log_thresholds) for arm in arms)


def test_unknown_arms_and_missing_calibration_are_refused() -> None:
    model = random_model()
    with pytest.raises(ValueError, match="arm 'best' of protocol P0 must be one of adaptive, threshold"):
        make_arms(model, ["best"], Protocol.STRICT, None)
    with pytest.raises(ValueError, match="arm 'stretches' of protocol P1 must be one of adaptive, online"):
        make_arms(model, ["stretches"], Protocol.SERVING, None)
    with pytest.raises(ValueError, match="the arms whitespace need calibration text"):
        make_arms(model, ["whitespace"], Protocol.STRICT, None)
