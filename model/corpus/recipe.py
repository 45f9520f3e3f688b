"""What a corpus is made of: domains with their filters, groups of sources, pinned packages."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from model.config import StrictModel
from model.corpus.errors import BuildError

DEFAULT_RECIPE = Path(__file__).with_name("recipe.toml")

Kind = Literal["pypi", "debian"]


class Domain(StrictModel):
    """One kind of text, and what is dropped from it. Sizes and shares are of a document's bytes where not said."""

    splits: bool = True
    """Whether documents are split into train, valid and test; otherwise all are test."""
    repeats: Literal["documents", "paragraphs", "lines"] = "documents"
    """What is dropped because it was seen before, beside equal documents: repeated paragraphs, or documents most of
    whose lines were seen."""
    min_bytes: int = Field(default=200, ge=1)
    max_bytes: int = Field(default=600_000, ge=1)
    max_line: int = Field(default=1500, ge=1)
    """Longest line, in bytes."""
    max_non_ascii: float = Field(default=0.03, ge=0, le=1)
    """Greatest share of a document's characters."""
    max_digits: float = Field(default=0.15, ge=0, le=1)
    min_letters: float = Field(default=0.5, ge=0, le=1)
    """Least share of ASCII letters and white space."""
    max_seen: float = Field(default=0.4, ge=0, le=1)
    """Share of a document's bytes, in long lines seen before, above which it is dropped (``repeats = "lines"``)."""
    max_source_bytes: int = Field(default=14_000_000, ge=1)
    """What one source may contribute; which documents stay is decided by a hash of their path."""
    part_bytes: int | None = Field(default=None, ge=1024)
    """Cut longer documents into parts of about this size, at an empty line or else at the end of a line."""
    drop_generated: bool = True
    """Drop documents whose head says that a program wrote them."""


class Pin(StrictModel):
    """One package at one version."""

    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:+~-]*$")
    licence: str = Field(min_length=1)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Of the archive; None accepts any."""
    include: tuple[str, ...] = ()
    """Shell patterns of paths, instead of the group's; ``*`` also matches a slash."""


class Group(StrictModel):
    """Packages that are fetched and read alike."""

    domain: str
    kind: Kind
    extract: Literal["text", "html", "r-strings"] = "text"
    include: tuple[str, ...]
    """Shell patterns of paths that are read, matched against ``/path``; ``*`` also matches a slash."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of paths that are not."""
    unseen_projects: bool = False
    """Whether whole packages, chosen by a hash of their name, are set apart as ``<domain>.unseen_projects``."""
    sources: dict[str, Pin] = Field(min_length=1)


class Recipe(StrictModel):
    """A whole recipe; the order of groups and sources is the order of the documents."""

    domain: dict[str, Domain]
    group: dict[str, Group]

    @model_validator(mode="after")
    def _known_domains(self) -> Self:
        for name, group in self.group.items():
            if group.domain not in self.domain:
                raise ValueError(f"group {name} is of domain {group.domain!r}, known are {sorted(self.domain)}")
        for name in self.domain:
            if not name.replace("-", "").isalnum():
                raise ValueError(f"domain {name!r} must be letters, digits and hyphens: it names files")
        return self

    def sources(self, domains: list[str] | None = None) -> list[Source]:
        """The sources of some domains (None: of all), in order.

        Raises:
            BuildError: a domain is not in the recipe.
        """
        unknown = sorted(set(domains or ()) - set(self.domain))
        if unknown:
            raise BuildError(f"the recipe has no domain {', '.join(unknown)}, it has {', '.join(self.domain)}")
        return [
            Source(name, key, group, pin)
            for key, group in self.group.items()
            if domains is None or group.domain in domains
            for name, pin in group.sources.items()
        ]


@dataclass(frozen=True, slots=True)
class Source:
    """A package, and how its group reads it."""

    name: str
    group_name: str
    group: Group
    pin: Pin

    @property
    def path(self) -> str:
        """Under which the source's documents are known: ``group/package``, a wheel's as its file name spells it."""
        return f"{self.group_name}/{self.name.replace('-', '_') if self.group.kind == 'pypi' else self.name}"

    def wants(self, path: str) -> bool:
        """Whether a file of the package is of the kind that is read."""
        return _matches(path, self.pin.include or self.group.include)

    def excludes(self, path: str) -> bool:
        """Whether such a file is left out all the same."""
        return _matches(path, self.group.exclude)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(f"/{path}", pattern) for pattern in patterns)


def load_recipe(path: Path = DEFAULT_RECIPE) -> Recipe:
    """Read a recipe.

    Raises:
        BuildError: it is not TOML, or not a recipe; says where.
        FileNotFoundError: there is none.
    """
    try:
        # Strict validation takes arrays as tuples from JSON only.
        return Recipe.model_validate_json(json.dumps(tomllib.loads(path.read_text(encoding="utf-8"))))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BuildError(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BuildError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
