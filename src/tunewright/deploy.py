"""Put a packaged model behind an endpoint, and test that the endpoint is the model that was evaluated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tunewright import chat, models, pages
from tunewright.backends.base import Answers, Backend, Hosts, Renders, Serves
from tunewright.chat import Message
from tunewright.errors import DataError, EndpointError, RecipeError, StageError, TunewrightError
from tunewright.recipe import Recipe
from tunewright.run import Run, now, read_json, read_json_lines, write_json

SHOWN = 5
SHORT_TEXT, SHORT_ANSWER = 60, 16
"""Characters sent and tokens asked for where the model learnt plain text: does it answer at all?"""
GREETING = {"id": "", "messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": ""}]}
TIE = 1e-4
"""Probabilities nearer than this are a tie."""


def deploy(run: Run, backend: Backend) -> dict[str, Any]:
    """Serve the run's packaged model, and ask the endpoint for the ids of the golden conversations; gives what
    deploy/endpoint.json says.

    Raises:
        RecipeError: the backend does not serve.
        EndpointError: the port is in use, or the rendering differs from training.
    """
    if not isinstance(backend, Serves):
        raise RecipeError(f"backend.kind: {run.recipe().backend.kind} does not serve models; use --until package")
    packaged = run.manifest("package")
    endpoint = backend.deploy(run)
    compared = packaged.get("rendering", {})
    if isinstance(backend, Renders) and run.rendering_file.is_file():
        compared = compared | _compare_ids(run, backend, endpoint, compared.get("hops", []))
    if compared:
        endpoint = endpoint | {"rendering": compared}
    write_json(run.manifest_file("deploy"), endpoint | {"at": now()})
    return endpoint


def _compare_ids(run: Run, backend: Renders, endpoint: dict[str, Any], hops: Sequence[str]) -> dict[str, Any]:
    """Have the endpoint render the golden prompts; what endpoint.json says of that. An endpoint that makes other ids
    than training did is taken down."""
    tokens, conversations, not_asked = 0, 0, []
    for number, row in enumerate(read_json(run.rendering_file)["golden"], start=1):
        messages = [Message.from_dict(one).to_dict() for one in row["messages"][:-1]]
        try:
            ids = backend.rendered(run, messages, row.get("tools", []))
        except DataError as error:  # a row that no client could send: a call without an id, say
            not_asked.append(f"golden conversation {number}: {error}")
            continue
        if ids != row["prompt_ids"]:
            tokenizer = models.load_folder_tokenizer(run.packaged_model)
            said = chat.first_difference(tokenizer, row, ids, row["prompt_ids"])
            assert isinstance(backend, Serves)
            backend.undeploy(run)
            raise EndpointError(
                f"{endpoint['base_url']}: renders otherwise than in training: golden conversation {number}, {said}; it "
                f"was taken down, package again with `tunewright package {run.path}`"
            )
        conversations, tokens = conversations + 1, tokens + len(ids)
    asked = {"conversations": conversations, "prompt_tokens": tokens, "not_asked": not_asked}
    return {"endpoint": asked, "hops": [*hops, *(["endpoint"] if conversations else [])]}


def test(run: Run, backend: Backend, *, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Ask the endpoint by the openai SDK what it was asked offline; gives what deploy/test.json says.

    A classifier's answers must equal the offline predictions on every row; exact ties are counted apart, since another
    batch shape may round them the other way. Text is compared, and the share of equal answers written down. Rows with
    tools are left out and counted, for the endpoint takes none; where there are no others, it is greeted.

    Raises:
        EndpointError: it serves another model.
        StageError: it does not answer, or a classifier answers otherwise than it did offline.
    """
    import openai

    recipe = run.recipe()
    endpoint = deploy(run, backend)  # the same if it still stands, a fresh one if the machine was restarted
    every = read_json_lines(run.data_file("test"))
    rows = [row for row in every if not _has_tools(row)][: recipe.deploy.test_rows] or [GREETING]
    offline = _offline(run)
    if isinstance(backend, Answers):
        result = _ask(partial(backend.answer, run), run, recipe, endpoint, rows, offline, progress)
    else:
        with openai.OpenAI(
            base_url=endpoint["base_url"],
            api_key=run.test_key_file.read_text().strip(),
            max_retries=0,
            timeout=120,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        ) as client:
            _refuse_others(client, run, endpoint)
            result = _ask(_by_openai(client, run, endpoint), run, recipe, endpoint, rows, offline, progress)
    result["with_tools"] = sum(map(_has_tools, every))
    if result["differ"] and recipe.task == "classification" and not isinstance(backend, Hosts):  # they promise nothing
        write_json(run.failed_test_file, result)
        shown = "; ".join(
            f"{one['id']}: {one['endpoint']!r}, offline {one['offline']!r}" for one in result["differ"][:SHOWN]
        )
        share = f"{len(result['differ'])} of {result['compared']} rows"
        raise StageError(f"the endpoint answers otherwise than offline on {share}: {shown}")
    write_json(run.manifest_file("test"), result)
    pages.write(run)
    return result


