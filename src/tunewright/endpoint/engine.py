"""An engine: a process that holds the weights of one base with its adapters, or of one whole model, for a server.

It speaks HTTP on a Unix socket, to the server that started it and to nobody else: requests have been checked, and who
asks is known. An adapter is called by its folder; a request names it in the header `x-adapter` (quoted as in URLs), and
the body's `model` is the name that the reply gives back. The process ends when its standard input does, which is when
the server ends, however that came.

    GET  /healthz              ready; which adapters there are
    POST /adapters             {"folder": F}: load one (again: nothing happens)
    POST /adapters/unload      {"folder": F}: let it go; one that is not there is fine
    POST /chat/completions, /completions, /embeddings
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from tunewright import chat, models
from tunewright.chat import Equipment
from tunewright.endpoint import answering
from tunewright.endpoint.app import api_error, http_error
from tunewright.endpoint.diary import Diary, logger
from tunewright.endpoint.process import until_sigterm
from tunewright.endpoint.served import Served, Trained
from tunewright.endpoint.shapes import ApiError, no_embeddings, read_request, read_text_request
from tunewright.endpoint.worker import Worker
from tunewright.errors import EndpointError, ModelError, UserError
from tunewright.generate import LocalCompleter

GRACE_S = 5
"""How long running answers may take to finish after SIGTERM."""
BACKLOG = 2048
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""One of these is in a folder that holds a tokenizer."""
RENDERING = "rendering.json"


def serve(path: Path, source: str, *, revision: str | None = None, folder: Path | None = None) -> None:
    """Serve until SIGTERM or the end of standard input. Call it in the main thread.

    The socket is there before the weights are; whoever connects meanwhile waits.

    Args:
        path: of the Unix socket; it and its folder, if that is empty then, are removed at the end.
        source: hub name or folder of the base.
        folder: a whole model's, instead of the base's weights.

    Raises:
        UserError: the model cannot be had, or does not render as it was trained.
    """
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(asctime)s %(message)s", force=True)
    logging.getLogger("tunewright").setLevel(logging.INFO)
    try:
        with contextlib.closing(_listen(path)) as listener:
            threading.Thread(target=_end_with_input, args=(path,), daemon=True).start()
            app = create_app(Shelf.load(source, revision=revision, folder=folder))
            logger.info("engine %d serves %s", os.getpid(), folder or source)
            until_sigterm(app, listener, grace_s=GRACE_S, keep_alive_s=3600)
    finally:
        _clear(path)


class Shelf:
    """The weights, and what can be asked of them. `load_adapter` and `unload_adapter` belong in the model's thread."""

    def __init__(self, model: Any, tokenizer: Any, equipment: Equipment, labels: list[str] | None = None) -> None:
        self.own = Served(LocalCompleter(model, tokenizer, equipment), labels=labels, activate=self._use_base)
        """The base itself, or the whole model."""
        self.adapters: dict[str, Served] = {}
        self._names: dict[str, str] = {}
        self._counted = 0
        self._model = model
        self._tokenizer = tokenizer
        self._peft: Any = None

    @classmethod
    def load(
        cls, source: str, *, revision: str | None = None, folder: Path | None = None, device: str | None = None
    ) -> Shelf:
        """Raises:
        UserError: as `serve`.
        """
        device = device or models.best_device()
        if folder is not None:
            return cls._whole(folder, source, revision, device)
        ref = models.find(source, revision)
        tokenizer = models.load_tokenizer(ref)
        equipment = chat.equip(tokenizer)
        model = models.load_model(ref, device=device)
        models.grow(model, len(tokenizer))  # as training does, where the base lacks an end of turn
        return cls(model, tokenizer, equipment)

    @classmethod
    def _whole(cls, folder: Path, source: str, revision: str | None, device: str) -> Shelf:
        has_tokenizer = any((folder / name).is_file() for name in TOKENIZERS)
        if has_tokenizer:
            tokenizer = models.load_folder_tokenizer(folder)
        else:  # a checkpoint's
            tokenizer = models.load_tokenizer(models.find(source, revision))
        equipment = chat.equip(tokenizer)
        trained = _trained(folder, tokenizer, is_its_own=has_tokenizer)
        try:
            model = models.load_folder(folder, device=device)
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        return cls(model, tokenizer, trained.equipment, trained.labels) if trained else cls(model, tokenizer, equipment)

    def load_adapter(self, folder: str) -> None:
        """Read an adapter; one that is there already stays as it is.

        Raises:
            UserError: it is none, belongs to another base, or does not render as it was trained.
        """
        if folder in self.adapters:
            return
        place = Path(folder)
        if not (place / "adapter_config.json").is_file():
            raise ModelError(f"{folder}: no adapter there (adapter_config.json)")
        trained = _trained(place, self._tokenizer)
        name = f"adapter{self._counted}"
        self._counted += 1
        self._attach(place, name)
        equipment, labels = (trained.equipment, trained.labels) if trained else (self.own.completer.equipment, None)
        completer = LocalCompleter(self._model, self._tokenizer, equipment)
        self._names[folder] = name
        self.adapters[folder] = Served(completer, labels=labels, activate=lambda: self._use(name))

    def unload_adapter(self, folder: str) -> None:
        """Let an adapter go; one that is not there is fine."""
        if self.adapters.pop(folder, None) is not None:
            self._use_base()
            self._peft.delete_adapter(self._names.pop(folder))

    def _attach(self, folder: Path, name: str) -> None:
        """Put an adapter's matrices beside the base's, in the modules that `_model` consists of."""
        from peft import PeftModel
        from safetensors import SafetensorError, safe_open

        device = str(self._model.device)
        try:
            with safe_open(str(folder / "adapter_model.safetensors"), "pt") as file:
                stored = len(file.keys())
            with models.quiet():
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(
                        self._model, str(folder), adapter_name=name, torch_device=device
                    )
                else:
                    self._peft.load_adapter(str(folder), adapter_name=name, torch_device=device)
        except (ValueError, RuntimeError, OSError, SafetensorError) as error:
            self._forget(name)
            raise ModelError(f"{folder}: does not fit this base: {str(error).strip().splitlines()[0]}") from error
        self._peft.eval()
        placed = sum(name in weight.split(".") for weight, _ in self._peft.named_parameters())
        if stored != placed:
            self._forget(name)
            raise ModelError(
                f"{folder}: holds {stored} matrices and {placed} of them have a place in this base; it was made for "
                "another"
            )

    def _forget(self, name: str) -> None:
        """Take half an adapter away again."""
        if self._peft is not None and name in self._peft.peft_config:
            self._peft.delete_adapter(name)

    def _use(self, name: str) -> None:
        self._peft.base_model.enable_adapter_layers()
        self._peft.set_adapter(name, inference_mode=True)

    def _use_base(self) -> None:
        if self._peft is not None:
            self._peft.base_model.disable_adapter_layers()


