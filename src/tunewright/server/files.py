"""Files, and uploads of large ones in parts. Bytes go to disk as they come in."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse
from pydantic import Field
from sqlalchemy import Connection, delete, insert, or_, select, update
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from tunewright.endpoint.shapes import ApiError, Part
from tunewright.server import documents, store, tables, web
from tunewright.server.blobs import CHUNK
from tunewright.server.state import Server
from tunewright.server.store import new_id, now
from tunewright.server.web import After, Training

logger = logging.getLogger("tunewright.server")

FILE_BYTES = 512 << 20
"""Largest file that is uploaded at once."""
UPLOAD_BYTES = 8 << 30
"""Largest file that is uploaded in parts."""
PART_BYTES = 64 << 20
UPLOAD_S = 3600
"""How long an upload waits for its parts."""
COMPLETING_S = 30
"""An upload that is being completed by nobody who said so for so long waits for its parts again: its server ended."""

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")

router = APIRouter(tags=["files"], route_class=web.Route)


UNSETTLED = ("pending", "completing")
"""States of an upload of which more is to come."""


class ExpiresAfter(Part):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2592000)


class UploadIn(Part):
    filename: str = Field(min_length=1, max_length=1024)
    purpose: Purpose
    bytes: int = Field(ge=1, le=UPLOAD_BYTES)
    mime_type: str = Field(max_length=255)
    expires_after: ExpiresAfter | None = None


class CompleteIn(Part):
    part_ids: list[str] = Field(min_length=1, max_length=10_000)
    md5: str | None = None


FILE_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    }
}
CONTENT: documents.Responses = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}
PART_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.post("/files", openapi_extra=FILE_FORM, responses=documents.shows(documents.File))
async def create_file(request: Request, _caller: Training) -> dict[str, Any]:
    async with _form(request, files=1) as form:
        sent = _sent_file(form, "file")
        purpose = form.get("purpose")
        if purpose is None:
            raise ApiError(
                400, "Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter"
            )
        if purpose not in PURPOSES:
            raise ApiError(
                400,
                f"Invalid 'purpose': {str(purpose)[:64]!r} is none; choose one of {', '.join(PURPOSES)}.",
                param="purpose",
                code="invalid_value",
            )
        expires_s = _expires_s(form)
        return await run_in_threadpool(
            keep, web.server(request), _chunks(sent), sent.filename or "file", str(purpose), expires_s=expires_s
        )


@router.get("/files", responses=documents.shows(documents.Files))
def list_files(
    request: Request,
    _caller: Training,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: After = None,
) -> dict[str, Any]:
    query = select(tables.files).where(_alive())
    if purpose is not None:
        if not store.storable(purpose):
            raise ApiError(400, "Invalid 'purpose': there is none such.", param="purpose", code="invalid_value")
        query = query.where(tables.files.c.purpose == purpose)
    with web.server(request).store.read() as connection:
        return web.listed(
            connection,
            query,
            tables.files,
            shape,
            after=after,
            limit=limit,
            newest_first=order == "desc",
            what="file",
        )


@router.get("/files/{file_id}", responses=documents.shows(documents.File))
def retrieve_file(request: Request, _caller: Training, file_id: str) -> dict[str, Any]:
    return shape(find(web.server(request), file_id))


@router.delete("/files/{file_id}", responses=documents.shows(documents.Deleted))
def delete_file(request: Request, _caller: Training, file_id: str) -> dict[str, Any]:
    server = web.server(request)
    file = find(server, file_id)
    remove(server, file["id"])
    return {"id": file["id"], "object": "file", "deleted": True}


@router.get("/files/{file_id}/content", response_class=Response, responses=CONTENT)
def file_content(request: Request, caller: Training, file_id: str) -> Response:
    """The bytes as they came. A job's result file is base64 on OpenAI's surface, and plain on Azure's, as there."""
    server = web.server(request)
    file = find(server, file_id)
    chunks: Iterator[bytes] = server.blobs.chunks(file["id"])
    if file["purpose"] == "fine-tune-results" and caller.surface == "openai":
        import base64

        chunks = iter([base64.b64encode(b"".join(chunks))])
    headers = {"content-disposition": _disposition(file["filename"]), "x-content-type-options": "nosniff"}
    return StreamingResponse(chunks, media_type="application/octet-stream", headers=headers)


