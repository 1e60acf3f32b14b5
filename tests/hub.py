"""A small hub on loopback that stands in for huggingface.co, so that the real client code runs unchanged in tests.

What is covered: reading. Models and datasets by name, by an alias that redirects to the canonical name (`gpt2` to
`openai-community/gpt2`), by branch `main` or by commit; file listings; downloads by HEAD, GET and Range, with small
files behind `/api/resolve-cache` and large ones behind a redirect to another origin, as the real hub has them; and the
hub's own errors. `Hub.requests` is what was asked, `Hub.fail_next` makes the next answers fail.

What is not covered: writing, tokens, private and gated repositories, tags and pull requests, search, Xet, the dataset
viewer. Any other path is answered with 404. It is a test double: no TLS, no limits, loopback only.

How to use it:

    with Hub() as hub:
        hub.add_model("openai-community/gpt2", folder, aliases=["gpt2"])
        subprocess.run([sys.executable, "-c", script], env=hub.environment(tmp_path / "home"))

The clients read their settings when they are imported, so a test runs them in a fresh process. `Hub.environment` gives
it what it needs:

- `HF_ENDPOINT` (this server) and `HF_HOME` (an empty folder: no cache, no token);
- `HTTP_PROXY` and `HTTPS_PROXY` (this server again) with `NO_PROXY` for loopback, in both spellings. A request to
  any other host then ends here, in the log and with 404, and no name is looked up. `load_dataset` makes one: it asks
  the dataset viewer at `datasets-server.` in front of the endpoint's host, and takes the 404 for "no viewer";
- `HF_HUB_DISABLE_TELEMETRY=1`, and `HF_UPDATE_DOWNLOAD_COUNTS=0`, without which `load_dataset` tells s3.amazonaws.com
  what was loaded.

Settings of the calling process that would lead past these (`HF_HUB_CACHE`, `HF_TOKEN`, `HF_HUB_OFFLINE` and their kin)
are left out. `HF_HUB_DISABLE_XET=1` is not needed, as no answer mentions Xet. To load once more from the cache alone,
add `HF_HUB_OFFLINE=1`.

One thing no hub can help: in datasets 5.2.0, `load_dataset("imdb")` fetches the card by that name and then fails by
itself, as its `hf://` addresses need a namespace (issue 8612 of huggingface/datasets, reported of the real hub).
`HfApi().dataset_info("imdb").id` gives the name with which it works.

Two writers below make repositories like the two that everybody starts with: `write_tiny_gpt2` and `write_imdb`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import yaml

DATE = "2024-01-01T00:00:00.000Z"
"""When every commit was made. Made up, and the same everywhere so that nothing here depends on the clock."""

LFS_SUFFIXES = frozenset({".arrow", ".bin", ".gguf", ".gz", ".h5", ".model", ".npz", ".parquet", ".pt", ".safetensors"})
"""Files that git-lfs keeps, as in the `.gitattributes` of a new repository on the hub."""

# A name has one or two parts; the lazy `??` takes one where what follows fits.
_NAME = r"(?P<name>[^/]+(?:/[^/]+)??)"
_RESOLVE = re.compile(rf"/(?:(?P<kind>datasets)/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_RESOLVE_CACHE = re.compile(
    rf"/api/resolve-cache/(?P<kind>models|datasets)/{_NAME}/(?P<revision>[0-9a-f]{{40}})/(?P<path>.+)"
)
_API = re.compile(
    rf"/api/(?P<kind>models|datasets)/{_NAME}"
    r"(?:/(?P<verb>refs|revision|tree|paths-info)(?:/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?)?"
)
_LFS = re.compile(r"/lfs/(?P<sha256>[0-9a-f]{64})")


class Request(NamedTuple):
    """One line of `Hub.requests`. `path` is as it was sent, with its query."""

    method: str
    path: str
    status: int


class Hub:
    """The server. Use it as a context manager; folders may be added before and after it has started.

    A folder is read into memory when it is added, and is free to change after that. Adding the changed folder under
    the same name makes a new commit: `main` moves there and the old commit stays.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._repos: dict[tuple[str, str], _Repo] = {}
        self._aliases: dict[tuple[str, str], str] = {}
        self._large: dict[str, _File] = {}
        self._faults: list[tuple[str, int]] = []
        self._lock = threading.Lock()
        # Large files come from a second port, which is another origin to a client, like the real hub's storage.
        self._front = _Server(self)
        self._storage = _Server(self)

    @property
    def url(self) -> str:
        """The value for `HF_ENDPOINT`."""
        return self._front.url

    def __enter__(self) -> Hub:
        self._front.start()
        self._storage.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._front.close()
        self._storage.close()

    def add_model(self, name: str, folder: Path, aliases: Iterable[str] = ()) -> str:
        """Serve every file of `folder` as the model `name`. Returns the commit that `main` now is."""
        return self._add("models", name, folder, aliases)

    def add_dataset(self, name: str, folder: Path, aliases: Iterable[str] = ()) -> str:
        """Serve every file of `folder` as the dataset `name`. Returns the commit that `main` now is."""
        return self._add("datasets", name, folder, aliases)

    def fail_next(self, n: int, status: int = 500, path: str = "") -> None:
        """Answer the next `n` requests whose path contains `path` with `status`, whatever they ask for.

        Clients retry 429 and 5xx with growing pauses in many places; one failure at a time keeps a test fast.
        """
        with self._lock:
            self._faults.extend([(path, status)] * n)

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment for a process that shall use this hub, with its caches under `home`; `more` is added."""
        misleading = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(misleading)}
        proxies = {"HTTP_PROXY": self.url, "HTTPS_PROXY": self.url, "ALL_PROXY": "", "NO_PROXY": "127.0.0.1,localhost"}
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            **proxies,
            **{name.lower(): value for name, value in proxies.items()},
        }
        return {**kept, **ours, **more}

    def _add(self, kind: str, name: str, folder: Path, aliases: Iterable[str]) -> str:
        files = {path.relative_to(folder).as_posix(): _File.read(path) for path in _regular_files(folder)}
        if not files:
            raise FileNotFoundError(f"{folder} has no files to serve as {name}")
        listing = "".join(f"{path} {file.oid}\n" for path, file in files.items())
        sha = _sha1(f"{kind}/{name}\n{listing}".encode())
        with self._lock:
            repo = self._repos.setdefault((kind, name), _Repo(kind, name))
            repo.commits[sha] = files
            repo.main = sha
            self._aliases.update({(kind, alias): name for alias in aliases})
            self._large.update({file.sha256: file for file in files.values() if file.sha256})
        return sha

    def _answer(self, method: str, target: str, asked_range: str | None, body: bytes) -> _Reply:
        with self._lock:
            reply = self._fault(target) or self._route(method, target, asked_range, body)
            self.requests.append(Request(method, target, reply.status))
        return reply

    def _fault(self, target: str) -> _Reply | None:
        for fault in self._faults:
            if fault[0] in target:
                self._faults.remove(fault)
                return _error(fault[1], "", f"this hub was told to fail with {fault[1]}")
        return None

    def _route(self, method: str, target: str, asked_range: str | None, body: bytes) -> _Reply:
        path, _, query = target.partition("?")
        if match := _LFS.fullmatch(path):
            file = self._large.get(match["sha256"])
            return file.part(asked_range) if file else _error(404, "", "no such object")
        match = _RESOLVE_CACHE.fullmatch(path) or _API.fullmatch(path) or _RESOLVE.fullmatch(path)
        if match is None:
            return _error(404, "", f"this hub has nothing at {path}")

        asked = {key: unquote(value) for key, value in match.groupdict().items() if value}
        kind, name = asked.get("kind", "models"), asked["name"]
        if canonical := self._aliases.get((kind, name)):
            # What a client sends after this carries the canonical name, in place of the alias.
            start, end = match.span("name")
            return _Reply(307, {"Location": target[:start] + quote(canonical) + target[end:]})
        repo = self._repos.get((kind, name))
        if repo is None:
            return _error(404, "RepoNotFound", "Repository not found")
        revision = asked.get("revision", "main")
        sha = repo.main if revision == "main" else revision
        if sha not in repo.commits:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit = _Commit(repo, sha)

        if match.re is _RESOLVE:
            return commit.resolve(asked["path"], self._storage.url)
        if match.re is _RESOLVE_CACHE:
            return commit.cached(asked["path"], asked_range)
        query_or_form = parse_qs(body.decode() if method == "POST" else query)
        expand = _is_true(query_or_form, "expand")
        match asked.get("verb"):
            case "tree":
                return commit.tree(asked.get("path", ""), recursive=_is_true(query_or_form, "recursive"), expand=expand)
            case "paths-info":
                return commit.paths_info(query_or_form.get("paths", []), expand=expand)
            case "refs":
                return commit.refs()
            case _:
                return commit.info(blobs=_is_true(query_or_form, "blobs"))


@dataclass
class _Repo:
    kind: str
    name: str
    main: str = ""
    commits: dict[str, dict[str, _File]] = field(default_factory=dict)


@dataclass(frozen=True)
class _File:
    content: bytes = field(repr=False)
    oid: str
    """What git calls the file's content: a hash of it, or of the pointer that stands for it in git-lfs."""
    sha256: str | None
    """Only for a file that git-lfs keeps."""

    @staticmethod
    def read(path: Path) -> _File:
        content = path.read_bytes()
        if path.suffix not in LFS_SUFFIXES:
            return _File(content, _git_oid(content), None)
        sha256 = hashlib.sha256(content).hexdigest()
        return _File(content, _git_oid(_lfs_pointer(sha256, len(content))), sha256)

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def etag(self) -> str:
        return f'"{self.sha256 or self.oid}"'

    def lfs(self, name_of_hash: str) -> dict[str, Any]:
        """The `lfs` entry of a listing. The hash is called `oid` in a tree and `sha256` among the siblings."""
        if self.sha256 is None:
            return {}
        pointer_size = len(_lfs_pointer(self.sha256, self.size))
        return {"lfs": {name_of_hash: self.sha256, "size": self.size, "pointerSize": pointer_size}}

    def part(self, asked_range: str | None, headers: Mapping[str, str] | None = None) -> _Reply:
        """The content, or the one byte range that was asked for. Several ranges at once get the whole content."""
        headers = {"ETag": self.etag, "Accept-Ranges": "bytes", **(headers or {})}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked_range or "")
        if match is None or match.group() == "bytes=-":
            return _Reply(200, headers, self.content)
        if match[1]:
            start = int(match[1])
            end = min(int(match[2]) + 1, self.size) if match[2] else self.size
        else:
            start, end = max(self.size - int(match[2]), 0), self.size
        if start >= end:
            return _error(416, "", "range not satisfiable", {"Content-Range": f"bytes */{self.size}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{self.size}"
        return _Reply(206, headers, self.content[start:end])


@dataclass(frozen=True)
class _Reply:
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class _Commit:
    """One commit of one repository, and what the hub says about it."""

    repo: _Repo
    sha: str

    @property
    def files(self) -> dict[str, _File]:
        return self.repo.commits[self.sha]

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Repo-Commit": self.sha}

    def resolve(self, path: str, storage_url: str) -> _Reply:
        file = self.files.get(path)
        if file is None:
            return self._no_entry(path)
        linked = {**self.headers, "X-Linked-Size": str(file.size), "X-Linked-Etag": file.etag}
        if file.sha256:
            return _Reply(302, {**linked, "Location": f"{storage_url}/lfs/{file.sha256}"})
        place = f"/api/resolve-cache/{self.repo.kind}/{quote(self.repo.name)}/{self.sha}/{quote(path)}"
        return _Reply(307, {**linked, "Location": place})

    def cached(self, path: str, asked_range: str | None) -> _Reply:
        file = self.files.get(path)
        return file.part(asked_range, self.headers) if file else self._no_entry(path)

    def info(self, *, blobs: bool) -> _Reply:
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in self.files]
        if blobs:
            for sibling, file in zip(siblings, self.files.values(), strict=True):
                sibling.update({"size": file.size, "blobId": file.oid, **file.lfs("sha256")})
        said: dict[str, Any] = {
            "_id": _sha1(self.repo.name.encode())[:24],
            "id": self.repo.name,
            "author": self.repo.name.partition("/")[0],
            "sha": self.sha,
            "createdAt": DATE,
            "lastModified": DATE,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
        if card := self.files.get("README.md"):
            said["cardData"] = _front_matter(card.content.decode())
        if self.repo.kind == "models":
            said["modelId"] = self.repo.name
            if config := self.files.get("config.json"):
                full = json.loads(config.content)
                said["config"] = {key: full[key] for key in ("architectures", "model_type") if key in full}
        return _json(said, self.headers)

    def refs(self) -> _Reply:
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": self.sha}
        return _json({"branches": [main], "converts": [], "tags": [], "pullRequests": []}, self.headers)

    def tree(self, folder: str, *, recursive: bool, expand: bool) -> _Reply:
        if folder and folder not in self._folders():
            return self._no_entry(folder)
        inside = f"{folder}/" if folder else ""
        paths = [path for path in sorted([*self._folders(), *self.files]) if path.startswith(inside)]
        if not recursive:
            paths = [path for path in paths if "/" not in path.removeprefix(inside)]
        return _json([self._entry(path, expand=expand) for path in paths], self.headers)

    def paths_info(self, paths: Iterable[str], *, expand: bool) -> _Reply:
        """Like the real hub: a path that does not exist is left out, without an error."""
        known = [path for path in paths if path in self.files or path in self._folders()]
        return _json([self._entry(path, expand=expand) for path in known], self.headers)

    def _folders(self) -> set[str]:
        return {parent.as_posix() for path in self.files for parent in Path(path).parents} - {"."}

    def _entry(self, path: str, *, expand: bool) -> dict[str, Any]:
        last = {"lastCommit": {"id": self.sha, "title": "Add files", "date": DATE}} if expand else {}
        if file := self.files.get(path):
            return {"type": "file", "path": path, "size": file.size, "oid": file.oid, **file.lfs("oid"), **last}
        below = "".join(f"{name} {file.oid}\n" for name, file in self.files.items() if name.startswith(f"{path}/"))
        return {"type": "directory", "path": path, "size": 0, "oid": _sha1(below.encode()), **last}

    def _no_entry(self, path: str) -> _Reply:
        # With the commit, a client may remember that the file is not there.
        return _error(404, "EntryNotFound", f"Entry not found: {path}", self.headers)


def _regular_files(folder: Path) -> list[Path]:
    """Every file, in the order of its path, but not what git or a download left beside them."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    left = {".git", ".cache"}
    return sorted(p for p in folder.rglob("*") if p.is_file() and not left & set(p.relative_to(folder).parts))


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _git_oid(content: bytes) -> str:
    return _sha1(b"blob %d\0" % len(content) + content)


def _lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _is_true(values: Mapping[str, list[str]], key: str) -> bool:
    return values.get(key, [""])[-1].lower() in ("true", "1")


def _front_matter(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    return dict(yaml.safe_load(match[1]) or {}) if match else {}


def _json(value: object, headers: Mapping[str, str], status: int = 200) -> _Reply:
    return _Reply(status, {"Content-Type": "application/json; charset=utf-8", **headers}, json.dumps(value).encode())


def _error(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> _Reply:
    named = {"X-Error-Code": code} if code else {}
    return _json({"error": message}, {**named, "X-Error-Message": message, **(headers or {})}, status)


class _Server(ThreadingHTTPServer):
    """One port of the hub. It ends the connections that clients keep alive, so that closing leaves nothing open."""

    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._open: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        for connection in list(self._open):
            with suppress(OSError):  # The client may have been first.
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self._open.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away is its own affair; everything else is a fault of this file and is printed.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Head and body are two packets; without this, each answer waits 40 ms.

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        reply = self.server.hub._answer(self.command, self.path, self.headers.get("Range"), body)
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_HEAD = do_GET
    do_POST = do_GET
    do_CONNECT = do_GET  # What a client asks of a proxy before it speaks TLS to another host. It gets a 404.

    def log_message(self, format: str, *args: object) -> None:
        pass  # `Hub.requests` is the log.


def shared_folder() -> Path | None:
    """Where the shared data are: `TUNEWRIGHT_SHARED`, or `shared` beside the repository. None where there are none."""
    named = os.environ.get("TUNEWRIGHT_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    return folder if folder.is_dir() else None


def write_tiny_gpt2(
    folder: Path,
    tokenizer_folder: Path,
    *,
    n_layer: int = 2,
    n_embd: int = 64,
    n_positions: int = 1024,
    seed: int = 0,
) -> None:
    """Write a repository like `openai-community/gpt2` with the real tokenizer and small random weights.

    Like the real one: `config.json` as it was written years ago, no padding token, a `tokenizer_config.json` that says
    only the length, `vocab.json` and `merges.txt` beside `tokenizer.json`, tensors named without the `transformer.` in
    front, no `lm_head` (it is the embedding). Only the sizes and the numbers differ, and the numbers are drawn as
    training from scratch would draw them. `n_embd` must be even: there are two heads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer_folder.iterdir():
        shutil.copyfile(file, folder / file.name)
    bpe = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"])
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")

    end_of_text = bpe["vocab"]["<|endoftext|>"]
    config = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": end_of_text,
        "embd_pdrop": 0.1,
        "eos_token_id": end_of_text,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": n_positions,
        "n_embd": n_embd,
        "n_head": 2,
        "n_layer": n_layer,
        "n_positions": n_positions,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": len(bpe["vocab"]),
    }
    settings = {
        "config.json": config,
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
        },
        "tokenizer_config.json": {"model_max_length": n_positions},
    }
    for name, values in settings.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    weights = _gpt2_weights(len(bpe["vocab"]), n_positions, n_embd, n_layer, seed)
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _gpt2_weights(
    vocab_size: int, n_positions: int, n_embd: int, n_layer: int, seed: int
) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    random = np.random.default_rng(seed)

    def normal(*shape: int, std: float = 0.02) -> np.ndarray[Any, np.dtype[np.float32]]:
        return random.standard_normal(shape, dtype=np.float32) * np.float32(std)

    def norm(name: str) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        return {f"{name}.weight": np.ones(n_embd, np.float32), f"{name}.bias": np.zeros(n_embd, np.float32)}

    weights = {"wte.weight": normal(vocab_size, n_embd), "wpe.weight": normal(n_positions, n_embd)}
    for layer in range(n_layer):
        # GPT-2 keeps its matrices as inputs by outputs, and makes those that write to the residual stream smaller.
        linear = {
            "attn.c_attn": normal(n_embd, 3 * n_embd),
            "attn.c_proj": normal(n_embd, n_embd, std=0.02 / (2 * n_layer) ** 0.5),
            "mlp.c_fc": normal(n_embd, 4 * n_embd),
            "mlp.c_proj": normal(4 * n_embd, n_embd, std=0.02 / (2 * n_layer) ** 0.5),
        }
        for name, matrix in linear.items():
            weights[f"h.{layer}.{name}.weight"] = matrix
            weights[f"h.{layer}.{name}.bias"] = np.zeros(matrix.shape[1], np.float32)
        weights |= norm(f"h.{layer}.ln_1") | norm(f"h.{layer}.ln_2")
    return weights | norm("ln_f")


