"""Results that an earlier evaluation wrote: shown again, or lending the scores of its plain models to a new one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.evaluation.passages import Protocol
from model.evaluation.references import XZ
from model.evaluation.scoring import PLAIN, DocumentScores, Tally


def read_results(path: Path) -> dict[str, Any]:
    """What ``rheostat evaluate --json`` wrote.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read results from {path}: {error}") from error
    if not isinstance(results, dict) or "domains" not in results:
        raise ValueError(f"{path} holds no results of rheostat evaluate")
    return results


class EarlierPlain:
    """Scores of plain models, document by document, that an earlier evaluation kept.

    Raises:
        ValueError: the results cannot be read, are of another protocol, or hold no plain model.
    """

    def __init__(self, path: Path, protocol: Protocol) -> None:
        self._path = path
        results = read_results(path)
        if results["protocol"] != str(protocol):
            raise ValueError(f"{path} is of protocol {results['protocol']}, not {protocol}")
        self._domains: dict[str, Any] = results["domains"]
        if not any(self._scores(name) for name in self._domains):
            raise ValueError(f"{path} holds no scores of plain models")

    def check(self, domain: str, references: Mapping[str, float | None]) -> None:
        """See to it that a domain holds the documents that were scored then, as far as their compressed size tells.

        Raises:
            ValueError: it does not.
        """
        known = self._domains.get(domain)
        if known is None:
            raise ValueError(f"{self._path} has no domain {domain!r}, only {', '.join(self._domains)}")
        if known["references"].get(XZ) != references.get(XZ):
            raise ValueError(f"the documents of {domain!r} are not those that {self._path} holds scores of")

    def lend(self, domain: str, scores: Sequence[DocumentScores]) -> None:
        """Add the plain models' tallies to those of the same documents.

        Raises:
            ValueError: the documents differ, or a plain model of the same name was scored now.
        """
        if self._domains[domain]["per_document"]["bytes"] != [document.bytes for document in scores]:
            raise ValueError(f"the documents of {domain!r} are not those that {self._path} holds scores of")
        for name, columns in self._scores(domain).items():
            key = (PLAIN, name)
            if key in scores[0].tallies:
                raise ValueError(f"the plain model {name!r} was scored, and stands in {self._path} too")
            for number, document in enumerate(scores):
                document.tallies[key] = Tally(**{field: values[number] for field, values in columns.items()})

    def _scores(self, domain: str) -> dict[str, dict[str, list[Any]]]:
        """Columns of tallies by the plain model's name."""
        found = {}
        for key, columns in self._domains[domain]["per_document"]["scores"].items():
            kind, _, name = key.partition("/")
            if kind == PLAIN:
                found[name] = columns
        return found
