"""One file for each method or topic whose claims are tried. A file registers its claims; nothing else names it."""

from __future__ import annotations

from lorry.claims.ledger import CLAIMS

CLAIMS.source(__name__, __path__)
