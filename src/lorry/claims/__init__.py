"""The ledger of claims: what papers say about a method, tried in miniature, with the figures and a verdict.

A study is one file in `lorry.claims.studies`; its claims are functions from a `Setting` to a `Finding`,
registered with `claim`. ``lorry claims run SLUG`` runs them and writes a record, ``lorry claims`` prints the
records, ``lorry claims page`` draws them as a document.
"""

from __future__ import annotations

from . import studies  # noqa: F401  says where the files of claims are
from .ledger import Claim, Finding, Panel, Record, Setting, claim, claims, read_records, run, slugs
from .verdicts import Trial, compare, tune

__all__ = [
    "Claim",
    "Finding",
    "Panel",
    "Record",
    "Setting",
    "Trial",
    "claim",
    "claims",
    "compare",
    "read_records",
    "run",
    "slugs",
    "tune",
]
