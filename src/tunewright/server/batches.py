"""Batches: files of requests, answered one after another by the code that answers requests over HTTP.

The server itself works on them, beside what it does for waiting clients; an engine takes turns between both. Who works
on a batch renews its claim; one that is no longer renewed goes to the next server. Answers are written to a file beside
the data as they come, so that whoever goes on with a batch on this machine begins behind the last of them.

Requests of a batch are not counted against a deployment's quota for a minute, as on OpenAI's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy import Connection, insert, or_, select, update

from tunewright.endpoint.shapes import ApiError, Part
from tunewright.server import documents, files, store, tables, web
from tunewright.server.chat import KINDS, let_in
from tunewright.server.jobs import Metadata
from tunewright.server.keys import Key
from tunewright.server.state import Server
from tunewright.server.store import new_id, now
from tunewright.server.web import After, Caller, Limit20, Training

logger = logging.getLogger("tunewright.server")

POLL_S = 1.0
STALE_S = 30.0
"""A claim that nobody has renewed for so long is given to the next server."""
DAY_S = 86400
"""How long a batch may take: the one window that there is."""
LINES = 50_000
"""Requests in a batch at most, as OpenAI has it."""
INPUT_BYTES = 200 << 20
"""Largest file of a batch, as OpenAI has it."""
LINE_BYTES = web.JSON_BYTES
"""Longest line: what a request's body may have, too."""
RETRIES = 3
"""How often a request is tried whose engine ended."""
WORKED_ON = ("validating", "in_progress", "finalizing", "cancelling")

router = APIRouter(tags=["batches"], route_class=web.Route)


class OutputExpires(Part):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2592000)


Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/chat/completions", "/completions"]
"""Where a batch's requests go. Azure's clients leave /v1 out, in the batch and in its lines."""


class BatchIn(Part):
    input_file_id: str = Field(min_length=1, max_length=128)
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: OutputExpires | None = None


@router.post("/batches", responses=documents.shows(documents.Batch))
def create_batch(request: Request, caller: Training, wanted: BatchIn) -> dict[str, Any]:
    server = web.server(request)
    found = files.find(server, wanted.input_file_id, param="input_file_id")
    if found["purpose"] != "batch":
        raise ApiError(
            400,
            f"Invalid 'input_file_id': '{wanted.input_file_id}' was uploaded with purpose '{found['purpose']}'; a "
            "batch needs 'batch'.",
            param="input_file_id",
            code="invalid_file_purpose",
        )
    if found["bytes"] > INPUT_BYTES:
        raise ApiError(
            400,
            f"Invalid 'input_file_id': '{wanted.input_file_id}' has {found['bytes']:,} bytes; a batch's file has at "
            f"most {INPUT_BYTES:,} ({INPUT_BYTES >> 20} MB).",
            param="input_file_id",
            code="file_too_large",
        )
    row: dict[str, Any] = {
        "id": new_id("batch_"),
        "created_at": now(),
        "key_id": caller.key.id,
        "endpoint": wanted.endpoint,
        "input_file_id": wanted.input_file_id,
        "status": "validating",
        "metadata": wanted.metadata,
        "counts": {"total": 0, "completed": 0, "failed": 0},
        "times": {"expires_at": now() + DAY_S},
    }
    with server.store.begin() as connection:
        connection.execute(insert(tables.batches).values(**row))
    return shape(_asked_for(server, caller, row["id"]))


@router.get("/batches", responses=documents.shows(documents.Batches))
def list_batches(request: Request, caller: Training, after: After = None, limit: Limit20 = 20) -> dict[str, Any]:
    with web.server(request).store.read() as connection:
        query = select(tables.batches)
        if not caller.key.opens("admin"):
            query = query.where(tables.batches.c.key_id == caller.key.id)
        return web.listed(connection, query, tables.batches, shape, after=after, limit=limit, what="batch")


@router.get("/batches/{batch_id}", responses=documents.shows(documents.Batch))
def retrieve_batch(request: Request, caller: Training, batch_id: str) -> dict[str, Any]:
    return shape(_asked_for(web.server(request), caller, batch_id))


