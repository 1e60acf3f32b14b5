"""What a running server consists of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunewright.server.blobs import Blobs
from tunewright.server.engines import Answers, Engines
from tunewright.server.keys import Keyring
from tunewright.server.store import Store


@dataclass(frozen=True)
class Settings:
    """What `tunewright serve` was told."""

    data: Path
    """Everything that is kept on disk: the database (unless it is elsewhere), files, runs."""
    database: str | None = None
    files: str | None = None
    overrides: tuple[str, ...] = ()
    """`key=value`, as after `--set`: how every job trains, whatever its base says."""
    engines: int = 2
    """Processes with weights at once."""
    engine_idle_s: float = 900.0
    """How long one stays that nobody asks."""

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.data / 'tunewright.db'}"

    @property
    def files_url(self) -> str:
        return self.files or str(self.data / "files")

    @property
    def runs(self) -> Path:
        return self.data / "runs"

    def prepared(self) -> Settings:
        """With the data folder made."""
        self.data.mkdir(parents=True, exist_ok=True)
        return self


@dataclass
class Server:
    """The parts of a running server."""

    settings: Settings
    store: Store
    blobs: Blobs
    keyring: Keyring
    engines: Answers
    routes: dict[str, Any] = field(default_factory=dict)
    """What answers under a name (see `admission`)."""

    @classmethod
    def open(cls, settings: Settings) -> Server:
        """Raises:
        EndpointError: the database or the file store cannot be had.
        """
        store = Store(settings.prepared().database_url)
        engines = Engines(settings.data / "engines", most=settings.engines, idle_s=settings.engine_idle_s)
        return cls(settings, store, Blobs(settings.files_url, settings.data / "cache"), Keyring(store), engines)

    def close(self) -> None:
        self.store.close()
