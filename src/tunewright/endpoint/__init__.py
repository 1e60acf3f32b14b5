"""Models behind the OpenAI API, in processes of their own.

    load(run)      a packaged model, or a refusal where it would not render as it was trained
    create_app     the routes: /healthz, /v1/models, /v1/chat/completions, /v1/completions, /tokenize
    serve(run)     both of them on a port, until SIGTERM
    engine         a base with many adapters, or a whole model, on a Unix socket for a server

A model with labels answers conversations only with one of them, and with the very one that evaluation would have named.
Any other model writes text, JSON of a schema, or calls of functions. One request is computed at a time; the others
wait their turn.

What is not covered: images and audio, embeddings, batching.
"""

from tunewright.endpoint.app import create_app
from tunewright.endpoint.process import serve
from tunewright.endpoint.served import Served, load

__all__ = ["Served", "create_app", "load", "serve"]
