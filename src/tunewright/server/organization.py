"""What each key has used, in the form of OpenAI's usage API: a bucket for each day (UTC)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from sqlalchemy import Connection, func, select

from tunewright.endpoint.shapes import ApiError
from tunewright.server import documents, tables, web
from tunewright.server.store import now
from tunewright.server.web import Admin

Column = Literal["api_key_id", "model"]
COLUMNS: dict[Column, Any] = {"api_key_id": tables.usage.c.key_id, "model": tables.usage.c.model}
"""What usage is kept apart by; the others that OpenAI has (projects, users) are not known here."""
NUMBERS = {
    "input_tokens": tables.usage.c.prompt_tokens,
    "output_tokens": tables.usage.c.completion_tokens,
    "num_model_requests": tables.usage.c.requests,
}
BUCKETS = 7
MOST_BUCKETS = 31
MOST_VALUES = 100

router = APIRouter(tags=["usage"], route_class=web.Route)

Second = Annotated[int, Query(ge=0, le=253402300799)]


@router.get("/organization/usage/completions", responses=documents.shows(documents.UsagePage))
def completions_usage(
    request: Request,
    _caller: Admin,
    start_time: Second,
    end_time: Second | None = None,
    bucket_width: Literal["1d"] = "1d",
    limit: Annotated[int, Query(ge=1, le=MOST_BUCKETS)] = BUCKETS,
    page: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """Requests and tokens by day, and by `api_key_id` and `model` where `group_by` says so; `api_key_ids` and `models`
    leave out all others. Usage is counted by whole days."""
    by = _columns(_asked(request, "group_by"))
    first = _day(start_time) if page is None else _page(page)
    until = now() + 1 if end_time is None else end_time
    last = max(_day(until - 1), _day(start_time)) if until > start_time else _day(start_time) - timedelta(days=1)
    days = [first + timedelta(days=number) for number in range(min(limit, max(0, (last - first).days + 1)))]
    only: dict[Column, list[str]] = {"api_key_id": _asked(request, "api_key_ids"), "model": _asked(request, "models")}
    with web.server(request).store.read() as connection:
        found = used(connection, days[0], days[-1], by, only) if days else []
    more = bool(days) and days[-1] < last
    return {
        "object": "page",
        "data": [_bucket(day, [row for row in found if row["day"] == day.isoformat()]) for day in days],
        "has_more": more,
        "next_page": f"page_{(days[-1] + timedelta(days=1)).isoformat()}" if more else None,
    }


def used(
    connection: Connection,
    first: date,
    last: date,
    by: Iterable[Column],
    only: Mapping[Column, Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """Sums of each day that has any, the oldest first, apart by the columns of `by`.

    Args:
        only: values of columns; where there are none, all count.
    """
    day = tables.usage.c.day
    apart = [COLUMNS[one].label(one) for one in by]
    sums = [func.sum(column).label(name) for name, column in NUMBERS.items()]
    query = select(day, *apart, *sums).where(day.between(first.isoformat(), last.isoformat()))
    for name, values in (only or {}).items():
        if values:
            query = query.where(COLUMNS[name].in_(values))
    query = query.group_by(day, *apart).order_by(day, *apart)
    return [{**row, **{name: int(row[name]) for name in NUMBERS}} for row in connection.execute(query).mappings()]


def _asked(request: Request, name: str) -> list[str]:
    """The values of a list in a query, in both ways that clients write one."""
    values = [*request.query_params.getlist(name), *request.query_params.getlist(f"{name}[]")]
    if len(values) > MOST_VALUES or not all(one.isprintable() for one in values):
        raise ApiError(400, f"Invalid '{name}': at most {MOST_VALUES} values of printable characters.", param=name)
    return values


def _columns(asked: Sequence[str]) -> list[Column]:
    unknown = [one for one in asked if one not in COLUMNS]
    if unknown:
        known = ", ".join(COLUMNS)
        raise ApiError(
            400, f"Invalid 'group_by': usage is kept apart by {known}; not by '{unknown[0][:64]}'.", param="group_by"
        )
    return [name for name in COLUMNS if name in asked]


def _page(page: str) -> date:
    try:
        return date.fromisoformat(page.removeprefix("page_"))
    except ValueError:
        raise ApiError(400, f"Invalid 'page': '{page}' is not the next_page of an answer.", param="page") from None


def _day(at: int) -> date:
    return datetime.fromtimestamp(max(at, 0), UTC).date()


def _bucket(day: date, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    start = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())
    return {
        "object": "bucket",
        "start_time": start,
        "end_time": start + 86400,
        "results": [_result(row) for row in rows],
    }


def _result(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "object": "organization.usage.completions.result",
        "input_cached_tokens": 0,
        "input_audio_tokens": 0,
        "output_audio_tokens": 0,
        **dict.fromkeys(("project_id", "user_id", "api_key_id", "model", "batch", "service_tier")),
        **{name: value for name, value in row.items() if name != "day"},
    }
