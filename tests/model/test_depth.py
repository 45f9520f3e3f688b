"""A trunk in stages: it may end after some of its blocks, and those below the one that is placed run everywhere."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from model.config import ModelConfig
from model.cost import CostModel
from model.lm import AdaptiveAttentionSystem
from model.training.config import TrainingConfig
from model.training.firing import Reduced, choose_fires, sample_reduced
from model.training.loss import compute_loss
from model.training.validation import validate
from tests.model.shapes import OWN_DECODERS, SHALLOW, random_model, random_tokens, without_compiled_code

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
COST = CostModel(SHALLOW)


DECODERS = pytest.mark.parametrize("shape", [SHALLOW, OWN_DECODERS], ids=["one decoder", "own decoders"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shallow_depths": (2, 1)}, "must rise strictly and end below 3"),
        ({"shallow_depths": (1, 3)}, "must rise strictly and end below 3"),
        ({"least_rates": (0.5,)}, r"least_rates = \(0.5,\) must be as many as shallow_depths = \(1, 2\)"),
        ({"least_rates": (0.5, 0.0)}, "greater than 0"),
        ({"density_measured": True}, "density_measured must be off"),
        ({"propagation_rank": 0}, "propagation_rank must be above 0"),
        ({"own_decoders": True, "decoder_layers": 0}, "own_decoders needs shallow_depths, and decoder_layers above 0"),
        ({"own_decoders": True, "shallow_depths": ()}, "own_decoders needs shallow_depths"),
    ],
)
def test_depths_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(SHALLOW.model_dump() | change)


def test_a_depth_that_the_model_does_not_have_is_refused() -> None:
    model = random_model(SHALLOW)
    with pytest.raises(ValueError, match=r"depth = 4 must be one of \(1, 2, 3\)"):
        model.set_depth(model.allocate_state(1), 4)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
@pytest.mark.parametrize("depth", SHALLOW.depths)
def test_blocks_beyond_the_depth_read_nothing(monkeypatch: pytest.MonkeyPatch, depth: int, *, compiled: bool) -> None:
    if not compiled:
        without_compiled_code(monkeypatch)
    model, tokens = random_model(SHALLOW), random_tokens(1, 40)
    state = model.allocate_state(1, depth=depth)
    model.prefill(tokens, state, 0.5)
    for column in tokens.unbind(1):
        model.step(column, state, torch.tensor([0.5], dtype=torch.float64))
    model.settle(state)
    assert [bool(block.ssm_state.any()) for block in state.trunk] == [number < depth for number in range(3)]


def test_what_waits_is_read_by_the_blocks_that_ran_then(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_model(SHALLOW), random_tokens(2, 40)
    late, at_once = model.allocate_state(2, depth=1), model.allocate_state(2, depth=1)
    seldom, often = (torch.full((2,), rate, dtype=torch.float64) for rate in (0.02, 0.5))

    def read(state: object) -> torch.Tensor:
        for column in tokens[:, :10].unbind(1):
            model.step(column, state, seldom)
        model.set_depth(state, 3)
        return torch.stack([model.step(column, state, often).logits for column in tokens[:, 10:].unbind(1)])

    mine = read(late)
    without_compiled_code(monkeypatch)
    torch.testing.assert_close(mine, read(at_once), **CLOSE)


@DECODERS
def test_rows_of_other_depths_step_alike_by_tensor_operations(
    monkeypatch: pytest.MonkeyPatch, shape: ModelConfig
) -> None:
    model, tokens = random_model(shape), random_tokens(5, 40)
    rates = torch.tensor([1.0, 0.4, 0.1, 0.7, 1.0], dtype=torch.float64)
    outputs = []
    for _ in range(2):
        state = model.allocate_state(5)
        state.depth = torch.tensor([2, 1, 3, 2, 1])
        outputs.append(torch.stack([model.step(column, state, rates).logits for column in tokens.unbind(1)]))
        without_compiled_code(monkeypatch)
    torch.testing.assert_close(*outputs, **CLOSE)


@DECODERS
def test_all_depths_at_once_are_each_of_them(shape: ModelConfig) -> None:
    model, tokens = random_model(shape).requires_grad_(True), random_tokens(2, 50)
    hidden = model.encode(tokens, model.allocate_state(2).encoder).hidden
    outputs, entrances = model.combine_everywhere(hidden)
    for depth, output in zip(SHALLOW.depths, outputs, strict=True):
        torch.testing.assert_close(model.head(output), model(tokens, depth=depth), **CLOSE)
    assert not torch.allclose(outputs[0], outputs[1])
    fires = random_tokens(2, 50, seed=3) % 3 == 0
    for stage, entrance in enumerate(entrances):
        given = model.combine(hidden, fires, model.allocate_state(2, depth=SHALLOW.depths[stage]), entrance=entrance)
        torch.testing.assert_close(model.head(given), model(tokens, fires, depth=SHALLOW.depths[stage]), **CLOSE)


@pytest.mark.parametrize(
    "shape",
    [SHALLOW, SHALLOW.model_copy(update={"d_trunk": 48}), OWN_DECODERS],
    ids=["equal widths", "projected", "own decoders"],
)
def test_a_stage_fires_from_what_those_below_it_leave(shape: ModelConfig) -> None:
    """Against the design, written out: a stage's update is held and fades, those below it run at every byte."""
    model, tokens = random_model(shape), random_tokens(1, 60)
    fires = random_tokens(1, 60, seed=5) % 3 == 0
    router, state = model.router, model.allocate_state(1)
    with torch.no_grad():
        hidden = model.encode(tokens, state.encoder).hidden
        entered = [router.to_trunk(hidden)]
        for block, block_state in zip(model.trunk, state.trunk, strict=True):
            entered.append(block(entered[-1], block_state)[0])
        # The last stage's block, where it runs, with the codes of what it is given elsewhere.
        codes, last = router.propagated(entered[2], 2), model.allocate_state(1).trunk[2]
        sums, held, age = hidden.clone(), torch.zeros(1, 32), 0
        rows = torch.zeros(1, dtype=torch.int64)
        for t in range(60):
            for stage in (0, 1):
                sums[:, t] += router.from_trunk(entered[stage + 1][:, t] - entered[stage][:, t], stage)
            if fires[0, t]:
                left, _ = model.trunk[2].step(entered[2][:, t], last, rows, None, torch.tensor([16]))
                held, age = router.from_trunk(left - entered[2][:, t], 2), 0
            else:
                model.trunk[2].mixer.propagate(codes[:, t], last, rows, torch.tensor([16]))
                age += 1
            sums[:, t] += router.fade(held, torch.tensor([age]))
        for block, block_state in zip(model.decoders()[-1], state.decoder, strict=True):
            sums = block(sums, block_state)[0]
        torch.testing.assert_close(model(tokens, fires), model.head(sums), **CLOSE)


