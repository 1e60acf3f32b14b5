"""A server whose engines say what they were told. All that is before an engine is real."""

from __future__ import annotations

from fastapi import FastAPI

from tunewright.server.app import create_app
from tunewright.server.state import Server
from tunewright.testing import EchoEngines


def echoing(server: Server) -> FastAPI:
    server.engines = EchoEngines()
    return create_app(server)