Reply = Callable[[Any, int | None], tuple[str, int]]
"""A conversation and tokens to ask for; an answer and how many tokens it has."""


def _refuse_others(client: Any, run: Run, endpoint: dict[str, Any]) -> None:
    """Stop where the endpoint does not answer, or serves another model."""
    import openai

    try:
        names = [model.id for model in client.models.list()]
    except openai.OpenAIError as error:
        raise StageError(f"{endpoint['base_url']} did not answer: {error}; see {run.log_file('deploy')}") from error
    if endpoint["model"] not in names:
        raise EndpointError(f"{endpoint['base_url']} serves {', '.join(names)}, not {endpoint['model']}")


def _by_openai(client: Any, run: Run, endpoint: dict[str, Any]) -> Reply:
    import openai

    def reply(messages: Any, room: int | None) -> tuple[str, int]:
        try:
            said = client.chat.completions.create(
                model=endpoint["model"], messages=messages, max_tokens=room, temperature=0
            )
        except openai.OpenAIError as error:
            raise StageError(f"{error}; its log is {run.log_file('deploy')}") from error
        return said.choices[0].message.content or "", said.usage.completion_tokens if said.usage else 0

    return reply


def _ask(
    reply: Reply,
    run: Run,
    recipe: Recipe,
    endpoint: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    offline: dict[str, dict[str, Any]],
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Every row's question over HTTP; what deploy/test.json says."""
    latencies, differ, ties, compared, tokens = [], [], 0, 0, 0
    for number, row in enumerate(rows, start=1):
        known = offline.get(row["id"], {})
        began = time.perf_counter()
        try:
            answer, count = reply(_question(row), _room(recipe, run, known))
        except TunewrightError as error:
            raise StageError(f"the endpoint did not answer test row {row['id']}: {error}") from error
        latencies.append(time.perf_counter() - began)
        tokens += count
        wanted = known.get("said") or known.get("prediction")
        if wanted is not None:
            compared += 1
            if answer != wanted and _is_tie(known):
                ties += 1
            elif answer != wanted:
                differ.append({"id": row["id"], "endpoint": answer, "offline": wanted})
        if progress:
            progress(number, len(rows))
    latencies.sort()
    return {
        "at": now(),
        "endpoint": endpoint["base_url"],
        "rows": len(rows),
        "compared": compared,
        "equal": compared - len(differ) - ties,
        "ties": ties,
        "differ": differ,
        "latency_s": {
            "median": statistics.median(latencies),
            "p95": latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))],
            "max": latencies[-1],
        },
        "completion_tokens": tokens,
    }


def _has_tools(row: dict[str, Any]) -> bool:
    return bool(row.get("tools")) or any(
        one["role"] == "tool" or "tool_calls" in one for one in row.get("messages", ())
    )


def _question(row: dict[str, Any]) -> Any:
    """A prepared row's prompt; of plain text its beginning."""
    if "messages" not in row:
        return [{"role": "user", "content": row["text"][:SHORT_TEXT]}]
    prompt = row["messages"] if "item" in row else row["messages"][:-1]
    return [{"role": one["role"], "content": one["content"]} for one in prompt]


def _room(recipe: Recipe, run: Run, known: dict[str, Any]) -> int | None:
    """Tokens to ask for: what evaluation had room for. A classifier's answer is as long as its label."""
    if recipe.task == "classification":
        return None
    if recipe.task == "pretraining" or not known:
        return SHORT_ANSWER
    if "prompt_tokens" not in known:  # a preference: evaluation weighed answers, and generated none
        return SHORT_ANSWER
    context = run.resolved()["model"]["context"] or recipe.max_new_tokens + known["prompt_tokens"]
    return int(max(1, min(recipe.max_new_tokens, context - known["prompt_tokens"])))


def _is_tie(known: dict[str, Any]) -> bool:
    """Whether the two best classes are so near that rounding in another batch shape may swap them."""
    best = sorted(known.get("probabilities") or [], reverse=True)
    return len(best) > 1 and best[0] - best[1] < TIE


def _offline(run: Run) -> dict[str, dict[str, Any]]:
    """Test row id -> what the tuned model answered in evaluation, column by column."""
    from pyarrow import parquet

    if not run.predictions_file.is_file():  # nothing was held out, so nothing was predicted
        return {}
    table = parquet.read_table(run.predictions_file)
    return {row["id"]: row for row in table.to_pylist() if row["model"] == "tuned"}
