"""What keys have used is asked for as at OpenAI, and shown by the command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from sqlalchemy import insert, select
from typer.testing import CliRunner

from server_running import Running
from tunewright.cli import app
from tunewright.server import admission, keys, models, tables
from tunewright.server.state import Server
from tunewright.testing import EchoEngines

DAY = 86400
FIRST = 20_000 * DAY  # 2024-10-04


def use(server: Server, key: str, day: str, model: str, requests: int, tokens_in: int, tokens_out: int) -> None:
    row = {"key_id": key, "day": day, "model": model, "requests": requests}
    with server.store.begin() as connection:
        connection.execute(insert(tables.usage).values(**row, prompt_tokens=tokens_in, completion_tokens=tokens_out))


@pytest.fixture
def filled(served: Running) -> Running:
    for key, day, model, *numbers in (
        ("key_a", "2024-10-04", "small", 1, 10, 5),
        ("key_b", "2024-10-04", "small", 2, 20, 6),
        ("key_a", "2024-10-06", "small", 4, 40, 7),
        ("key_a", "2024-10-06", "large", 8, 80, 8),
    ):
        use(served.server, key, day, model, *numbers)  # type: ignore[arg-type]
    return served


@contextlib.contextmanager
def admin(served: Running, key: str | None = None) -> Iterator[Any]:
    url = f"{served.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", admin_api_key=key or served.admin_key, max_retries=0) as client:
        yield client.admin.organization.usage


def numbers(page: Any) -> list[list[tuple[Any, ...]]]:
    names = ("api_key_id", "model", "num_model_requests", "input_tokens", "output_tokens")
    return [[tuple(getattr(one, name) for name in names) for one in bucket.results] for bucket in page.data]


def test_usage_by_day_key_and_model(filled: Running) -> None:
    with admin(filled) as usage:
        plain = usage.completions(start_time=FIRST, end_time=FIRST + 3 * DAY)
        assert [(one.start_time, one.end_time) for one in plain.data] == [
            (FIRST + number * DAY, FIRST + (number + 1) * DAY) for number in range(3)
        ]
        assert numbers(plain) == [[(None, None, 3, 30, 11)], [], [(None, None, 12, 120, 15)]]
        assert (plain.has_more, plain.next_page) == (False, None)
        apart = usage.completions(start_time=FIRST, end_time=FIRST + 3 * DAY, group_by=["model", "api_key_id"])
        assert numbers(apart)[0] == [("key_a", "small", 1, 10, 5), ("key_b", "small", 2, 20, 6)]
        assert numbers(apart)[2] == [("key_a", "large", 8, 80, 8), ("key_a", "small", 4, 40, 7)]
        only = usage.completions(
            start_time=FIRST + 100, end_time=FIRST + 3 * DAY, api_key_ids=["key_a"], models=["small", "other"]
        )
        assert numbers(only) == [[(None, None, 1, 10, 5)], [], [(None, None, 4, 40, 7)]]


def test_usage_in_pages(filled: Running) -> None:
    with admin(filled) as usage:
        first = usage.completions(start_time=FIRST, end_time=FIRST + 3 * DAY, limit=2)
        assert first.has_more
        assert len(first.data) == 2
        second = usage.completions(start_time=FIRST, end_time=FIRST + 3 * DAY, limit=2, page=first.next_page)
        assert numbers(second) == [[(None, None, 12, 120, 15)]]
        assert not second.has_more
        assert usage.completions(start_time=FIRST, end_time=FIRST).data == []
        until_today = usage.completions(start_time=int(time.time()) - DAY)
        assert [len(until_today.data), until_today.has_more] == [2, False]


def test_what_usage_cannot_be_asked(filled: Running) -> None:
    with admin(filled) as usage:
        for asked, said in (
            ({"group_by": ["project_id"]}, "not by 'project_id'"),
            ({"bucket_width": "1h"}, "bucket_width"),
            ({"page": "page_2024-13-01"}, "next_page"),
            ({"limit": 32}, "limit"),
            ({"models": ["a\x00b"]}, "printable"),
        ):
            with pytest.raises(openai.BadRequestError, match=said):
                usage.completions(start_time=FIRST, **asked)
    with admin(filled, filled.key) as usage, pytest.raises(openai.PermissionDeniedError):
        usage.completions(start_time=FIRST)


def test_a_request_is_counted_for_its_key(served: Running, model_folder: Any) -> None:
    served.server.engines = EchoEngines()
    models.add_base(served.server.store, "small", str(model_folder))
    said = served.client().chat.completions.create(model="small", messages=[{"role": "user", "content": "hello"}])
    asyncio.run(admission.flush(served.server))
    with served.server.store.begin() as connection:
        id = connection.execute(select(tables.keys.c.id).where(tables.keys.c.name == "training")).scalar()
    with admin(served) as usage:
        page = usage.completions(start_time=int(time.time()), group_by=["api_key_id", "model"])
    assert said.usage is not None
    assert numbers(page) == [[(id, "small", 1, said.usage.prompt_tokens, said.usage.completion_tokens)]]


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_the_command_shows_keys_by_their_names(served: Running) -> None:
    store, data = served.server.store, str(served.server.settings.data)
    keys.create(store, "app", scope="inference")
    with store.begin() as connection:
        id = connection.execute(select(tables.keys.c.id).where(tables.keys.c.name == "app")).scalar_one()
    today = time.strftime("%Y-%m-%d", time.gmtime())
    runner = CliRunner()
    assert "nothing was used" in runner.invoke(app, ["keys", "usage", "--data", data]).output
    use(served.server, id, today, "small", 3, 1234, 56)
    use(served.server, id, "2024-10-04", "small", 9, 9, 9)
    shown = runner.invoke(app, ["keys", "usage", "--data", data]).output
    assert [word for line in shown.splitlines() if "app" in line for word in line.split()] == [
        today, "app", "small", "3", "1,234", "56",
    ]  # fmt: skip
    (found,) = json.loads(runner.invoke(app, ["keys", "usage", "--data", data, "--days", "1", "--json"]).stdout)
    assert found == {
        "key": "app", "day": today, "api_key_id": id, "model": "small",
        "input_tokens": 1234, "output_tokens": 56, "num_model_requests": 3,
    }  # fmt: skip
    rotated = runner.invoke(app, ["keys", "rotate", "app", "--data", data, "--grace", "1h"])
    assert rotated.stdout.startswith("tw-")
    refused = runner.invoke(app, ["keys", "rotate", "app", "--data", data, "--grace", "soon"])
    assert refused.exit_code
    assert "--grace soon" in str(refused.exception) + refused.output


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_the_command_gives_a_base_its_dates(served: Running, model_folder: Any) -> None:
    data = str(served.server.settings.data)
    words = ["models", "add", "small", str(model_folder), "--data", data]
    done = CliRunner().invoke(app, [*words, "--fine-tune-until", "2030-01-06", "--retires", "2031-02-03"])
    assert done.exit_code == 0, done.output
    (base,) = json.loads(CliRunner().invoke(app, ["models", "list", "--data", data, "--json"]).stdout)
    assert (base["fine_tune_until"], base["retires_at"]) == (1893888000, 1927843200)
    assert served.client().models.retrieve("small").to_dict()["shutdown_date"] == "2031-02-03"
