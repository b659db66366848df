"""Adapters served: an engine that answers requests on one base, each with adapters of its own.

HTTP, training as a service, roles that share a cache, modes of retrieval and clusters are the folders beside it.
"""

from lorry.serving.engine import Engine
from lorry.serving.options import EngineOptions
from lorry.serving.request import Grammar, Output, Request, Sampling, TokenLogprob, Usage
from lorry.serving.results import Completed, Served, Stats
from lorry.serving.service import Draining, Overloaded, Service

__all__ = [
    "Completed",
    "Draining",
    "Engine",
    "EngineOptions",
    "Grammar",
    "Output",
    "Overloaded",
    "Request",
    "Sampling",
    "Served",
    "Service",
    "Stats",
    "TokenLogprob",
    "Usage",
]
