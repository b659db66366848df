"""The application: all endpoints over one engine."""

from __future__ import annotations

from collections.abc import Collection

from fastapi import FastAPI

import lorry.serving.http.routes.adapters as adapters
import lorry.serving.http.routes.chat as chat
import lorry.serving.http.routes.completions as completions
import lorry.serving.http.routes.embeddings as embeddings
import lorry.serving.http.routes.health as health
import lorry.serving.http.routes.models as models
import lorry.serving.http.routes.rerank as rerank
import lorry.serving.http.routes.sessions as sessions
import lorry.serving.http.routes.tokens as tokens
from lorry.serving.http import errors
from lorry.serving.http.guard import MOST_BYTES, Guard
from lorry.serving.http.state import Serving

ROUTES = (models, chat, completions, embeddings, rerank, sessions, tokens, adapters, health)


def create_app(serving: Serving, *, most_bytes: int = MOST_BYTES, hosts: Collection[str] | None = None) -> FastAPI:
    """Return the ASGI application of a server.

    Parameters
    ----------
    serving
        The engine with what belongs to it.
    most_bytes
        Of a body.
    hosts
        Names under which the server is asked; None for any.
    """
    app = FastAPI(title="Lorry", description=__doc__, separate_input_output_schemas=False)
    app.state.serving = serving
    errors.install(app)
    for module in ROUTES:
        app.include_router(module.router)
    app.add_middleware(Guard, count=serving.metrics.answered, most_bytes=most_bytes, hosts=hosts)
    return app
