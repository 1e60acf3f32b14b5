"""OpenAI and Azure OpenAI (and servers that speak like them): rows are prepared here, an API trains, and chat
completions answer. Each stage is a child process of this machine, so killing the command costs nothing: the job goes
on over there, and the same command finds it.
"""

from __future__ import annotations

import contextlib
import datetime
from typing import Any

from tunewright import hosted_tokens, prices
from tunewright.backends.base import ABSENT, Bill, Job, Problem, Removal, Resource, Status
from tunewright.backends.local import LocalBackend
from tunewright.data.prepare import Assembled
from tunewright.errors import RecipeError, UserError
from tunewright.hosted import calls
from tunewright.hosted.asking import complete
from tunewright.hosted.azure import AzurePlace
from tunewright.hosted.places import JOB, OpenAIPlace, Place
from tunewright.hosted.rows import MIN_ROWS
from tunewright.hosted.settings import AzureSettings, OpenAISettings
from tunewright.models import ModelRef
from tunewright.recipe import METRICS, Recipe, backend_settings
from tunewright.run import Run

HONOURED = {"epochs", "batch_size", "seed", "max_length", "dpo"}
"""Keys of `train` that the API takes, or that are about the rows."""
INSTEAD = {
    "learning_rate": "set backend.learning_rate_multiplier",
    "method": "the API chooses how it trains",
    "lora": "the API chooses how it trains",
    "max_steps": "set train.epochs",
    "grpo": "the API has settings of its own",
}
MEASURED = {"classification": METRICS["classification"], "chat": ("rouge_l", "exact_match"), "reward": ("reward",)}
"""Metrics that can be had from chat completions."""
EPOCHS = 50
OURS = ("hosted-", "azure-")
"""What the kinds of things begin with that stand at the API."""
NOTICE = datetime.timedelta(days=90)
"""How long before a base's end it is said."""