def test_a_stage_has_a_density_of_its_own() -> None:
    model, tokens = random_model(SHALLOW), random_tokens(2, 80)
    densities = [model.analyse(tokens, depth) for depth in SHALLOW.depths]
    assert not np.allclose(densities[0], densities[1])
    assert torch.equal(densities[2], model.analyse(tokens))
    with torch.no_grad():
        hidden = model.encode(tokens, model.allocate_state(2).encoder).hidden
        inputs = model.enter(hidden, model.allocate_state(2, depth=2))[-1].inputs
        analyzer = model.later_density[0]
        features = analyzer.learned(torch.zeros(2, 80, 4), inputs)
    torch.testing.assert_close(densities[1].float(), analyzer.combine(features), **CLOSE)


def test_another_depth_holds_nothing_of_the_one_before() -> None:
    model, tokens = random_model(SHALLOW), random_tokens(2, 30)
    state = model.allocate_state(2, depth=2)
    rates = torch.full((2,), 0.5, dtype=torch.float64)
    for column in tokens.unbind(1):
        model.step(column, state, rates)
    held, level, last = state.router.held, state.density.level, state.router.last_fire
    model.set_depth(state, 2)
    assert state.router.held is held
    assert held.any()
    assert last.all()
    model.set_depth(state, 3)
    assert not state.router.held.any()
    assert not state.router.last_fire.any(), "the new stage has never run"
    assert level.any()
    assert not state.density.level.any()


def test_a_decoder_of_its_own_reads_where_its_stage_is_placed() -> None:
    model, tokens = random_model(OWN_DECODERS), random_tokens(1, 40)
    fires = random_tokens(1, 40, seed=3) % 3 == 0
    before = [model(tokens, fires, depth=depth) for depth in OWN_DECODERS.depths]
    with torch.no_grad():
        for parameter in model.later_decoders[0].parameters():
            parameter.mul_(0.5)
    after = [model(tokens, fires, depth=depth) for depth in OWN_DECODERS.depths]
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, True]


