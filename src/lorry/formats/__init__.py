"""Files: readers and writers of Lorry's own format, PEFT's and its tuners, kohya's and diffusers."""

from __future__ import annotations

from lorry.core.life.writers import WRITERS

WRITERS.source(__name__, __path__)