class HostedBackend:
    """What OpenAI's and Azure's have in common; `place` is the API."""

    kind = ""
    place: Place

    def __init__(self) -> None:
        self.here = LocalBackend({})

    # --- before anything is made ---

    def check(self, recipe: Recipe, stages: tuple[str, ...]) -> list[Problem]:
        problems = self._unsupported(recipe, stages)
        if "train" not in stages or any(one.severity == "error" for one in problems):
            return problems
        try:
            return problems + self._look(recipe)
        except UserError as error:
            return [*problems, Problem(str(error))]

    def base(self, recipe: Recipe) -> ModelRef:
        """The base, described by its name: what it counts tokens by, and how long a row may be."""
        asked = self.place.settings
        source = asked.tokenizer or hosted_tokens.encoding_for(recipe.model)
        if source is None:
            raise RecipeError(
                f"backend.tokenizer: nobody here knows what {recipe.model} counts tokens by; name an encoding "
                "(o200k_base), a hub name, a folder or starter"
            )
        return ModelRef(recipe.model, source, "hosted", None, f"behind {self.kind}", asked.max_example_tokens, 0, 0)

    def check_rows(self, recipe: Recipe, data: Assembled) -> list[Problem]:
        """What the API would refuse in the rows."""
        found = []
        for split in ("train", "validation"):
            used = data.splits.get(split, {}).get("used", MIN_ROWS)
            if used < MIN_ROWS:
                found.append(Problem(f"data.{split}: {used} rows are left, and the API takes {MIN_ROWS} or more"))
        return found

    def bill(self, recipe: Recipe, plan: dict[str, Any]) -> Bill:
        table = prices.read()
        makes = [
            "run folder",
            "uploaded files",
            f"fine-tuning job on {recipe.model}",
            "tuned model",
            *self._makes(recipe),
        ]
        price = prices.of_model(table, recipe.model)
        if price is None:
            note = f"{recipe.model} is not in the price table of {table['as_of']}; name yours in TUNEWRIGHT_PRICES"
            return Bill(tuple(makes), None, None, note)
        tokens = plan["tokens"]
        each = {"train": tokens["train"], "input": tokens["input"], "output": tokens["output"]}
        low, high = (sum(count * price[kind][end] for kind, count in each.items()) / 1e6 for end in (0, 1))
        note = f"prices of {table['as_of']}" + self._standing_cost(price)
        return Bill(tuple(makes), round(low, 2), round(high, 2), note)

    def _makes(self, recipe: Recipe) -> list[str]:
        return []

    def _standing_cost(self, price: dict[str, Any]) -> str:
        return ""

    def _look(self, recipe: Recipe) -> list[Problem]:
        """What the endpoint says of the base."""
        with calls.explained(f"looking at {self.place.client.base_url}"):
            models = {model.id: model for model in self.place.client.models.list()}
        base = models.get(recipe.model)
        if base is None:
            near = sorted(one for one in models if one.startswith(recipe.model.split("-20")[0]))[:5]
            hint = f"; there are {', '.join(near)}" if near else ""
            said = f"model {recipe.model}: the endpoint has none of that name, or it is not open to you{hint}"
            return [Problem(said)]
        return _said_of(recipe.model, base)

    def _unsupported(self, recipe: Recipe, stages: tuple[str, ...]) -> list[Problem]:
        """What the recipe asks for and no such API can do: an error each, never ignored."""
        found = []
        if recipe.task == "pretraining":
            found.append(Problem("task: pretraining: the API learns conversations; use another backend"))
        if recipe.task == "preference" and recipe.data.holds_out:
            found.append(
                Problem(
                    "task: preference is evaluated by the log-probabilities of given answers, which chat completions "
                    "do not tell; train without held-out rows (data.split.test: 0), or on another backend"
                )
            )
        elif recipe.task in MEASURED and recipe.metric not in MEASURED[recipe.task]:
            choices = " or ".join(MEASURED[recipe.task])
            found.append(Problem(f"evaluate.metric: {recipe.metric} is not told by chat completions; choose {choices}"))
        for key in sorted(recipe.train.model_fields_set - HONOURED):
            found.append(Problem(f"train.{key}: the API takes no such setting; {INSTEAD.get(key, 'leave it out')}"))
        if recipe.train.epochs != int(recipe.train.epochs) or recipe.train.epochs > EPOCHS:
            found.append(Problem(f"train.epochs: {recipe.train.epochs:g}: the API takes whole numbers up to {EPOCHS}"))
        if recipe.revision is not None:
            found.append(Problem("revision: the API knows its bases by name alone; leave it out"))
        if recipe.package.register_as is not None:
            found.append(Problem("package.register_as: there are no weights here to register; leave it out"))
        return found

    # --- stages ---

    def submit(self, stage: str, run: Run) -> Job:
        return self.here.submit(stage, run, on="here" if stage == "prepare" else "hosted")

    def poll(self, job: Job, run: Run) -> Status:
        return self.here.poll(job, run)

    def collect(self, job: Job, run: Run) -> None:
        """Nothing to bring: the child wrote into the run folder."""

    def cancel(self, job: Job, run: Run) -> None:
        """Stop looking on. The job over there goes on: it costs what it costs, and cannot be gone on with."""
        self.here.cancel(job, run)

    def forget(self, stage: str, run: Run) -> None:
        """Cancel the job of a training that is to be done again, and let go of what was answered."""
        if stage in ("prepare", "train"):
            for one in self.find(run):
                if one.kind == JOB and self.remove(one, run) == "gone" and one.entry:
                    run.gone(one.entry)
            (run.path / "jobs" / "hosted-job.json").unlink(missing_ok=True)
            run.metrics_file.unlink(missing_ok=True)
        for kept in (run.path / "evaluate").glob("asked-*.jsonl"):
            kept.unlink()

    # --- what stands ---

    def find(self, run: Run) -> list[Resource]:
        here = [one for one in self.here.find(run) if not one.kind.startswith(OURS)]
        recorded = {
            (one["kind"], str(one["name"])): one
            for one in run.resources()
            if one["is"] != "gone" and one["kind"].startswith(OURS)
        }
        if not recorded and not run.manifest_file("plan").is_file():
            return here  # nothing can have been made
        with calls.explained("looking for what stands"):
            there = dict(self.place.standing(run))
        known = [
            Resource(kind, name, facts | there.get((kind, name), {"state": ABSENT}), facts["entry"])
            for (kind, name), facts in recorded.items()
        ]
        fresh = [Resource(key[0], key[1], facts) for key, facts in there.items() if key not in recorded]
        return here + known + fresh

    def remove(self, resource: Resource, run: Run) -> Removal:
        if not resource.kind.startswith(OURS):
            return self.here.remove(resource, run)
        with calls.explained(f"removing {resource.kind} {resource.name}"):
            return self.place.remove(run, resource.kind, resource.name, resource.facts)

    # --- serving ---

    def deploy(self, run: Run) -> dict[str, Any]:
        with calls.explained("making the tuned model ready"):
            model = self.place.model(run, "tuned")
        return {
            "base_url": str(self.place.client.base_url).rstrip("/"),
            "model": model,
            "tokens_per_minute": None,
            "content_filter": "the endpoint's own",
        }

    def serving(self, run: Run) -> bool:
        if not run.manifest_file("deploy").is_file():
            return False
        with calls.explained("looking at the tuned model"):
            return self.place.answers(run)

    def undeploy(self, run: Run) -> None:
        with calls.explained("removing what serves the tuned model"):
            self.place.undeploy(run)

    def answer(self, run: Run, messages: list[dict[str, str]], room: int | None) -> tuple[str, int]:
        most = room or run.manifest("package")["hosted"]["max_answer_tokens"]
        return complete(self.place, run.manifest("deploy")["model"], messages, most, seed=run.recipe().evaluate.seed)


