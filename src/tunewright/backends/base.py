"""The contract between a run's life and the place where its stages happen.

A backend is asked for a stage, never told how. "Do `train` for this run" fits a local process, a Spark job, a
Databricks job and a hosted fine-tuning API equally well. Backends register by the entry point group
`tunewright.backends`; the built-in ones too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Protocol, runtime_checkable

from tunewright.data.prepare import Assembled
from tunewright.errors import RecipeError
from tunewright.models import ModelRef
from tunewright.recipe import Recipe
from tunewright.run import Run

STAGES = ("prepare", "train", "evaluate", "package")
"""The stages that a backend is asked for."""


Removal = Literal["gone", "going", "kept"]
ABSENT = "absent"
"""The `state` of a resource that is recorded and is not there any more."""


@dataclass(frozen=True)
class Problem:
    """Something that would fail, or would not be as asked, at this backend."""

    message: str
    severity: Literal["error", "warning"] = "error"


@dataclass(frozen=True)
class Job:
    """A stage that was handed over."""

    stage: str
    id: str


@dataclass(frozen=True)
class Status:
    """How a job stands. `lost`: the backend no longer knows of it; hand it over again."""

    state: Literal["running", "done", "failed", "cancelled", "lost"]
    kind: str = ""
    """For failed: the error's class name in `errors`."""
    message: str = ""
    """For failed: one line for a person."""


@dataclass(frozen=True)
class Resource:
    """Something that stands somewhere because of a run."""

    kind: str
    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    entry: str | None = None
    """Its entry in the run's ledger; None for what was found there but is not recorded."""


class Backend(Protocol):
    """A place where stages happen."""

    def check(self, recipe: Recipe, stages: tuple[str, ...]) -> list[Problem]:
        """Everything that would fail here, found without spending. Unsupported is an error, never ignored."""
        ...

    def submit(self, stage: str, run: Run) -> Job:
        """Hand a stage over and return at once. Asking twice gives the same job while it runs."""
        ...

    def poll(self, job: Job, run: Run) -> Status:
        """How a job stands; never waits. A forgotten job is `lost`."""
        ...

    def collect(self, job: Job, run: Run) -> None:
        """Bring a done job's files into the run folder. Safe to repeat."""
        ...

    def cancel(self, job: Job, run: Run) -> None:
        """Stop a job; returns when it has stopped. Stopping what is not running is fine."""
        ...

    def find(self, run: Run) -> list[Resource]:
        """Everything that stands because of this run, recorded or not; what is recorded and no longer there has the
        state `ABSENT` among its facts."""
        ...

    def remove(self, resource: Resource, run: Run) -> Removal:
        """Remove a resource. Absent is gone; `going` means ask again; `kept`: it holds what is not this run's."""
        ...


@dataclass(frozen=True)
class Bill:
    """What a run makes at a backend and what it costs in all, in US dollars; None where that is not known before."""

    makes: tuple[str, ...]
    low: float | None
    high: float | None
    note: str

    @property
    def asks(self) -> bool:
        """Whether a person is to be asked first."""
        return self.high is None or self.high > 0


@runtime_checkable
class Bills(Protocol):
    """The extra of backends that know what a run will make and cost."""

    def bill(self, recipe: Recipe, plan: dict[str, Any]) -> Bill:
        """From what the plan holds so far (tokens, steps); nothing is made and nothing is spent."""
        ...


@runtime_checkable
class Hosts(Protocol):
    """The extra of backends whose weights are behind an API: nothing of the base is here but its name."""

    def base(self, recipe: Recipe) -> ModelRef:
        """The base, as far as it is known.

        Raises:
            RecipeError: nobody knows what it counts tokens by.
        """
        ...

    def check_rows(self, recipe: Recipe, data: Assembled) -> list[Problem]:
        """What the API would refuse in rows that are ready."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """The extra of backends that keep what a stage made elsewhere too."""

    def forget(self, stage: str, run: Run) -> None:
        """Remove there what a stage and those after it left, so that they begin afresh. Absent is fine."""
        ...


@runtime_checkable
class Serves(Protocol):
    """The extra of backends that can put a packaged model behind an endpoint."""

    def deploy(self, run: Run) -> dict[str, Any]:
        """Serve the run's packaged model and return once it answers. Asking twice gives the same endpoint.

        Returns:
            base_url, model, and what else a client should know (never a key).

        Raises:
            EndpointError: the port is in use, or the rendering differs from training.
        """
        ...

    def serving(self, run: Run) -> bool:
        """Whether this run's endpoint answers right now."""
        ...

    def undeploy(self, run: Run) -> None:
        """Stop serving. Stopping what is not there is fine."""
        ...


@runtime_checkable
class Elsewhere(Protocol):
    """The extra of backends whose stages compute on other machines, with Spark at hand: they read its tables too."""

    def device(self, recipe: Recipe) -> str | None:
        """cpu or cuda: what is trained on there; None where it is this machine."""
        ...


@runtime_checkable
class Tracks(Protocol):
    """The extra of backends that have an MLflow of their own."""

    def tracking(self, recipe: Recipe) -> tuple[str, str]:
        """Its URI and the experiment's name there, unless the recipe names a URI."""
        ...


@runtime_checkable
class Answers(Protocol):
    """The extra of backends whose endpoints do not speak the OpenAI API."""

    def answer(self, run: Run, messages: list[dict[str, str]], room: int | None) -> tuple[str, int]:
        """The endpoint's answer to a conversation, of `room` tokens at most, and how many tokens it has (0: unknown).

        Raises:
            TunewrightError: it does not answer.
        """
        ...


@runtime_checkable
class Renders(Protocol):
    """The extra of backends whose endpoints say what ids they give the model."""

    def rendered(self, run: Run, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        """The ids of a chat request, as the endpoint's own process makes them.

        Raises:
            DataError: the endpoint takes no such conversation.
            StageError: it does not answer.
        """
        ...


def hosts(kind: str) -> bool:
    """Whether the weights of a kind of backend are behind an API, told without its settings."""
    return any(point.name == kind and hasattr(point.load(), "base") for point in _points())


def backend(recipe: Recipe) -> Backend:
    """The backend that a recipe names, with its settings checked.

    Raises:
        RecipeError: there is none of that name, or its table holds something it does not know.
    """
    kinds = {point.name: point for point in _points()}
    kind = recipe.backend.kind
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(kinds))}"
        raise RecipeError(f"backend.kind: no backend {kind!r}; {hint}")
    settings = {key: value for key, value in recipe.backend.model_dump().items() if key != "kind"}
    made: Backend = kinds[kind].load()(settings)
    return made


def _points() -> Iterable[EntryPoint]:
    return entry_points(group="tunewright.backends")
