"""Files and uploads as the openai SDK makes them, and as nobody should."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import openai
import psutil
import pytest
from sqlalchemy import update

from server_running import Running
from tunewright.server import files, limits, tables

ROWS = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 12


def post(served: Running, path: str, body: bytes, kind: str, **headers: str) -> tuple[int, bytes]:
    """A request that no SDK makes."""
    host = urlsplit(served.url)
    connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=30)
    try:
        given = {"authorization": f"Bearer {served.key}", "content-type": kind} | headers
        connection.request("POST", path, body, given)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def form(*parts: tuple[str, str | None, bytes]) -> tuple[bytes, str]:
    """A multipart body of (name, file name, bytes)."""
    lines = []
    for name, filename, value in parts:
        file = f'; filename="{filename}"' if filename is not None else ""
        lines.append(
            f'--edge\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + value + b"\r\n"
        )
    return b"".join(lines) + b"--edge--\r\n", "multipart/form-data; boundary=edge"


def test_the_life_of_a_file(served: Running) -> None:
    client = served.client()
    made = client.files.create(file=("train.jsonl", ROWS), purpose="fine-tune")
    assert (made.object, made.bytes, made.filename, made.status) == ("file", len(ROWS), "train.jsonl", "processed")
    assert made.expires_at is None
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == ROWS
    assert client.files.wait_for_processing(made.id) == made
    assert [one.id for one in client.files.list(purpose="fine-tune")] == [made.id]
    assert client.files.list(purpose="batch").data == []
    assert client.files.delete(made.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    assert list((served.server.settings.data / "files").iterdir()) == []


def test_azure_has_the_same_files(served: Running) -> None:
    made = served.azure().files.create(file=("train.jsonl", ROWS), purpose="fine-tune")
    assert served.client().files.retrieve(made.id).filename == "train.jsonl"


def test_pages(served: Running) -> None:
    client = served.client()
    made = [client.files.create(file=(f"{n}.jsonl", ROWS), purpose="fine-tune").id for n in range(5)]
    first = client.files.list(limit=2)
    assert [one.id for one in first.data] == made[:-3:-1]
    assert first.has_more
    assert [one.id for one in client.files.list(limit=2)] == made[::-1]  # the SDK asks page by page
    assert [one.id for one in client.files.list(order="asc", after=made[1])] == made[2:]
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.list(after="file-none")
    assert refused.value.param == "after"


def test_a_file_expires(served: Running) -> None:
    client = served.client()
    made = client.files.create(
        file=("a.jsonl", ROWS), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.expires_at == made.created_at + 3600
    with served.server.store.begin() as connection:
        connection.execute(update(tables.files).values(expires_at=1))
    assert client.files.list().data == []
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    assert files.remove_expired(served.server) == 1
    assert list((served.server.settings.data / "files").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("na\u00efve \u4f60.jsonl", "na\u00efve \u4f60.jsonl"),
        ("/", "file"),
    ],
)
def test_names_stay_names(served: Running, name: str, shown: str) -> None:
    made = served.client().files.create(file=(name, ROWS), purpose="fine-tune")
    assert made.filename == shown
    assert [path.name for path in (served.server.settings.data / "files").iterdir()] == [made.id]


@pytest.mark.parametrize(
    ("name", "charset", "shown"),
    [
        (b"a\x01\x1b[2Jb.jsonl", "", "a__[2Jb.jsonl"),
        (b"x" * 3000, "", "x" * 255),
        ("\u202etxt.\U0001f600".encode(), "", "\u202etxt.\U0001f600"),
        ("a\u0085b\u2028c".encode(), "", "a_b_c"),
        (b"\xff\xfe", "", "\u00ff\u00fe"),
        (b"+2AA-half", "; charset=utf-7", "_half"),
        (b"..", "", ".."),
        (b"%0d%0ax-injected: yes", "", "%0d%0ax-injected: yes"),
        (b"a;b,c='d'", "", "a;b,c='d'"),
    ],
)
def test_names_that_no_sdk_sends(served: Running, name: bytes, charset: str, shown: str) -> None:
    body, kind = form(("purpose", None, b"fine-tune"), ("file", "NAME", ROWS))
    status, said = post(served, "/v1/files", body.replace(b"NAME", name), kind + charset)
    assert status == 200, said
    made = json.loads(said)
    assert made["filename"] == shown
    assert [path.name for path in (served.server.settings.data / "files").iterdir()] == [made["id"]]
    client = served.client()
    assert client.files.retrieve(made["id"]).filename == shown
    headers = client.files.with_raw_response.content(made["id"]).headers
    assert "x-injected" not in headers
    _, _, kept = headers["content-disposition"].partition("filename*=UTF-8''")
    plain = headers["content-disposition"].removeprefix('attachment; filename="').partition('"')[0]
    assert plain.isascii()
    assert unquote(kept) == shown if kept else plain == shown


def test_a_name_that_is_longer_than_any_is_refused(served: Running) -> None:
    status, said = post(served, "/v1/files", *form(("purpose", None, b"fine-tune"), ("file", "x" * 10_000, ROWS)))
    assert status == 400
    assert openai_error(said)["code"] == "invalid_body"
    assert list((served.server.settings.data / "files").iterdir()) == []


@pytest.mark.parametrize("seconds", ["\u00b2", "9" * 5000, "-1", "1e9", "3600.5", "", "nan"])
def test_times_that_are_none(served: Running, seconds: str) -> None:
    expires = ("expires_after[anchor]", None, b"created_at"), ("expires_after[seconds]", None, seconds.encode())
    status, said = post(served, "/v1/files", *form(("purpose", None, b"batch"), ("file", "a", ROWS), *expires))
    assert status == 400, said
    assert openai_error(said)["param"] == "expires_after"


def test_what_is_no_upload_is_said_to_be_none(served: Running) -> None:
    file = ("file", "a.jsonl", ROWS)
    cases = [
        (form(file), "purpose"),
        (form(("purpose", None, b"fine-tune")), "file"),
        (form(file, ("purpose", None, b"dreams")), "purpose"),
        (form(("file", None, ROWS), ("purpose", None, b"fine-tune")), "file"),
        (form(("file", "a.jsonl", b""), ("purpose", None, b"fine-tune")), "file"),
        ((b"{}", "application/json"), None),
        ((b"nothing of the kind", "multipart/form-data; boundary=edge"), None),
        ((b"nothing of the kind", "multipart/form-data"), None),
        (form(file, ("purpose", None, b"fine-tune"), ("expires_after[anchor]", None, b"now")), "expires_after"),
    ]
    for (body, kind), param in cases:
        status, said = post(served, "/v1/files", body, kind)
        assert status == 400, said
        error = openai_error(said)
        assert param in (None, error["param"]), said
    assert served.client().files.list().data == []


def openai_error(body: bytes) -> dict[str, object]:
    error: dict[str, object] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_too_large_is_refused_before_it_is_sent(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header alone is judged: the client hears it while its body is still unsent."""
    monkeypatch.setattr(limits, "DISCARD_S", 0.2)
    host = urlsplit(served.url)
    for path, size in (("/v1/files", 2 << 30), ("/v1/fine_tuning/jobs", 100 << 20)):
        connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=10)
        connection.putrequest("POST", path)
        connection.putheader("authorization", f"Bearer {served.key}")
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", str(size))
        connection.endheaders()
        reply = connection.getresponse()
        assert reply.status == 413
        assert openai_error(reply.read())["code"] == "request_too_large"
        connection.close()