_IMDB_LABELS = {"negative": 0, "positive": 1}


def write_imdb(folder: Path, source_folder: Path) -> None:
    """Write a repository like `stanfordnlp/imdb` from the rows of `imdb-cad` (`original_train`, `original_test`).

    Like the real one: parquet under `plain_text/`, a card whose front matter declares the features, the label a
    `ClassLabel` of neg and pos, and in each split all negative reviews before all positive ones. The real one has a
    third split, `unsupervised`, which is left out.
    """
    (folder / "plain_text").mkdir(parents=True, exist_ok=True)
    label_type = {"names": ["neg", "pos"], "_type": "ClassLabel"}
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": label_type}
    schema = pa.schema({"text": pa.string(), "label": pa.int64()}).with_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    splits = []
    download_size = 0
    for split in ("train", "test"):
        with (source_folder / f"original_{split}.jsonl").open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        numbered = [{"text": row["text"], "label": _IMDB_LABELS[row["label"]]} for row in rows]
        table = pa.Table.from_pylist(sorted(numbered, key=lambda row: row["label"]), schema=schema)
        file = folder / "plain_text" / f"{split}-00000-of-00001.parquet"
        pq.write_table(table, file)
        download_size += file.stat().st_size
        splits.append((split, table.nbytes, table.num_rows))

    card = _IMDB_CARD.format(
        splits="\n".join(
            f"  - name: {split}\n    num_bytes: {num_bytes}\n    num_examples: {num_rows}"
            for split, num_bytes, num_rows in splits
        ),
        download_size=download_size,
        dataset_size=sum(num_bytes for _, num_bytes, _ in splits),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


_IMDB_CARD = """\
---
language:
- en
task_categories:
- text-classification
pretty_name: IMDB
dataset_info:
  config_name: plain_text
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': neg
          '1': pos
  splits:
{splits}
  download_size: {download_size}
  dataset_size: {dataset_size}
configs:
- config_name: plain_text
  data_files:
  - split: train
    path: plain_text/train-*
  - split: test
    path: plain_text/test-*
  default: true
---

# IMDB

Movie reviews with their sentiment, in the shape of the well-known set, for tests.
"""