def create_app(shelf: Shelf) -> FastAPI:
    """The engine's app."""
    worker = Worker()

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Diary)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)

    @app.get("/healthz")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "pid": os.getpid(), "adapters": sorted(shelf.adapters)})

    @app.post("/adapters")
    async def load_adapter(request: Request) -> Response:
        folder = await _folder(request)
        try:
            await _once(worker, lambda: shelf.load_adapter(folder))
        except UserError as error:
            raise ApiError(400, str(error), param="folder", code="adapter_refused") from None
        return JSONResponse({"status": "ok"})

    @app.post("/adapters/unload")
    async def unload_adapter(request: Request) -> Response:
        folder = await _folder(request)
        await _once(worker, lambda: shelf.unload_adapter(folder))
        return JSONResponse({"status": "ok"})

    def chosen(request: Request) -> Served:
        named = request.headers.get("x-adapter")
        if named is None:
            return shelf.own
        folder = unquote(named)
        if folder not in shelf.adapters:
            raise ApiError(404, f"The adapter {folder} is not loaded.", code="adapter_not_loaded")
        return shelf.adapters[folder]

    @app.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        wanted = read_request(await request.body())
        return await answering.chat(request, chosen(request), worker, wanted, name=str(wanted.model))

    @app.post("/completions")
    async def completions(request: Request) -> Response:
        wanted = read_text_request(await request.body())
        return await answering.text(request, chosen(request), worker, wanted, name=str(wanted.model))

    @app.post("/embeddings")
    async def embeddings(request: Request) -> Response:
        body = json.loads(await request.body())
        raise no_embeddings(str(body.get("model")))

    return app


async def _folder(request: Request) -> str:
    body = json.loads(await request.body())
    return str(body["folder"])


async def _once(worker: Worker, work: Any) -> None:
    """Do something in the model's thread, when no answer is being computed."""

    def steps() -> Any:
        work()
        return iter(())

    async with contextlib.aclosing(worker.run(steps)) as items:
        async for _ in items:
            pass


def _trained(folder: Path, tokenizer: Any, *, is_its_own: bool = False) -> Trained | None:
    """What training wrote down beside the weights, and the tokenizer keeps to; None beside a checkpoint's."""
    if not (folder / RENDERING).is_file():
        return None
    trained = Trained.read(folder / RENDERING, "the base has changed since; train again, or restore the base")
    trained.check(tokenizer, str(folder), folder if is_its_own else None)
    return trained


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise EndpointError(f"{path}: no socket can be made there: {error}") from None
    path.chmod(0o600)
    listener.listen(BACKLOG)
    return listener


def _end_with_input(path: Path) -> None:
    """There is nobody left to answer when the server is gone, so nothing is waited for."""
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 4096):
            continue
    _clear(path)
    os._exit(0)


def _clear(path: Path) -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds another engine's socket
        path.parent.rmdir()
