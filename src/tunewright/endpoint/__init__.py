"""A packaged model behind the OpenAI API, in a process of its own.

    load(run)      the packaged model, or a refusal where it would not render as it was trained
    create_app     the routes: /healthz, /v1/models, /v1/chat/completions
    serve(run)     both of them on a port, until SIGTERM

A model with labels answers only with one of them, and with the very one that evaluation would have named. Any other
model writes text. One request is computed at a time; the others wait their turn.

What is not covered: tools, images and audio, JSON mode, /v1/completions, several models behind one port, batching.
"""

from tunewright.endpoint.app import create_app
from tunewright.endpoint.process import serve
from tunewright.endpoint.served import Served, load

__all__ = ["Served", "create_app", "load", "serve"]
