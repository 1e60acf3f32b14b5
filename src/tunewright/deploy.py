"""Put a packaged model behind an endpoint, and test that the endpoint is the model that was evaluated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from tunewright.backends.base import Backend, Serves
from tunewright.errors import EndpointError, RecipeError
from tunewright.run import Run, now, read_json_lines, write_json

SHOWN = 5


def deploy(run: Run, backend: Backend) -> dict[str, Any]:
    """Serve the run's packaged model; gives what deploy/endpoint.json says.

    Raises:
        RecipeError: the backend does not serve.
        EndpointError: the port is in use, or the rendering differs from training.
    """
    if not isinstance(backend, Serves):
        raise RecipeError(f"backend.kind: {run.recipe().backend.kind} does not serve models; use --until package")
    run.manifest("package")
    endpoint = backend.deploy(run)
    write_json(run.manifest_file("deploy"), endpoint | {"at": now()})
    return endpoint


def test(run: Run, backend: Backend, *, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Ask the endpoint by the openai SDK what it was asked offline; gives what deploy/test.json says.

    A classifier's answers must equal the offline predictions on every row. Text is compared and the share of equal
    answers written down, since other batch shapes may round a tie the other way.

    Raises:
        EndpointError: it does not answer, or a classifier answers otherwise than it did offline.
    """
    import openai

    recipe = run.recipe()
    endpoint = deploy(run, backend)  # the same if it still stands, a fresh one if the machine was restarted
    rows = read_json_lines(run.data_file("test"))[: recipe.deploy.test_rows]
    offline = _offline(run)
    client = openai.OpenAI(
        base_url=endpoint["base_url"],
        api_key=run.test_key_file.read_text().strip(),
        max_retries=0,
        timeout=120,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )
    names = [model.id for model in client.models.list()]
    if endpoint["model"] not in names:
        raise EndpointError(f"{endpoint['base_url']} serves {', '.join(names)}, not {endpoint['model']}")
    latencies, differ, compared, tokens = [], [], 0, 0
    for number, row in enumerate(rows, start=1):
        messages = row["messages"][:-1] if "messages" in row else [{"role": "user", "content": row["text"][:200]}]
        began = time.perf_counter()
        reply = client.chat.completions.create(
            model=endpoint["model"],
            messages=[{"role": one["role"], "content": one["content"]} for one in messages],
            max_tokens=recipe.evaluate.max_new_tokens,
            temperature=0,
        )
        latencies.append(time.perf_counter() - began)
        tokens += reply.usage.completion_tokens if reply.usage else 0
        answer = reply.choices[0].message.content or ""
        if row["id"] in offline:
            compared += 1
            if answer != offline[row["id"]]:
                differ.append({"id": row["id"], "endpoint": answer, "offline": offline[row["id"]]})
        if progress:
            progress(number, len(rows))
    latencies.sort()
    result = {
        "at": now(),
        "endpoint": endpoint["base_url"],
        "rows": len(rows),
        "compared": compared,
        "equal": compared - len(differ),
        "differ": differ,
        "latency_s": {
            "median": statistics.median(latencies),
            "p95": latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))],
            "max": latencies[-1],
        },
        "completion_tokens": tokens,
    }
    if differ and recipe.task == "classification":
        shown = "; ".join(f"{one['id']}: {one['endpoint']!r}, offline {one['offline']!r}" for one in differ[:SHOWN])
        write_json(run.manifest_file("test").with_name("test-failed.json"), result)
        raise EndpointError(f"the endpoint answers otherwise than offline on {len(differ)} of {compared} rows: {shown}")
    write_json(run.manifest_file("test"), result)
    return result


def _offline(run: Run) -> dict[str, str]:
    """Test row id -> what the tuned model answered in evaluation."""
    from pyarrow import parquet

    table = parquet.read_table(run.predictions_file)
    if "prediction" not in table.column_names:
        return {}
    columns = (table[name].to_pylist() for name in ("model", "id", "prediction"))
    return {row: said for model, row, said in zip(*columns, strict=True) if model == "tuned"}
