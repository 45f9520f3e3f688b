from __future__ import annotations

import math

import pytest
import torch

from model.evaluation.arms import ADAPTIVE, make_arms
from model.evaluation.passages import CONTINUATION, PROMPT, Cutter, Protocol
from model.evaluation.scoring import Tally, full_flops, score
from model.tokenizer import ByteTokenizer
from tests.model.evaluation.texts import document, read
from tests.model.shapes import random_model

WINDOW = PROMPT + CONTINUATION - 1


def test_prompts_and_continuations_do_not_overlap_and_every_window_begins_anew() -> None:
    content = document(3 * WINDOW + 100, 1)
    cutter = Cutter(Protocol.SERVING, ByteTokenizer(), 512, torch.device("cpu"))
    assert cutter.cut(content[: WINDOW - 1]) == []
    passages = cutter.cut(content)
    assert [passage.order for passage in passages] == [0, 1, 2]
    for number, passage in enumerate(passages):
        text = content[number * WINDOW : (number + 1) * WINDOW]
        assert passage.inputs[0].tolist() == [ByteTokenizer().start, *text[:-1]]
        assert bytes(passage.targets.tolist()) == text
        assert (passage.planned, passage.planned % 512) == (PROMPT, 0)
        assert (passage.logits, passage.bytes) == (CONTINUATION, CONTINUATION)


@pytest.mark.parametrize(("protocol", "planned"), [(Protocol.STRICT, 0), (Protocol.ORACLE, 900)])
def test_every_byte_of_a_document_is_scored(protocol: Protocol, planned: int) -> None:
    (passage,) = Cutter(protocol, ByteTokenizer(), 512, torch.device("cpu")).cut(document(900, 2))
    assert (passage.planned, passage.scored, passage.bytes, len(passage)) == (planned, 0, 900, 900)


def test_whitespace_is_known_where_it_was_read() -> None:
    (passage,) = Cutter(Protocol.STRICT, ByteTokenizer(), 512, torch.device("cpu")).cut(b"a b\nc")
    assert passage.spaces.tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("budget", [1.0, 0.75, 0.6, 0.0])
def test_a_prompt_and_its_continuation_are_those_of_serving(budget: float) -> None:
    model = random_model()
    rates = model.cost.rates(budget or model.cost.floor)
    (text,) = read(model, Protocol.SERVING, [document(WINDOW, 3)])
    passage, arm = text.passage, make_arms(model, [ADAPTIVE], Protocol.SERVING, None)[0]
    fires = arm.place(passage, arm.signal(text), rates)
    tally = Tally()
    analysed = model.cost.analysed(rates.decode)
    tally.add(model.cost, passage, fires, float(score(model, passage, [fires], [rates.depth])[0]), analysed=analysed)

    state, block = model.allocate_state(1), model.config.block_size
    prompt, rest = passage.inputs[:, :PROMPT], passage.inputs[0, PROMPT:]
    reads = [model.prefill(piece, state, rates.prefill, predict=True) for piece in prompt.split(block, 1)]
    logits, decode = [reads[-1].logits], torch.tensor([rates.decode], dtype=torch.float64)
    logits += [model.step(token.view(1), state, decode).logits[0] for token in rest]
    losses = torch.nn.functional.cross_entropy(torch.stack(logits), passage.targets[PROMPT - 1 :], reduction="sum")
    assert tally.bits == pytest.approx(losses.item() / math.log(2.0), rel=1e-4)
    assert tally.fires == int(state.router.fires)
    planned = [number * block + end for number, piece in enumerate(reads) for end in piece.tile_ends]
    assert fires[:PROMPT].nonzero()[0].tolist() == planned
    cost, length, logits_scored = model.cost, len(passage), CONTINUATION
    assert tally.spent_flops == cost.flops(length, tally.fires, logits_scored, length * analysed).total
    assert full_flops(cost, passage) == cost.full_flops(length, logits_scored)