@router.post("/batches/{batch_id}/cancel", responses=documents.shows(documents.Batch))
def cancel_batch(request: Request, caller: Training, batch_id: str) -> dict[str, Any]:
    """What has been answered by now is in the output file."""
    server = web.server(request)
    table = tables.batches
    _asked_for(server, caller, batch_id)
    with server.store.begin() as connection:
        found = store.row(connection, table, id=batch_id)
        assert found is not None, "batches are never deleted"
        if found["status"] not in WORKED_ON:
            raise ApiError(
                400, f"The batch '{batch_id}' is {found['status']} already.", param="batch_id", code="invalid_value"
            )
        if found["status"] in ("validating", "in_progress"):
            times = found["times"] | {"cancelling_at": now()}
            connection.execute(update(table).where(table.c.id == batch_id).values(status="cancelling", times=times))
    return shape(_asked_for(server, caller, batch_id))


def shape(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as clients see it."""
    times = batch["times"]
    moments = ("in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return {
        "id": batch["id"],
        "object": "batch",
        "endpoint": batch["endpoint"],
        "errors": batch["errors"],
        "input_file_id": batch["input_file_id"],
        "completion_window": "24h",
        "status": batch["status"],
        "output_file_id": batch["output_file_id"],
        "error_file_id": batch["error_file_id"],
        "created_at": batch["created_at"],
        **{f"{moment}_at": times.get(f"{moment}_at") for moment in moments},
        "request_counts": batch["counts"],
        "metadata": batch["metadata"],
    }


@contextlib.asynccontextmanager
async def working(server: Server) -> AsyncIterator[None]:
    """Work on batches until the end of the block; what is being worked on then is given back."""
    task = asyncio.create_task(_work(server))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _work(server: Server) -> None:
    name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    while True:
        try:
            batch = await asyncio.to_thread(claim, server, name)
            if batch is not None:
                await Work(server, batch, name).run()
                continue
        except Exception:  # the database is away, say: later perhaps not
            logger.exception("batches cannot be worked on")
        await asyncio.sleep(POLL_S)


def claim(server: Server, worker: str) -> dict[str, Any] | None:
    """Take the oldest batch that nobody has. None where there is none."""
    table = tables.batches
    at = time.time()
    free = or_(table.c.claimed_by.is_(None), table.c.heartbeat_at < at - STALE_S)
    with server.store.begin() as connection:
        waiting = select(table.c.number).where(table.c.status.in_(WORKED_ON), free).order_by(table.c.number).limit(1)
        chosen = waiting.with_for_update(skip_locked=True).scalar_subquery()
        take = update(table).where(table.c.number == chosen).values(claimed_by=worker, heartbeat_at=at)
        found = connection.execute(take.returning(*table.c)).mappings().first()
    return dict(found) if found is not None else None


class Lost(Exception):
    """Another server has the batch."""


@dataclass
class Work:
    """One batch, claimed."""

    server: Server
    batch: dict[str, Any]
    worker: str
    cancelled: bool = False
    lost: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    async def run(self) -> None:
        """Take the batch to its end, whatever that is."""
        self.cancelled = self.batch["status"] == "cancelling"
        renewing = asyncio.create_task(self._renew())
        try:
            await self._steps()
        except Lost:
            logger.warning("batch %s was taken by another server", self.batch["id"])
        except store.AWAY:  # what was answered is in the spool: whoever takes the batch next goes on behind it
            logger.exception("batch %s waits for the database", self.batch["id"])
            await asyncio.to_thread(self._release)
            await asyncio.sleep(POLL_S)
        except Exception:  # or one broken batch would keep the others waiting for ever
            logger.exception("batch %s", self.batch["id"])
            with contextlib.suppress(Lost):
                await self._fail([_problem("server_error", "The server had an error; its log has the reason.")])
        except asyncio.CancelledError:  # the server stops: the next one goes on
            self._release()
            raise
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)

    def _release(self) -> None:
        """Give the batch back, or let its claim run out where the database does not even hear that."""
        try:
            self._set(claimed_by=None)
        except Lost:
            logger.warning("batch %s was taken by another server", self.batch["id"])
        except store.AWAY:
            logger.exception("batch %s is given back in %.0f seconds", self.batch["id"], STALE_S)

    async def _steps(self) -> None:
        found = await asyncio.to_thread(self._check)
        if isinstance(found, list):
            await self._fail(found)
            return
        done = await asyncio.to_thread(self._answered)
        self.counts = {"total": found, "completed": 0, "failed": 0}
        for one in done.values():
            self.counts["completed" if one else "failed"] += 1
        if self.batch["status"] == "validating":
            await self._move("in_progress", since="validating")
        expired = False
        unanswered = self._unanswered(done)
        while (asked := await asyncio.to_thread(next, unanswered, None)) is not None:
            if self.lost:
                raise Lost
            if self.cancelled or (expired := self.batch["times"]["expires_at"] <= now()):
                break
            caller = await asyncio.to_thread(self._caller)
            if not isinstance(caller, Caller):
                await self._fail([caller])
                return
            kept = await self._answer(caller, asked)
            ok = kept["error"] is None and kept["response"]["status_code"] == 200
            self.counts["completed" if ok else "failed"] += 1
            await asyncio.to_thread(self._write, kept)
        await self._finish("cancelled" if self.cancelled else "expired" if expired else "completed")

    async def _answer(self, caller: Caller, asked: dict[str, Any]) -> dict[str, Any]:
        """One request's line of the output."""
        request_id = f"req_{secrets.token_hex(16)}"
        raw = json.dumps(asked["body"]).encode()
        status, body = 500, {}
        kind = KINDS[_with_version(self.batch["endpoint"])]
        for tried in range(RETRIES):
            try:
                job = await let_in(self.server, caller, kind, raw, metered=False)
                if job.wanted.stream:
                    raise ApiError(400, "A batch is not streamed.", param="stream", code="invalid_value")
                status, body = 200, await job.reply()
            except ApiError as error:
                status, body = error.status, error.body
            if status != 503 or tried == RETRIES - 1:
                break
            await asyncio.sleep(POLL_S)
        response = {"status_code": status, "request_id": request_id, "body": body}
        return {"id": f"batch_{request_id}", "custom_id": asked["custom_id"], "response": response, "error": None}

    async def _finish(self, status: str) -> None:
        """Put the answers into files; the batch is over."""
        if not self.cancelled and self.batch["status"] != "finalizing":
            await self._move("finalizing", since="in_progress")
        if self.cancelled:
            status = "cancelled"
        await asyncio.to_thread(self._end, status)

    async def _fail(self, problems: list[dict[str, Any]]) -> None:
        """The batch is over; what was answered is kept all the same."""
        errors = {"object": "list", "data": problems}
        try:
            await asyncio.to_thread(lambda: self._end("failed", errors=errors))
        except (Lost, *store.AWAY):
            raise
        except Exception:  # no space for the files, say: the spool stays where it is
            logger.exception("the answers of batch %s are in %s only", self.batch["id"], self._spool)
            times = self.batch["times"] | {"failed_at": now()}
            ended = {"status": "failed", "times": times, "errors": errors, "claimed_by": None}
            await asyncio.to_thread(lambda: self._set(**ended))

    def _end(self, status: str, **values: Any) -> None:
        """Put the answers into files, and the batch into its last status: both or neither."""
        made: dict[str, dict[str, Any]] = {}
        try:
            for column, good in (("output_file_id", True), ("error_file_id", False)):
                if (row := self._file(good)) is not None:
                    made[column] = row
        except BaseException:
            for row in made.values():
                self.server.blobs.delete(row["id"])
            raise
        ids = {column: row["id"] for column, row in made.items()}
        times = self.batch["times"] | {f"{status}_at": now()}
        ended = {"status": status, "times": times, "claimed_by": None, **ids, **values}
        if self.counts:
            ended["counts"] = dict(self.counts)
        with files.noting(self.server, *ids.values()) as connection:
            for row in made.values():
                connection.execute(insert(tables.files).values(**row))
            self._write_row(connection, **ended)
        self._spool.unlink(missing_ok=True)

    async def _move(self, status: str, *, since: str) -> None:
        """From one status to the next, unless somebody has cancelled the batch meanwhile."""
        times = self.batch["times"] | {f"{status}_at": now()}
        values = {"status": status, "times": times, "counts": dict(self.counts)}
        try:
            await asyncio.to_thread(lambda: self._set(tables.batches.c.status == since, **values))
        except Lost:
            await asyncio.to_thread(self._look)
            if not self.cancelled:
                raise

    async def _renew(self) -> None:
        """Renew the claim, write down how far the batch is, and hear whether it was cancelled."""
        while True:
            try:
                await asyncio.to_thread(self._look)
            except Lost:
                self.lost = True
                return
            except Exception:  # until the database is back the claim stands, as long as nobody else takes it
                logger.exception("the claim of %s cannot be renewed", self.batch["id"])
            await asyncio.sleep(POLL_S)

    def _look(self) -> None:
        """Raises:
        Lost: the batch is no longer ours.
        """
        self._set(heartbeat_at=time.time(), **({"counts": dict(self.counts)} if self.counts else {}))
        found = _find(self.server, self.batch["id"])
        assert found is not None, "batches are never deleted"
        if found["status"] == "cancelling":
            self.cancelled = True
            self.batch["times"] = found["times"]

    def _set(self, *where: Any, **values: Any) -> None:
        """Write to the batch's row, while it is ours and as `where` says.

        Raises:
            Lost: it is no longer.
        """
        with self.server.store.begin() as connection:
            self._write_row(connection, *where, **values)
        self.batch |= values

    def _write_row(self, connection: Connection, *where: Any, **values: Any) -> None:
        table = tables.batches
        mine = update(table).where(table.c.id == self.batch["id"], table.c.claimed_by == self.worker, *where)
        if not connection.execute(mine.values(**values)).rowcount:
            raise Lost

    def _check(self) -> int | list[dict[str, Any]]:
        """How many requests the file holds, or what is wrong with it."""
        try:
            files.find(self.server, self.batch["input_file_id"])
        except ApiError:
            return [_problem("invalid_file", "The input file was deleted.")]
        problems: list[dict[str, Any]] = []
        seen: set[str] = set()
        count = 0
        for number, line in self._lines():
            count += 1
            if count > LINES:
                return [_problem("too_many_requests", f"The file has more than {LINES:,} requests.")]
            if len(line) > LINE_BYTES:
                said = f"This line has more than {LINE_BYTES:,} bytes ({LINE_BYTES >> 20} MB)."
                return [*problems, _problem("line_too_long", said, line=number)]
            wrong = _wrong(line, self.batch["endpoint"], seen)
            if wrong is not None:
                problems.append(_problem(*wrong, line=number))
            if len(problems) == 50:
                break
        if not count:
            return [_problem("empty_file", "The input file is empty.")]
        return problems or count

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines that say something, and their numbers. One that is too long is cut off behind `LINE_BYTES`."""
        with self.server.blobs.local(self.batch["input_file_id"]).open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), start=1):
                if line.strip() or len(line) > LINE_BYTES:
                    yield number, line.removeprefix(b"\xef\xbb\xbf")

    def _unanswered(self, done: dict[str, bool]) -> Iterator[dict[str, Any]]:
        """Requests that have no answer yet. The file was checked."""
        for _, line in self._lines():
            asked: dict[str, Any] = json.loads(line)
            if asked["custom_id"] not in done:
                yield asked

    def _caller(self) -> Caller | dict[str, Any]:
        """In whose name the requests are asked, or why they are asked no more."""
        with self.server.store.read() as connection:
            row = store.row(connection, tables.keys, id=self.batch["key_id"])
        if row is None or row["revoked_at"] is not None:
            return _problem(
                "key_revoked", "The key that made this batch was revoked; what was answered by then is kept."
            )
        if row["expires_at"] is not None and row["expires_at"] <= now():
            return _problem(
                "key_expired", "The key that made this batch has expired; what was answered by then is kept."
            )
        return Caller(Key(row["id"], row["name"], row["scope"], row["expires_at"], row["account"]), "openai")

    @property
    def _spool(self) -> Path:
        """Answers as they come: one line of the output each."""
        folder = self.server.settings.data / "batches"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self.batch['id']}.jsonl"

    def _write(self, kept: dict[str, Any]) -> None:
        with self._spool.open("a") as file:
            file.write(json.dumps(kept) + "\n")

    def _kept(self) -> Iterator[tuple[str, bool, bytes]]:
        """Custom id, whether it went well, and line of each request that has been answered."""
        with contextlib.suppress(FileNotFoundError), self._spool.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):  # it was cut off, and is asked again
                    break
                one = json.loads(line)
                yield one["custom_id"], one["response"]["status_code"] == 200, line

    def _answered(self) -> dict[str, bool]:
        done: dict[str, bool] = {}
        size = 0
        for custom_id, good, line in self._kept():
            done[custom_id] = good
            size += len(line)
        if self._spool.exists():
            os.truncate(self._spool, size)  # take away what was cut off
        return done

    def _file(self, wanted: bool) -> dict[str, Any] | None:
        """Write the file of what went well, or of what did not; gives its row, None where it would be empty."""
        lines = (line for _, good, line in self._kept() if good == wanted)
        first = next(lines, None)
        if first is None:
            return None
        name = f"{self.batch['id']}_{'output' if wanted else 'error'}.jsonl"
        return files.written(self.server, _behind(first, lines), name, "batch_output")


def _behind(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _wrong(line: bytes, endpoint: str, seen: set[str]) -> tuple[str, str, str | None] | None:
    """What is wrong with a line: code, message, parameter."""
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError):
        return "invalid_json_line", "This line is not JSON.", None
    if not isinstance(asked, dict):
        return "invalid_json_line", "This line is not a JSON object.", None
    checks: dict[str, Callable[[Any], bool]] = {
        "custom_id": lambda value: isinstance(value, str) and bool(value),
        "method": lambda value: value == "POST",
        "url": lambda value: isinstance(value, str) and _with_version(value) == _with_version(endpoint),
        "body": lambda value: isinstance(value, dict),
    }
    for name, holds in checks.items():
        if name not in asked:
            return "missing_required_parameter", f"Missing required parameter: '{name}'.", name
        if not holds(asked[name]):
            wanted = {"method": "POST", "url": endpoint, "body": "an object", "custom_id": "a text"}[name]
            return ("mismatched_endpoint" if name == "url" else "invalid_value"), f"'{name}' must be {wanted}.", name
    if asked["custom_id"] in seen:
        return (
            "duplicate_custom_id",
            f"The custom_id {asked['custom_id'][:64]!r} stands in another line too.",
            "custom_id",
        )
    seen.add(asked["custom_id"])
    return None


def _with_version(endpoint: str) -> str:
    """An endpoint as OpenAI writes it."""
    return endpoint if endpoint.startswith("/v1/") else f"/v1{endpoint}"


def _problem(code: str, message: str, param: str | None = None, line: int | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": param, "line": line}


def _asked_for(server: Server, caller: Caller, batch_id: str) -> dict[str, Any]:
    """A batch's row; only for the key that made it, and for administrators."""
    found = _find(server, batch_id) if batch_id.isprintable() else None  # PostgreSQL takes no NUL
    if found is None or (found["key_id"] != caller.key.id and not caller.key.opens("admin")):
        raise web.not_found("batch", batch_id[:128], param="batch_id")
    return found


def _find(server: Server, batch_id: str) -> dict[str, Any] | None:
    with server.store.read() as connection:
        return store.row(connection, tables.batches, id=batch_id)