def test_decoders_begin_alike() -> None:
    model, one = AdaptiveAttentionSystem(OWN_DECODERS), AdaptiveAttentionSystem(SHALLOW)
    first, *later = [decoder.state_dict() for decoder in model.decoders()]
    assert len(later) == 2
    for decoder in later:
        torch.testing.assert_close(decoder, first, rtol=0, atol=0)
    assert len(one.decoders()) == 1
    count = [sum(weight.numel() for weight in each.parameters()) for each in (model, one, one.decoder)]
    assert count[0] == count[1] + 2 * count[2]
    assert model.cost.full_flops(7, 7) == one.cost.full_flops(7, 7)


@DECODERS
def test_a_decoder_takes_over_no_states_of_another(shape: ModelConfig) -> None:
    model, tokens = random_model(shape), random_tokens(1, 30)
    state = model.allocate_state(1, depth=2)
    model.prefill(tokens, state, 0.5)
    model.set_depth(state, 2)
    assert state.decoder[0].ssm_state.any()
    model.set_depth(state, 3)
    assert bool(state.decoder[0].ssm_state.any()) is not shape.own_decoders
    assert state.encoder[0].ssm_state.any()


def test_a_budget_buys_the_deepest_stage_that_it_can_place() -> None:
    starts = [COST.budget(1 / SHALLOW.max_tile_size, logits=1, depth=depth) for depth in (1, 2, None)]
    assert starts == sorted(starts)
    for start, depth, below in zip(starts[1:], (2, None), (1, 2), strict=True):
        assert (COST.depth(start), COST.depth(start - 1e-9)) == (depth, below)
        assert COST.rates(start - 1e-9).decode == 1.0, "all of the stages below run first"
    assert (COST.depth(0.0), COST.depth(1.0)) == (1, None)
    dear = CostModel(SHALLOW.model_copy(update={"density_hidden": 1 << 12}))
    assert dear.budget(1 / SHALLOW.max_tile_size, logits=1) > 1.0
    assert dear.rates(1.0).depth is None, "all of the budget is all of the model, whatever placing would cost"
    plain = CostModel(SHALLOW.model_copy(update={"shallow_depths": ()}))
    assert (plain.depth(0.0), plain.depth(0.5)) == (None, None)
    assert COST.floor * COST.full_flops(1, 1) == plain.floor * plain.full_flops(1, 1)
    assert COST.floor < COST.least_adaptive < starts[1] < starts[2] < 1.0
    for budget in (COST.least_adaptive, *starts[1:], 0.5, 0.6, 0.7, 0.8):
        rates = COST.rates(budget)
        for rate, logits in ((rates.prefill, 0), (rates.decode, 1)):
            if rate < 1.0:
                count = 1_000_000
                spent = COST.flops(count, round(rate * count), logits * count, count, depth=rates.depth).total
                assert spent / COST.full_flops(count, logits * count) == pytest.approx(budget, abs=1e-5)


def test_a_stage_is_placed_from_its_least_rate_on() -> None:
    cost = CostModel(SHALLOW.model_copy(update={"least_rates": (0.25, 1e-9)}))
    start = cost.budget(0.25, logits=1, depth=2)
    assert cost.depth(start) == 2
    assert cost.rates(start).decode == pytest.approx(0.25)
    assert cost.depth(start - 1e-9) == 1
    assert cost.rates(start - 1e-9).decode == 1.0
    lowest = cost.budget(1 / SHALLOW.max_tile_size, logits=1)
    assert (cost.depth(lowest), cost.depth(lowest - 1e-9)) == (None, 2), "no fewer fires than tiles can be long"
    assert cost.least_adaptive == COST.least_adaptive
    never = CostModel(SHALLOW.model_copy(update={"least_rates": (1.0, 1.0)}))
    assert [never.depth(budget) for budget in (0.9, 1.0)] == [2, None]


@pytest.mark.parametrize("width", [32, 48], ids=["equal widths", "projected"])
def test_every_stage_is_billed_what_it_runs(width: int) -> None:
    shape = SHALLOW.model_copy(update={"d_trunk": width})
    cost, projection = CostModel(shape), 2 * 32 * width * (width != 32)
    block = (cost.trunk(2) - cost.trunk(1)) - projection
    for depth, below in ((1, 0), (2, 1), (3, 2)):
        assert cost.trunk(depth) == depth * block + (depth + 1) * projection
        assert cost.below(depth) == (below * block + (below + 1) * projection if below else 0)
        assert cost.tile(depth) == cost.trunk(depth) - cost.below(depth)
        spent = cost.flops(10, 4, 0, 10, depth=depth)
        assert spent.trunk == 10 * cost.below(depth) + 4 * cost.tile(depth) + 6 * cost.propagation(depth)
        assert spent.density == 10 * cost.density(depth)
        narrow = cost.flops(10, 4, 0, 10, 4, depth=depth)
        assert spent.trunk - narrow.trunk == 5 * 12 * shape.inner(width) * (10 * below + 4)
    assert cost.density(1) == 2 * 6 * 36
    assert cost.density(2) == 2 * 6 * (width + 4)
    assert cost.propagation(2) - cost.propagation(1) == 2 * 6 * (width - 32)


