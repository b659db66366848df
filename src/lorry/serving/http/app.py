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
import lorry.serving.http.training.checkpoints as checkpoints
import lorry.serving.http.training.models as trained
import lorry.serving.http.training.service as tenancies
from lorry.serving.http import errors
from lorry.serving.http.guard import MOST_BYTES, Guard
from lorry.serving.http.state import Serving
from lorry.serving.http.training.state import HANDLERS
from lorry.serving.training.desk import Desk
from lorry.serving.training.trainer import Trainer

ROUTES = (models, chat, completions, embeddings, rerank, sessions, tokens, adapters, health)
TRAINING = (tenancies, trained, checkpoints)


def create_app(
    serving: Serving,
    *,
    most_bytes: int = MOST_BYTES,
    hosts: Collection[str] | None = None,
    training: Trainer | None = None,
    tokenizer: str | None = None,
) -> FastAPI:
    """Return the ASGI application of a server.

    Parameters
    ----------
    serving
        The engine with what belongs to it.
    most_bytes
        Of a body.
    hosts
        Names under which the server is asked; None for any.
    training
        Trains what clients want trained; None for a server that serves alone.
    tokenizer
        Where clients that train find the base's tokenizer: a folder or a name of the Hugging Face hub.
    """
    app = FastAPI(title="Lorry", description=__doc__, separate_input_output_schemas=False)
    app.state.serving = serving
    errors.install(app)
    for module in ROUTES:
        app.include_router(module.router)
    if training is not None:
        app.state.desk, app.state.tokenizer = Desk(training, serving.base), tokenizer
        app.state.most_bytes = most_bytes
        for error, answer in HANDLERS.items():
            app.add_exception_handler(error, answer)
        for routes in TRAINING:
            app.include_router(routes.router)
        app.include_router(checkpoints.links)
    app.add_middleware(Guard, count=serving.metrics.answered, most_bytes=most_bytes, hosts=hosts)
    return app
