"""What a long evaluation has scored so far, one JSON line a document, so that it can be stopped and gone on with."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

from model.evaluation.scoring import DocumentScores, Tally


class Journal:
    """Scores by domain and document, in memory and, with a path, in a file that is read again.

    A file of an evaluation with another ``identity`` is begun anew; a last line that was cut off is dropped.
    """

    def __init__(self, path: Path | None = None, identity: str = "") -> None:
        self._path = path
        self._known: dict[tuple[str, int], DocumentScores] = {}
        if path is None:
            return
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        head = json.dumps({"identity": identity})
        if lines[:1] == [head]:
            for line in lines[1:]:
                record = json.loads(line)
                self._known[record["domain"], record["document"]] = _parse(record)
        whole = "".join(f"{line}\n" for line in (lines if lines[:1] == [head] else [head]))
        path.write_text(whole)

    def find(self, domain: str, document: int) -> DocumentScores | None:
        """The scores of a document, if it was scored before."""
        return self._known.get((domain, document))

    def add(self, domain: str, document: int, scores: DocumentScores) -> None:
        """Keep the scores of a document."""
        self._known[domain, document] = scores
        if self._path is not None:
            record = {
                "domain": domain,
                "document": document,
                "bytes": scores.bytes,
                "positions": scores.positions,
                "full_flops": scores.full_flops,
                "tallies": [[*key, *astuple(tally)] for key, tally in scores.tallies.items()],
            }
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """The evaluation is finished and reported: forget the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _parse(record: dict[str, Any]) -> DocumentScores:
    tallies = {(first, second): Tally(*numbers) for first, second, *numbers in record["tallies"]}
    return DocumentScores(record["bytes"], record["positions"], record["full_flops"], tallies)
