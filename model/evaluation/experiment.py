"""One evaluation: every arm at every point of the dial, and plain models, over the documents of a domain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from model.cost import Rates
from model.evaluation.arms import ADAPTIVE, ONLY, WITHOUT, Arm, Text, analysed
from model.evaluation.journal import Journal
from model.evaluation.passages import Cutter, Passage, Protocol, read_features
from model.evaluation.points import Point, match_rates
from model.evaluation.scoring import ENDS, PLAIN, DocumentScores, Key, Tally, full_flops, score
from model.lm import AdaptiveAttentionSystem
from model.ops.tiling import Bytes, Floats
from model.tokenizer import Tokenizer

Texts = Mapping[int | None, Text]
"""One passage, with the features of each depth."""


@dataclass(frozen=True, slots=True)
class Domain:
    """Documents of one kind."""

    name: str
    documents: list[bytes]


@dataclass(frozen=True, slots=True)
class Experiment:
    """What is compared: arms of one model at points of its dial, and plain models at full resolution."""

    model: AdaptiveAttentionSystem
    tokenizer: Tokenizer
    protocol: Protocol
    placing: Mapping[int | None, Sequence[Arm]]
    """By depth of the trunk the arms that place it, the same everywhere, the shipped rule first."""
    points: Sequence[Point]
    feature_points: frozenset[str]
    """Labels of the points at which arms of single features run."""
    plain: dict[str, AdaptiveAttentionSystem] = field(default_factory=dict)

    @property
    def arms(self) -> Sequence[Arm]:
        """Those of one depth."""
        return next(iter(self.placing.values()))

    def runs(self, arm: Arm, point: Point) -> bool:
        """Whether the arm is scored at the point."""
        return arm.name not in (*ONLY, *WITHOUT) or point.end is not None or point.label in self.feature_points

    @staticmethod
    def key(arm: Arm, point: Point) -> Key:
        """Where a document keeps the tally of an arm at a point."""
        return (arm.name, point.label) if point.end is None else (ENDS, str(point.end))

    def run(self, domain: Domain, journal: Journal) -> list[DocumentScores]:
        """Score the documents of a domain, those that are too short for the protocol left out.

        Raises:
            ValueError: all are.
        """
        cutter = Cutter(self.protocol, self.tokenizer, self.model.config.block_size, self.model.device)
        cut = [passages for document in domain.documents if (passages := cutter.cut(document))]
        if not cut:
            raise ValueError(f"no document of {domain.name!r} is long enough for protocol {self.protocol}")
        texts = [self._read(passages) for passages in tqdm(cut, desc=f"{domain.name}: density", unit="doc")]
        cells = self._cells([text for document in texts for text in document])
        total = sum(passage.bytes for passages in cut for passage in passages) * (len(cells) + len(self.plain))
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"{domain.name}: {len(cells)} arms") as bar:
            scores = []
            for number, document in enumerate(texts):
                known = journal.find(domain.name, number)
                if known is None:
                    known = self._score(document, cells, bar.update)
                    journal.add(domain.name, number, known)
                else:
                    bar.update(known.bytes * (len(cells) + len(self.plain)))
                scores.append(known)
        return scores

    def _read(self, passages: Iterable[Passage]) -> list[Texts]:
        return [
            {depth: Text(passage, read_features(self.model, passage.inputs, depth)[0]) for depth in self.placing}
            for passage in passages
        ]

    def _cells(self, texts: Sequence[Texts]) -> dict[Key, tuple[Arm, Rates]]:
        """What is scored: each arm at each point at the rates at which it spends what the shipped rule spends."""
        cells: dict[Key, tuple[Arm, Rates]] = {}
        for depth, arms in self.placing.items():
            points = [point for point in self.points if point.rates.depth == depth]
            cells |= self._cells_at(arms, points, [one[depth] for one in texts])
        # In the order of arms and points, whatever their depths.
        keys = [self.key(arm, point) for arm in self.arms for point in self.points]
        return {key: cells[key] for key in dict.fromkeys(keys) if key in cells}

    def _cells_at(
        self, arms: Sequence[Arm], points: Sequence[Point], texts: Sequence[Text]
    ) -> dict[Key, tuple[Arm, Rates]]:
        """Those of the points of one depth."""
        reference = arms[0]
        assert reference.name == ADAPTIVE, "the shipped rule is what others are matched with"
        cells = {self.key(reference, point): (reference, point.rates) for point in points}
        between = [point for point in points if point.end is None]
        signals = [reference.signal(text) for text in texts]
        fires = {point.label: _fires(reference, texts, signals, point.rates) for point in between}
        for arm in arms[1:]:
            signals = [arm.signal(text) for text in texts]
            for point in between:
                if self.runs(arm, point):
                    rates = match_rates(arm, reference, self.model.cost, texts, signals, point, fires[point.label])
                    cells[self.key(arm, point)] = (arm, rates)
        return cells

    def _score(
        self, texts: Sequence[Texts], cells: dict[Key, tuple[Arm, Rates]], progress: Callable[[int], object]
    ) -> DocumentScores:
        scores = DocumentScores(tallies={key: Tally() for key in cells})
        for text in texts:
            passage = next(iter(text.values())).passage
            scores.bytes += passage.bytes
            scores.positions += len(passage)
            scores.full_flops += full_flops(self.model.cost, passage)
            placements = _place(text, cells)
            depths = [rates.depth for _, rates in cells.values()]
            bits = score(self.model, passage, placements, depths, lambda done: progress(done * len(cells)))
            for (key, (arm, rates)), fires, needed in zip(cells.items(), placements, bits, strict=True):
                paid = analysed(arm, rates)
                scores.tallies[key].add(self.model.cost, passage, fires, float(needed), rates.depth, analysed=paid)
            for name, plain in self.plain.items():
                everywhere = np.ones(len(passage), np.uint8)
                needed = score(plain, passage, [everywhere], [None], progress)[0]
                tally = scores.tallies.setdefault((PLAIN, name), Tally())
                tally.add(plain.cost, passage, everywhere, float(needed), analysed=False)
        return scores


def _place(texts: Texts, cells: dict[Key, tuple[Arm, Rates]]) -> list[Bytes]:
    """Where the trunk fires in a passage, for each cell."""
    signals: dict[tuple[str, int | None], Floats] = {}
    placements = []
    for key, (arm, rates) in cells.items():
        text, wanted = texts[rates.depth], (arm.name, rates.depth)
        if key[0] == ENDS:
            placements.append(np.full(len(text.passage), int(key[1]), np.uint8))
            continue
        if wanted not in signals:
            signals[wanted] = arm.signal(text)
        placements.append(arm.place(text.passage, signals[wanted], rates))
    return placements


def _fires(arm: Arm, texts: Sequence[Text], signals: Sequence[Floats], rates: Rates) -> int:
    return sum(int(arm.place(text.passage, signal, rates).sum()) for text, signal in zip(texts, signals, strict=True))
