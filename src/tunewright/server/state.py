"""What a running server consists of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunewright.server import filter as filters
from tunewright.server.blobs import Blobs
from tunewright.server.engines import Answers, Engines
from tunewright.server.fresh import Fresh
from tunewright.server.keys import Keyring
from tunewright.server.metrics import Metrics
from tunewright.server.quota import Quotas
from tunewright.server.store import Store
from tunewright.server.usage import Usage


@dataclass(frozen=True)
class Settings:
    """What `tunewright serve` was told."""

    data: Path
    """Everything that is kept on disk: the database (unless it is elsewhere), files, runs."""
    database: str | None = None
    files: str | None = None
    handover_s: float = 30.0
    """A worker that has been silent for so long loses its job to the next."""
    overrides: tuple[str, ...] = ()
    """`key=value`, as after `--set`: how every job trains, whatever its base says."""
    filter: str = "words"
    """The content filter's classifier: words, the URL of a /moderations, or `package.module:name`."""
    log_format: Literal["text", "json"] = "text"
    python_graders: bool = False
    """Whether a reinforcement job may bring a grader that is Python. It runs as the worker does."""
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
    classifier: filters.Classifier
    metrics: Metrics
    usage: Usage
    quotas: Quotas = field(default_factory=Quotas)
    routes: Fresh[Any] = field(default_factory=Fresh)
    """What answers under a name (see `admission`)."""

    @classmethod
    def open(cls, settings: Settings) -> Server:
        """Raises:
        EndpointError: the database, the file store or the content filter cannot be had.
        """
        judge = filters.classifier(settings.filter)
        store = Store(settings.prepared().database_url)
        blobs = Blobs(settings.files_url, settings.data / "cache")
        engines = Engines(settings.data / "engines", most=settings.engines, idle_s=settings.engine_idle_s)
        metrics = Metrics(store)
        metrics.engines.set_function(lambda: len(engines.running()))
        return cls(settings, store, blobs, Keyring(store), engines, judge, metrics, Usage(store))

    def close(self) -> None:
        self.store.close()