@router.post("/uploads", responses=documents.shows(documents.Upload))
def create_upload(request: Request, _caller: Training, wanted: UploadIn) -> dict[str, Any]:
    with web.server(request).store.begin() as connection:
        upload = {
            "id": new_id("upload_"),
            "created_at": now(),
            "bytes": wanted.bytes,
            "filename": wanted.filename,
            "purpose": wanted.purpose,
            "mime_type": wanted.mime_type,
            "status": "pending",
            "expires_at": now() + UPLOAD_S,
            "file_expires_s": wanted.expires_after.seconds if wanted.expires_after else None,
        }
        connection.execute(insert(tables.uploads).values(**upload))
    return _upload_shape(upload)


@router.post("/uploads/{upload_id}/parts", openapi_extra=PART_FORM, responses=documents.shows(documents.UploadPart))
async def add_part(request: Request, _caller: Training, upload_id: str) -> dict[str, Any]:
    server = web.server(request)
    await run_in_threadpool(_pending, server, upload_id)
    async with _form(request, files=1) as form:
        return await run_in_threadpool(_keep_part, server, upload_id, _sent_file(form, "data"))


@router.post("/uploads/{upload_id}/complete", responses=documents.shows(documents.Upload))
def complete_upload(request: Request, _caller: Training, upload_id: str, wanted: CompleteIn) -> dict[str, Any]:
    """A client that did not hear the answer may ask again: it gets the same file."""
    server = web.server(request)
    upload = _found(server, upload_id)
    if upload["status"] == "completed":
        return _upload_shape(upload, shape(find(server, upload["file_id"])))
    _check_pending(upload)
    _check_parts(server, upload, wanted.part_ids)
    file_id = new_id("file-")
    taken = {"status": "completing", "file_id": file_id, "expires_at": now() + COMPLETING_S}
    if not _change(server, upload_id, tables.uploads.c.status == "pending", **taken):
        return complete_upload(request, _caller, upload_id, wanted)  # somebody was faster: it is no longer pending
    return _upload_shape(upload | {"status": "completed"}, _put_together(server, upload, file_id, wanted))


@router.post("/uploads/{upload_id}/cancel", responses=documents.shows(documents.Upload))
def cancel_upload(request: Request, _caller: Training, upload_id: str) -> dict[str, Any]:
    server = web.server(request)
    upload = _pending(server, upload_id)
    if not _end_pending(server, upload_id, status="cancelled"):
        return cancel_upload(request, _caller, upload_id)  # it is no longer pending
    return _upload_shape(upload | {"status": "cancelled"})


def keep(
    server: Server,
    chunks: Iterator[bytes],
    filename: str,
    purpose: str,
    *,
    expires_s: int | None = None,
    md5: str | None = None,
) -> dict[str, Any]:
    """Write a file's bytes, then its row; gives it as clients see it.

    Raises:
        ApiError: it is empty, or its bytes are not those of `md5`.
    """
    row = written(server, chunks, filename, purpose, expires_s=expires_s, md5=md5)
    with noting(server, row["id"]) as connection:
        connection.execute(insert(tables.files).values(**row))
    return shape(row)


