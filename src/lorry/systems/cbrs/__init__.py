"""Parts of CBRS (arXiv 2604.16665): requests found in a stream of messages, each made into a record."""

from __future__ import annotations

from .cascade import Cascade, FirstLayer
from .record import NO_REQUEST, normalised, schema, written
from .score import Score, score, tree_likeness
from .stream import Journal, Message, answer_all, of_file, of_folder, webhook

__all__ = [
    "NO_REQUEST",
    "Cascade",
    "FirstLayer",
    "Journal",
    "Message",
    "Score",
    "answer_all",
    "normalised",
    "of_file",
    "of_folder",
    "schema",
    "score",
    "tree_likeness",
    "webhook",
    "written",
]