def test_a_body_that_does_not_say_how_large_it_is_is_counted(served: Running) -> None:
    host = urlsplit(served.url)
    connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=30)
    chunks = (b"x" * (1 << 20) for _ in range(40))
    headers = {"authorization": f"Bearer {served.key}", "content-type": "application/json"}
    try:
        connection.request("POST", "/v1/fine_tuning/jobs", chunks, headers, encode_chunked=True)
        reply = connection.getresponse()
        assert reply.status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server stopped listening in the middle of it, which is the point
    finally:
        connection.close()
    assert served.client().files.list().data == []


def test_an_upload_in_parts(served: Running) -> None:
    client = served.client()
    whole = os.urandom(3000)
    upload = client.uploads.create(bytes=3000, filename="big.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    assert upload.status == "pending"
    parts = [client.uploads.parts.create(upload.id, data=whole[at : at + 1000]) for at in (0, 1000, 2000)]
    done = client.uploads.complete(upload.id, part_ids=[part.id for part in parts], md5=hashlib.md5(whole).hexdigest())
    assert done.status == "completed"
    assert done.file is not None
    assert client.files.content(done.file.id).read() == whole
    assert len(list((served.server.settings.data / "files").iterdir())) == 1  # the parts are gone
    with pytest.raises(openai.BadRequestError, match="completed"):
        client.uploads.cancel(upload.id)


def test_the_sdk_uploads_in_chunks(served: Running, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(ROWS)
    done = served.client().uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=500
    )
    assert done.file is not None
    assert served.client().files.content(done.file.id).read() == ROWS


def test_uploads_that_do_not_add_up(served: Running) -> None:
    client = served.client()
    upload = client.uploads.create(bytes=10, filename="a", mime_type="text/jsonl", purpose="fine-tune")
    part = client.uploads.parts.create(upload.id, data=b"12345")
    for ids, what in (([part.id], "declared with 10"), (["part_none"], "no part"), ([part.id, part.id], "MD5")):
        with pytest.raises(openai.BadRequestError, match=what):
            client.uploads.complete(upload.id, part_ids=ids, md5="0" * 32)
    assert client.uploads.cancel(upload.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.uploads.parts.create(upload.id, data=b"1")
    with pytest.raises(openai.NotFoundError):
        client.uploads.cancel("upload_none")


def test_an_upload_that_waits_too_long_expires(served: Running) -> None:
    client = served.client()
    upload = client.uploads.create(bytes=5, filename="a", mime_type="text/jsonl", purpose="fine-tune")
    client.uploads.parts.create(upload.id, data=b"12345")
    with served.server.store.begin() as connection:
        connection.execute(update(tables.uploads).values(expires_at=int(time.time()) - 1))
    assert files.remove_expired(served.server) == 1
    with pytest.raises(openai.BadRequestError, match="expired"):
        client.uploads.cancel(upload.id)
    assert list((served.server.settings.data / "files").iterdir()) == []


class Held:
    """Holds the bytes of blobs back until it is let go on."""

    def __init__(self, served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self._chunks = served.server.blobs.chunks
        monkeypatch.setattr(served.server.blobs, "chunks", self.chunks)

    def chunks(self, name: str) -> Iterator[bytes]:
        self.begun.set()
        assert self.go_on.wait(30)
        yield from self._chunks(name)


def test_an_upload_is_completed_once(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its parts are copied nobody else completes, cancels or lengthens it; asked again it is the same."""
    monkeypatch.setattr(files, "COMPLETING_S", 3)
    client = served.client()
    upload = client.uploads.create(bytes=5, filename="a", mime_type="text/jsonl", purpose="fine-tune")
    part = client.uploads.parts.create(upload.id, data=b"12345").id
    held = Held(served, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.uploads.complete, upload.id, part_ids=[part])
        assert held.begun.wait(30)
        time.sleep(4)  # longer than it is believed without a word
        try:
            assert files.remove_expired(served.server) == 0
            with pytest.raises(openai.BadRequestError, match="being completed"):
                client.uploads.complete(upload.id, part_ids=[part])
            with pytest.raises(openai.BadRequestError, match="being completed"):
                client.uploads.cancel(upload.id)
            with pytest.raises(openai.BadRequestError, match="being completed"):
                client.uploads.parts.create(upload.id, data=b"6")
        finally:
            held.go_on.set()
        done = first.result(30)
    again = client.uploads.complete(upload.id, part_ids=[part])
    assert done.file is not None
    assert done.expires_at == upload.expires_at
    assert again == done
    assert client.files.content(done.file.id).read() == b"12345"
    assert [path.name for path in (served.server.settings.data / "files").iterdir()] == [done.file.id]


@pytest.mark.parametrize("ending", ["cancel", "complete"])
def test_a_part_that_comes_too_late_leaves_nothing(
    served: Running, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    client = served.client()
    upload = client.uploads.create(bytes=5, filename="a", mime_type="text/jsonl", purpose="fine-tune")
    part = client.uploads.parts.create(upload.id, data=b"12345").id
    chunks = files._chunks

    def late(sent: Any) -> Iterator[bytes]:
        yield from chunks(sent)
        if ending == "cancel":
            client.uploads.cancel(upload.id)
        else:
            client.uploads.complete(upload.id, part_ids=[part])

    monkeypatch.setattr(files, "_chunks", late)
    with pytest.raises(openai.BadRequestError, match="no longer pending"):
        client.uploads.parts.create(upload.id, data=b"6")
    assert len(list((served.server.settings.data / "files").iterdir())) == (ending == "complete")


def test_an_upload_whose_server_was_killed_is_completed_by_the_next(served: Running) -> None:
    client = served.client()
    upload = client.uploads.create(bytes=5, filename="a", mime_type="text/jsonl", purpose="fine-tune")
    part = client.uploads.parts.create(upload.id, data=b"12345").id
    folder = served.server.settings.data / "files"
    for left in ("file-dead", ".file-dead.half"):
        (folder / left).write_bytes(b"123")
    with served.server.store.begin() as connection:
        heard = {"status": "completing", "file_id": "file-dead", "expires_at": int(time.time()) - 1}
        connection.execute(update(tables.uploads).values(**heard))
    assert files.remove_expired(served.server) == 0
    done = client.uploads.complete(upload.id, part_ids=[part])
    assert done.file is not None
    assert [path.name for path in folder.iterdir()] == [done.file.id]


def test_an_upload_that_was_taken_from_a_slow_server_is_not_made_twice(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = served.client()
    upload = client.uploads.create(bytes=5, filename="a", mime_type="text/jsonl", purpose="fine-tune")
    part = client.uploads.parts.create(upload.id, data=b"12345").id
    held = Held(served, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(client.uploads.complete, upload.id, part_ids=[part])
        assert held.begun.wait(30)
        with served.server.store.begin() as connection:
            connection.execute(update(tables.uploads).values(expires_at=int(time.time()) - 1))
        assert files.remove_expired(served.server) == 0  # it waits again
        held.go_on.set()
        with pytest.raises(openai.BadRequestError, match="no longer being completed"):
            slow.result(30)
    assert client.files.list().data == []
    done = client.uploads.complete(upload.id, part_ids=[part])
    assert done.file is not None
    assert [path.name for path in (served.server.settings.data / "files").iterdir()] == [done.file.id]


def test_a_large_file_takes_no_more_memory(served: Running) -> None:
    """Twice the bytes, no more at the peak than a part of the difference."""
    process = psutil.Process()

    def grown(megabytes: int) -> int:
        before = process.memory_info().rss
        body = Zeros(megabytes << 20)
        status = urllib.request.urlopen(
            urllib.request.Request(
                f"{served.url}/v1/files",
                data=body,  # type: ignore[arg-type]
                headers={
                    "authorization": f"Bearer {served.key}",
                    "content-type": "multipart/form-data; boundary=edge",
                    "content-length": str(body.size),
                },
            )
        ).status
        assert status == 200
        return process.memory_info().rss - before

    grown(8)  # what the first upload allocates once
    assert grown(96) < 48 << 20
    assert {one.bytes for one in served.client().files.list()} == {8 << 20, 96 << 20}


class Zeros(io.RawIOBase):
    """A form with a file of zeros, made while it is read."""

    def __init__(self, size: int) -> None:
        head, kind = form(("purpose", None, b"batch"), ("file", "z", b""))
        self.head, self.tail = head[: -len(b"\r\n--edge--\r\n")], b"\r\n--edge--\r\n"
        self.left = [self.head, size, self.tail]
        self.size = len(self.head) + size + len(self.tail)
        assert kind.endswith("edge")

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while self.left:
            now = self.left[0]
            if isinstance(now, bytes):
                self.left.pop(0)
                return now
            take = min(now, 1 << 16)
            self.left[0] = now - take
            if not self.left[0]:
                self.left.pop(0)
            return bytes(take)
        return b""


def test_what_nobody_offers(served: Running) -> None:
    for method, path, code in (("GET", "/v1/dreams", "unknown_url"), ("PATCH", "/v1/files", "method_not_supported")):
        request = urllib.request.Request(f"{served.url}{path}", method=method)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        with refused.value as reply:
            assert json.load(reply)["error"]["code"] == code
