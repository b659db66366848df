"""Federation: one adapter of many clients' data, which never leave them."""

from __future__ import annotations

from .aggregate import AGGREGATIONS, State, Update, aggregate, register_aggregation
from .client import Client
from .options import Federation
from .privacy import Privacy, PrivacyError
from .server import FederationError, FederationResult, Server, simulate
from .splits import SPLITS, deal, register_split
from .transport import InProcess, Transport

__all__ = [
    "AGGREGATIONS",
    "SPLITS",
    "Client",
    "Federation",
    "FederationError",
    "FederationResult",
    "InProcess",
    "Privacy",
    "PrivacyError",
    "Server",
    "State",
    "Transport",
    "Update",
    "aggregate",
    "deal",
    "register_aggregation",
    "register_split",
    "simulate",
]