def test_a_share_of_the_trunk_is_that_of_the_blocks_that_run() -> None:
    shares = [Fraction(0), Fraction(1, 6), Fraction(1, 3), Fraction(1, 2), Fraction(1)]
    assert [COST.at_share(share) for share in shares] == [(1, 0.0), (1, 0.5), (1, 1.0), (2, 0.5), (None, 1.0)]
    many = CostModel(SHALLOW.model_copy(update={"trunk_layers": 25, "shallow_depths": (7,)}))
    assert many.at_share(Fraction(7, 25)) == (7, 1.0)


def test_a_depth_that_runs_everywhere_spends_no_more() -> None:
    most = COST.budget(1.0, logits=1, depth=1)
    assert COST.rate(most + 0.01, logits=1, depth=1) == 1.0
    assert COST.rate(most - 0.01, logits=1, depth=1) < 1.0
    assert COST.flops(8, 8, 8, 0, depth=1).total == round(most * COST.full_flops(8, 8))


def test_the_density_of_a_stage_learns_what_that_stage_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    system, tokens = random_model(SHALLOW).requires_grad_(True), random_tokens(2, 65)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    fresh = [
        torch.nn.functional.cross_entropy(system(inputs, depth=depth).mT, targets, reduction="none").detach()
        for depth in SHALLOW.depths
    ]
    never = torch.zeros_like(targets, dtype=torch.bool)
    floor = torch.nn.functional.cross_entropy(system(inputs, never, depth=1).mT, targets, reduction="none").detach()
    seen = []

    def regression(_model: object, density: torch.Tensor, worth: torch.Tensor, *_rest: object) -> torch.Tensor:
        seen.append((density, worth))
        return density.sum() * 0.0

    monkeypatch.setattr("model.training.loss.density_regression", regression)
    config = TrainingConfig(exit_weight=0.0, lambda_compute=0.0, foresight=1)
    for depth, below, here in ((1, floor, fresh[0]), (2, fresh[0], fresh[1]), (None, fresh[1], fresh[2])):
        compute_loss(system, tokens, Reduced(0.5, uniform=False, d_state=None, momentum=0.1, depth=depth), config)
        density, worth = seen.pop()
        torch.testing.assert_close(worth, below - here, **CLOSE)
        torch.testing.assert_close(density.detach().double(), system.analyse(inputs, depth), **CLOSE)


def test_smaller_depths_have_their_share_of_the_loss() -> None:
    system, tokens = random_model(SHALLOW).requires_grad_(True).train(), random_tokens(2, 65)
    weights = {"full_weight": 0.3, "shallow_weight": 0.2, "floor_weight": 0.3, "lambda_info": 0.0}
    config = TrainingConfig(**weights, exit_weight=0.0, lambda_compute=0.0)
    reduced = Reduced(0.5, uniform=True, d_state=None, momentum=0.1, depth=2)
    loss = compute_loss(system, tokens, reduced, config)
    bits = loss.bits
    mixed = 0.3 * bits["full"] + 0.2 * bits["shallow"] + 0.3 * bits["floor"] + 0.2 * bits["reduced"]
    assert loss.total.item() / np.log(2.0) == pytest.approx(mixed, rel=1e-5)
    each = [
        torch.nn.functional.cross_entropy(system(tokens[:, :-1], depth=depth).flatten(0, 1), tokens[:, 1:].flatten())
        for depth in (1, 2)
    ]
    assert bits["shallow"] == pytest.approx((each[0].item() + 2 * each[1].item()) / 3 / np.log(2.0), rel=1e-5)
    ends = compute_loss(system, tokens, replace(reduced, rate=0.0, ends_only=True), config)
    mixed = (0.3 * bits["full"] + 0.2 * bits["shallow"] + 0.3 * bits["floor"]) / 0.8
    assert ends.total.item() / np.log(2.0) == pytest.approx(mixed, rel=1e-5)
    ends.total.backward()
    assert all(up.weight.grad.any() for up in system.router.shallow_up.values())