def written(
    server: Server,
    chunks: Iterator[bytes],
    filename: str,
    purpose: str,
    *,
    file_id: str | None = None,
    expires_s: int | None = None,
    md5: str | None = None,
) -> dict[str, Any]:
    """Write a file's bytes; gives its row, which is to be written next.

    Raises:
        ApiError: it is empty, or its bytes are not those of `md5`.
    """
    file_id = file_id or new_id("file-")
    with server.blobs.writing(file_id) as writer:
        for chunk in chunks:
            writer.write(chunk)
        if not writer.size:
            raise ApiError(400, "The file is empty.", param="file", code="empty_file")
        if md5 is not None and md5.lower() != writer.md5:
            raise ApiError(400, f"The bytes have the MD5 {writer.md5}, not {md5}.", param="md5", code="invalid_value")
    return {
        "id": file_id,
        "created_at": now(),
        "bytes": writer.size,
        "filename": _plain_name(filename),
        "purpose": purpose,
        "sha256": writer.sha256,
        "expires_at": None if expires_s is None else now() + expires_s,
    }


@contextlib.contextmanager
def noting(server: Server, *blobs: str) -> Iterator[Connection]:
    """A transaction that writes the rows of blobs. Where it is undone they are removed; where nobody knows whether it
    was, they stay."""
    ending = False
    try:
        with server.store.begin() as connection:
            yield connection
            ending = True
    except BaseException:
        if not ending:
            for name in blobs:
                server.blobs.delete(name)
        raise


def find(server: Server, file_id: str, *, param: str = "id") -> dict[str, Any]:
    """A file's row.

    Raises:
        ApiError: 404, there is none (any more).
    """
    with server.store.read() as connection:
        found = store.row(connection, tables.files, id=file_id)
    if found is None or (found["expires_at"] is not None and found["expires_at"] <= now()):
        raise web.not_found("File object", file_id[:128], param=param)
    return found


def remove(server: Server, file_id: str) -> None:
    """Remove a file, its row first; one that is not there is fine."""
    with server.store.begin() as connection:
        connection.execute(delete(tables.files).where(tables.files.c.id == file_id))
    server.blobs.delete(file_id)


def shape(file: dict[str, Any]) -> dict[str, Any]:
    """A file as clients see it. `expires_at` is left out where there is none: it is no nullable number there."""
    shown = {
        "id": file["id"],
        "object": "file",
        "bytes": file["bytes"],
        "created_at": file["created_at"],
        "filename": file["filename"],
        "purpose": file["purpose"],
        "status": "processed",
        "status_details": None,
    }
    if file["expires_at"] is not None:
        shown["expires_at"] = file["expires_at"]
    return shown


def remove_expired(server: Server) -> int:
    """Remove files and uploads whose time is over; gives how many."""
    uploads = tables.uploads
    with server.store.begin() as connection:
        over = list(connection.execute(select(tables.files.c.id).where(~_alive())).scalars())
        connection.execute(delete(tables.files).where(tables.files.c.id.in_(over)))
        query = select(uploads.c.id).where(uploads.c.status.in_(UNSETTLED), uploads.c.expires_at <= now())
        late = list(connection.execute(query).scalars())
    for file_id in over:
        server.blobs.delete(file_id)
    settled = [_found(server, upload_id)["status"] for upload_id in late]
    return len(over) + settled.count("expired")


class _form:
    """A multipart form, its files on disk while they are larger than a megabyte.

    Raises:
        ApiError: the body is no such form.
    """

    def __init__(self, request: Request, *, files: int) -> None:
        self._request = request
        self._files = files

    async def __aenter__(self) -> FormData:
        kind = self._request.headers.get("content-type", "")
        if not kind.lower().startswith("multipart/form-data"):
            raise ApiError(400, "Send the file as multipart/form-data.", code="invalid_content_type")
        self._opened = self._request.form(max_files=self._files, max_fields=16)
        try:
            return await self._opened.__aenter__()
        except HTTPException as error:
            raise ApiError(400, f"The body is no multipart form: {error.detail}", code="invalid_body") from None

    async def __aexit__(self, *raised: Any) -> None:
        await self._opened.__aexit__(*raised)


