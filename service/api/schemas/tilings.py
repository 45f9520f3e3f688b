"""``POST /v1/tilings``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from service.api.schemas.fields import ApiModel, Request, Text
from service.engine.sequence import ComputeUsage

MOST_BUDGETS = 8
LONGEST_TEXT = 1 << 14

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class TilingsRequest(Request):
    """Body of `POST /v1/tilings`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"text": "The parser reads a file line by line.", "budgets": [1.0, 0.5, 0.4]}]}
    )

    text: Text
    """At most 16,384 tokens: bytes of UTF-8, unless the model is a converted one."""
    budgets: list[Share] = Field(default=[1.0, 0.5, 0.4], min_length=1, max_length=MOST_BUDGETS)
    """Up to 8 shares of full compute."""
    rule: Literal["plan", "online"] = "plan"
    """`plan`: as a prompt of this text is read. `online`: as generating and scoring fire, strictly causally."""
    model: str | None = None
    """The served model; another name is a 404."""


class TileModel(ApiModel):
    """A run of positions that the trunk reads as one step."""

    start: int
    """Index of its first token."""
    end: int
    """Not included."""
    info_loss: float
    """Bits lost at the positions before its last, where the trunk is stale."""
    compute_cost: int
    """FLOPs of the trunk: its step, which a last tile that is still open lacks, what its states read between, and the
    stages that run at every position."""


class TilingModel(ApiModel):
    """The tiles of a text at one budget, and what reading it costs."""

    budget: float
    """As it was asked for."""
    granted: float
    """The budget; the floor where it does not pay for adaptive firing, a stage at every position where not for placing
    the next."""
    reason: str
    """`requested`, `floor` or `depth`."""
    depth: int | None
    """Blocks of the trunk after which the stage ends that is placed, those below it at every position; null for all."""
    tiles: list[TileModel]
    """In order, covering the text; empty where nothing fires."""
    info_loss: float
    """Bits lost to a stale trunk, over the whole text, as the density predicts: of the stage that is placed alone."""
    spent: float
    """`spent_flops / full_flops`."""
    spent_flops: int
    """Operations of reading the text: with `online`, of the head at every position too."""
    full_flops: int
    """Of the same at full resolution."""
    mean_tile_bytes: float | None
    """Null where the trunk never runs."""


class Features(ApiModel):
    """What the density is made of, one value per position; null what the served model's does not measure."""

    state_gradient: list[float] | None = None
    """How far the encoder's state moved."""
    attention_entropy: list[float] | None = None
    """How spread the hidden attention is, 0 to 1."""
    temporal_distance: list[float] | None = None
    """How far back it looks, in bytes."""
    predictive_entropy: list[float] | None = None
    """Entropy of the early exit, in bits."""
    learned: list[float]
    """What a small network makes of the encoder's output and the others, added as it is; 0 without one."""


class TilingsUsage(ApiModel):
    """What the analysis itself cost."""

    prompt_tokens: int
    """Tokens read."""
    compute: ComputeUsage
    """What the analysis cost; it has no resolution to save at."""


class Tilings(ApiModel):
    """Answer of `POST /v1/tilings`. Position i is `tokens[i]`; where tokens are bytes, position 0 is the document
    separator and position i the i-th byte of the text.
    """

    object: Literal["tilings"] = "tilings"
    """Always `tilings`."""
    model: str
    """The served model."""
    rule: Literal["plan", "online"]
    """As it was asked for."""
    tokens: list[int]
    """Of the text, one put in front included."""
    density: list[float]
    """Bits that a position would lose if the trunk's first stage were stale there."""
    features: Features
    """What the density is made of."""
    tilings: list[TilingModel]
    """In the order of the budgets."""
    usage: TilingsUsage
    """What the analysis used."""
