"""The A of another adapter: roles whose low-rank values are kept once for all have one A."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError, SiteError
from lorry.core.forward.entry import Entry
from lorry.core.method.families import Bottleneck
from lorry.core.method.spec import Observed
from lorry.core.options import option
from lorry.core.sites.targets import matches
from lorry.formats.file import AdapterFile
from lorry.formats.reader import open_adapter
from lorry.training.starts import LowRankStart, low_rank, register_start


@register_start("shared-down", paper="arXiv 2602.01053")
@dataclass(frozen=True)
class SharedDown(LowRankStart):
    """A is that of another adapter at the sites of a pattern, B is zero.

    With the dynamic ``freezing`` from step 0 on (``tensors: "*.v_proj.A"``, ``stages: {freeze: 0}``) it stays so, and
    roles trained like this share a cache by the scheme ``base-lr-shared``.
    """

    product: ClassVar[bool] = False
    adapter: str = option("", "Folder of the adapter whose A is taken.")
    sites: str = option("*.v_proj", "Pattern of the sites at which it is taken; others start as the method has it.")

    def check(self) -> None:
        """Refuse a start without the adapter."""
        if not self.adapter or not Path(self.adapter).exists():
            raise OptionError(
                "The start 'shared-down' takes A from another adapter: set adapter to its folder, found "
                f"{self.adapter!r}."
            )

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Take A where the site is one of those asked for."""
        a, b = low_rank(entry, self)
        if not matches(entry.site.path, self.sites):
            return a, torch.zeros_like(b)
        return self._given(entry, a), torch.zeros_like(b)

    @cached_property
    def _file(self) -> AdapterFile:
        return open_adapter(Path(self.adapter))

    def _given(self, entry: Entry, own: Tensor) -> Tensor:
        file, path = self._file, entry.site.path
        method = file.methods.get(path)
        if not isinstance(method, Bottleneck) or not method.plain:
            what = "nothing" if method is None else type(method).__name__
            raise SiteError(
                f"The start 'shared-down' takes A of '{path}' from {self.adapter}, which has {what} there; expected a "
                "plain low-rank method. Name an adapter that was trained on this site, or other sites."
            )
        given = method.factors(file.all_tensors(path), file.site(path))[0]
        if given.shape != own.shape:
            raise SiteError(
                f"A of '{path}' is {tuple(given.shape)} in {self.adapter} and {tuple(own.shape)} here; shared factors "
                "have the same rank. Train with the rank of that adapter."
            )
        return given