def test_the_floor_may_learn_from_full_resolution() -> None:
    system, tokens = random_model(SHALLOW).requires_grad_(True).train(), random_tokens(2, 65)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    never = torch.zeros_like(inputs, dtype=torch.bool)
    with torch.no_grad():
        full, one, two = (system(inputs, depth=depth).flatten(0, 1).softmax(-1) for depth in (None, 1, 2))
        floor = system(inputs, never, depth=1).flatten(0, 1).softmax(-1)

    def cross(mine: torch.Tensor) -> float:
        return -mine.log()[torch.arange(len(targets)), targets].mean().item()

    def mixed(mine: torch.Tensor) -> float:
        return 0.75 * cross(mine) + 0.25 * (full * (full.log() - mine.log())).sum(-1).mean().item()

    config = TrainingConfig(
        full_weight=0.3, shallow_weight=0.2, floor_weight=0.3, distillation=0.25,
        lambda_info=0.0, exit_weight=0.0, lambda_compute=0.0,
    )  # fmt: skip
    expected = 0.3 * cross(full) + 0.2 * (cross(one) + 2 * cross(two)) / 3 + 0.3 * mixed(floor)
    reduced = Reduced(0.5, uniform=True, d_state=None, momentum=0.1, depth=2)
    loss = compute_loss(system, tokens, reduced, config)
    assert loss.total.item() == pytest.approx(expected + 0.2 * loss.bits["reduced"] * np.log(2.0), rel=1e-5)

    # Not as long as there is nothing to learn from it.
    untaught = 0.3 * cross(full) + 0.2 * (cross(one) + 2 * cross(two)) / 3 + 0.3 * cross(floor)
    ends = replace(reduced, rate=0.0, ends_only=True)
    assert compute_loss(system, tokens, ends, config).total.item() == pytest.approx(untaught / 0.8, rel=1e-5)

    # The teacher is taken as it is: a floor that only follows it leaves the trunk alone.
    alone = TrainingConfig(full_weight=0.0, floor_weight=1.0, distillation=1.0, lambda_info=0.0, exit_weight=0.0)
    compute_loss(system, tokens, replace(reduced, rate=0.0), alone).total.backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in system.trunk.parameters())
    assert all(weight.grad is not None and weight.grad.any() for weight in system.decoder[0].mixer.in_proj.parameters())


def test_reduced_passes_draw_depths_as_configured() -> None:
    shape = SHALLOW.model_copy(update={"trunk_layers": 5, "shallow_depths": (1, 4)})
    drawn = [sample_reduced(TrainingConfig(shallow_share=0.4), shape, step).depth for step in range(2000)]
    assert [drawn.count(depth) / 2000 for depth in (1, 4, None)] == pytest.approx([0.1, 0.3, 0.6], abs=0.04)


def test_validation_scores_smaller_depths() -> None:
    system, tokens = random_model(SHALLOW), random_tokens(2, 65)
    scores = validate(system, tokens)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    bits = [
        torch.nn.functional.cross_entropy(system(inputs, depth=depth).flatten(0, 1), targets).item() / np.log(2.0)
        for depth in SHALLOW.depths
    ]
    assert scores["shallow"] == pytest.approx((bits[0] + 2 * bits[1]) / 3, rel=1e-5)
    assert scores["full"] == pytest.approx(bits[2], rel=1e-5)
    fires = torch.zeros_like(inputs, dtype=torch.bool)
    floor = torch.nn.functional.cross_entropy(system(inputs, fires, depth=1).flatten(0, 1), targets)
    assert scores["floor"] == pytest.approx(floor.item() / np.log(2.0), rel=1e-5)
    reduced = Reduced(0.5, uniform=False, d_state=None, momentum=0.0)
    fires = torch.from_numpy(choose_fires(system.placement(2)[1], system.analyse(inputs, 2).numpy(), reduced))
    half = torch.nn.functional.cross_entropy(system(inputs, fires, depth=2).flatten(0, 1), targets)
    assert scores["half"] == pytest.approx(half.item() / np.log(2.0), rel=1e-5)


def test_weights_that_leave_nothing_or_take_too_much_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"= 1\.1 must be at most 1"):
        TrainingConfig(full_weight=0.5, shallow_weight=0.3, floor_weight=0.3)
    with pytest.raises(ValidationError, match="must be above 0 where ends_share is"):
        TrainingConfig(full_weight=0.0, ends_share=0.5)