def _sent_file(form: FormData, name: str) -> UploadFile:
    sent = form.get(name)
    if sent is None:
        raise ApiError(400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    if not isinstance(sent, UploadFile):
        raise ApiError(400, f"Invalid '{name}': send a file, with a file name.", param=name, code="invalid_type")
    return sent


def _chunks(sent: UploadFile) -> Iterator[bytes]:
    sent.file.seek(0)
    while chunk := sent.file.read(CHUNK):
        yield chunk


def _expires_s(form: FormData) -> int | None:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    said = str(seconds)
    if anchor != "created_at" or not re.fullmatch(r"[0-9]{1,9}", said) or not 3600 <= int(said) <= 2592000:
        raise ApiError(
            400,
            "Invalid 'expires_after': anchor is created_at, seconds is from 3600 to 2592000.",
            param="expires_after",
            code="invalid_value",
        )
    return int(said)


def _keep_part(server: Server, upload_id: str, sent: UploadFile) -> dict[str, Any]:
    part: dict[str, Any] = {"id": new_id("part_"), "created_at": now(), "upload_id": upload_id}
    with server.blobs.writing(part["id"]) as writer:
        for chunk in _chunks(sent):
            writer.write(chunk)
        if not 0 < writer.size <= PART_BYTES:
            raise ApiError(
                400, f"A part has 1 to {PART_BYTES >> 20} MB; this has {writer.size} bytes.", param="data",
                code="invalid_value",
            )  # fmt: skip
    uploads = tables.uploads
    pending = select(uploads.c.id).where(uploads.c.id == upload_id, uploads.c.status == "pending").with_for_update()
    with noting(server, part["id"]) as connection:
        if connection.execute(pending).first() is None:
            raise _not_pending(upload_id, "no longer pending")
        connection.execute(insert(tables.parts).values(**part, bytes=writer.size))
    return {**part, "object": "upload.part"}


def _check_parts(server: Server, upload: dict[str, Any], part_ids: list[str]) -> None:
    with server.store.read() as connection:
        query = select(tables.parts.c.id, tables.parts.c.bytes).where(tables.parts.c.upload_id == upload["id"])
        known = {row.id: row.bytes for row in connection.execute(query)}
    for part_id in part_ids:
        if part_id not in known:
            raise ApiError(
                400, f"Upload '{upload['id']}' has no part '{part_id}'.", param="part_ids", code="invalid_value"
            )
    total = sum(known[part_id] for part_id in part_ids)
    if total != upload["bytes"]:
        raise ApiError(
            400,
            f"The parts have {total} bytes, and the upload was declared with {upload['bytes']}.",
            param="part_ids",
            code="invalid_value",
        )


def _put_together(server: Server, upload: dict[str, Any], file_id: str, wanted: CompleteIn) -> dict[str, Any]:
    """Make the file of an upload that was taken for it; gives the file. Where it cannot be made the upload is pending
    again."""
    uploads = tables.uploads
    mine = (uploads.c.status == "completing") & (uploads.c.file_id == file_id)
    chunks = (chunk for part_id in wanted.part_ids for chunk in server.blobs.chunks(part_id))
    expires = {"expires_at": upload["expires_at"]}
    try:
        with _renewed(server, upload["id"], mine):
            row = written(
                server, chunks, upload["filename"], upload["purpose"],
                file_id=file_id, expires_s=upload["file_expires_s"], md5=wanted.md5,
            )  # fmt: skip
            with noting(server, file_id) as connection:
                parts = _end(connection, upload["id"], mine, status="completed", **expires)
                if parts is None:
                    raise _taken(upload)
                connection.execute(insert(tables.files).values(**row))
    except BaseException as error:
        if not _change(server, upload["id"], mine, status="pending", file_id=None, **expires):
            raise _taken(upload) from error
        raise
    for part_id in parts:
        server.blobs.delete(part_id)
    return shape(row)


def _taken(upload: dict[str, Any]) -> ApiError:
    """This server was away for so long that the upload was given back, and what it had written was removed."""
    return _not_pending(upload["id"], "no longer being completed here")


@contextlib.contextmanager
def _renewed(server: Server, upload_id: str, mine: Any) -> Iterator[None]:
    """Say, again and again, that an upload is still being completed."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(COMPLETING_S / 3):
            try:
                _change(server, upload_id, mine, expires_at=now() + COMPLETING_S)
            except SQLAlchemyError:
                logger.exception("the upload %s cannot be renewed", upload_id)

    renewing = threading.Thread(target=renew, name=f"renew {upload_id}", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        over.set()
        renewing.join()


def _pending(server: Server, upload_id: str) -> dict[str, Any]:
    upload = _found(server, upload_id)
    _check_pending(upload)
    return upload


def _check_pending(upload: dict[str, Any]) -> None:
    if upload["status"] == "completing":
        raise _not_pending(upload["id"], "being completed")
    if upload["status"] != "pending":
        raise _not_pending(upload["id"], f"{upload['status']}; make a new one")


def _not_pending(upload_id: str, state: str) -> ApiError:
    return ApiError(400, f"Upload '{upload_id}' is {state}.", param="upload_id", code="invalid_value")


def _found(server: Server, upload_id: str) -> dict[str, Any]:
    """An upload as it is by now: expired, or pending again where the server that was completing it has ended."""
    with server.store.read() as connection:
        upload = store.row(connection, tables.uploads, id=upload_id)
    if upload is None:
        raise web.not_found("Upload", upload_id[:128], param="upload_id")
    if upload["status"] not in UNSETTLED or upload["expires_at"] > now():
        return upload
    if upload["status"] == "pending":
        _end_pending(server, upload_id, status="expired")
    else:
        left = (tables.uploads.c.file_id == upload["file_id"]) & (tables.uploads.c.expires_at <= now())
        left &= tables.uploads.c.status == "completing"
        if _change(server, upload_id, left, status="pending", file_id=None, expires_at=now() + UPLOAD_S):
            server.blobs.delete(upload["file_id"], unfinished=True)
    return _found(server, upload_id)


def _change(server: Server, upload_id: str, where: Any, **values: Any) -> bool:
    """Change an upload that is as `where` says; gives whether it was."""
    changed = update(tables.uploads).where(tables.uploads.c.id == upload_id, where).values(**values)
    with server.store.begin() as connection:
        return bool(connection.execute(changed).rowcount)


def _end_pending(server: Server, upload_id: str, *, status: str) -> bool:
    """Settle an upload that is pending, and let go of its parts; gives whether it was."""
    with server.store.begin() as connection:
        parts = _end(connection, upload_id, tables.uploads.c.status == "pending", status=status)
    for part_id in parts or ():
        server.blobs.delete(part_id)
    return parts is not None


def _end(connection: Connection, upload_id: str, where: Any, **values: Any) -> list[str] | None:
    """Settle an upload that is as `where` says; gives the parts that go with it, None where it is otherwise."""
    changed = update(tables.uploads).where(tables.uploads.c.id == upload_id, where).values(**values)
    if not connection.execute(changed).rowcount:
        return None
    gone = delete(tables.parts).where(tables.parts.c.upload_id == upload_id).returning(tables.parts.c.id)
    return list(connection.execute(gone).scalars())


def _upload_shape(upload: dict[str, Any], file: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "id": upload["id"],
        "object": "upload",
        "bytes": upload["bytes"],
        "created_at": upload["created_at"],
        "filename": upload["filename"],
        "purpose": upload["purpose"],
        "status": upload["status"],
        "expires_at": upload["expires_at"],
        "file": file,
    }


def _plain_name(name: str) -> str:
    """The last part of a path, without characters that a terminal or a header would act on, or that no text has."""
    last = re.split(r"[/\\]", name)[-1]
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", "_", last)[:255] or "file"


def _disposition(name: str) -> str:
    """The header that says under which name to keep a file: in ASCII for all, and as it is for those who read that."""
    plain = re.sub(r'[^\x20-\x7e]|["\\%]', "_", name)
    said = f'attachment; filename="{plain}"'
    return said if plain == name else f"{said}; filename*=UTF-8''{quote(name, safe='')}"


def _alive() -> Any:
    return or_(tables.files.c.expires_at.is_(None), tables.files.c.expires_at > now())
