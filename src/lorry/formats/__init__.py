"""Files: readers and writers of Lorry's own format, PEFT's and its tuners, kohya's and diffusers'."""

from __future__ import annotations

from lorry.core.life.writers import WRITERS
from lorry.formats.reader import READERS
from lorry.formats.registry import LOADERS

for registry in (READERS, WRITERS, LOADERS):
    registry.source(__name__, __path__)