class OpenAIBackend(HostedBackend):
    """OpenAI's endpoint, or any that speaks its fine-tuning API."""

    kind = "openai"

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.settings = backend_settings(OpenAISettings, "openai", given)
        self.place = OpenAIPlace(self.settings)


class AzureBackend(HostedBackend):
    """Azure OpenAI: the account and its deployments too."""

    kind = "azure"
    place: AzurePlace

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.settings = backend_settings(AzureSettings, "azure", given)
        self.place = AzurePlace(self.settings)

    def _look(self, recipe: Recipe) -> list[Problem]:
        asked = self.settings
        if problems := self.place.problems(recipe.model):
            return [Problem(one) for one in problems]
        if self.place.is_there():
            return super()._look(recipe)
        return [Problem(f"backend.account: {asked.account} is not there yet and will be made", "warning")]

    def _makes(self, recipe: Recipe) -> list[str]:
        asked = self.settings
        made = [f"account {asked.account}"] if asked.create_account and not self.place.is_there() else []
        return [
            *made,
            f"deployment of the base ({asked.base_sku}, {asked.capacity} thousand tokens a minute)",
            f"deployment of the tuned model ({asked.sku}, {asked.capacity} thousand tokens a minute)",
        ]

    def _standing_cost(self, price: dict[str, Any]) -> str:
        if self.settings.sku == "DeveloperTier":
            return "; the deployment has no fee by the hour and ends after 24 hours"
        low, high = price["hosting_hour"]
        return f"; and {low:.2f} to {high:.2f} an hour while the tuned model is deployed, asked or not"


def _said_of(name: str, base: Any) -> list[Problem]:
    """What the models call tells of a base: whether it may be tuned, and its end. OpenAI's has a day (`shutdown_date`),
    Azure's moments (`deprecation`) and what it can do (`capabilities`)."""
    more = base.model_dump()
    found = []
    if (more.get("capabilities") or {}).get("fine_tune") is False:
        found.append(
            Problem(f"model {name}: it is not open to fine-tuning here; choose another base, or ask for access")
        )
    ends = more.get("deprecation") or {}
    for when, what in (
        (more.get("shutdown_date") or ends.get("inference"), "answers no more"),
        (ends.get("fine_tune"), "takes no more jobs"),
    ):
        day = _day(when)
        if day is not None and day <= datetime.date.today():
            found.append(Problem(f"model {name}: it {what} since {day}; choose a newer base"))
        elif day is not None and day < datetime.date.today() + NOTICE:
            found.append(Problem(f"model {name}: it {what} from {day} on", "warning"))
    return found


def _day(when: Any) -> datetime.date | None:
    """A day as it is written, or a moment in Unix seconds."""
    if isinstance(when, int | float):
        return datetime.datetime.fromtimestamp(when, datetime.UTC).date()
    with contextlib.suppress(ValueError, TypeError):
        return datetime.date.fromisoformat(when[:10])
    return None
