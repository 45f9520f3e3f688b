"""Settings of the server: environment variables with the prefix ``RHEOSTAT_``, overridden by command-line options."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from model.checkpoint import EMBEDDED_CHECKPOINT


class Settings(BaseSettings):
    """Everything that can be set from outside. Frozen; an unknown or bad value is an error that names it."""

    model_config = SettingsConfigDict(env_prefix="RHEOSTAT_", frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    checkpoint: Path = EMBEDDED_CHECKPOINT
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of the model; None leaves the choice to torch."""
    max_running: int = Field(default=16, ge=1, le=4096)
    """Sequences that hold a state at the same time."""
    max_waiting: int = Field(default=128, ge=0, le=1 << 20)
    """Requests that may queue for one; more are refused with 429."""
    max_prompt_bytes: int = Field(default=1 << 17, ge=1, le=1 << 26)
    max_tokens: int = Field(default=1 << 14, ge=1, le=1 << 24)
    """The most that one request may ask for."""
    max_body_bytes: int = Field(default=1 << 20, ge=1 << 10, le=1 << 28)
    default_budget: float = Field(default=1.0, gt=0, le=1)
    """For requests that state none."""
    stall_seconds: float = Field(default=60.0, gt=0)
    """An engine step that takes longer makes the server unhealthy."""
    shutdown_seconds: int = Field(default=30, ge=0, le=3600)
    """How long running requests may take to finish once the server was told to stop."""
