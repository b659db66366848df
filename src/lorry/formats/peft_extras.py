"""What PEFT's LoRA may hold beside its factors: biases of the base or of lora_B, and trained rows of embeddings.

PEFT keeps the trained values themselves; Lorry keeps what they differ by from the base's own, so they need the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import CheckpointError
from lorry.core.method.base import Method
from lorry.core.method.declared import whole_module
from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import method_from
from lorry.core.sites.site import Site
from lorry.formats.file import AdapterFile
from lorry.formats.names import Resolver
from lorry.formats.peft_config import PeftConfig
from lorry.formats.stored import LORA_BIAS

#: Why an adapter with extras can be read onto a model only.
EXTRAS = "it holds trained biases or rows of embeddings, whose change only the base tells"
_TOKENS = ".token_adapter.trainable_tokens_delta"
_OTHER_WAY = "Merge the adapter in PEFT (merge_and_unload), and use the merged model."

Chosen = list[tuple[Site, Method]]


def has_extras(config: PeftConfig) -> bool:
    """Whether an adapter with this config holds more than factors and whole modules."""
    values = config.values
    biased = values.get("bias") not in (None, "none") or values.get("lora_bias")
    return bool(biased or values.get("trainable_token_indices"))


def token_key(module: str) -> str:
    """Return what the trained rows of a module are called among the parameters of a file."""
    return module + _TOKENS


@dataclass
class _Extras:
    """The places that a file's extras find in a model; `chosen` and `values` are changed in place."""

    file: AdapterFile
    resolver: Resolver
    chosen: Chosen
    values: dict[str, Tensor]

    def at(self, path: str) -> int | None:
        """Return which of the chosen sites lies at a path."""
        return next((i for i, (site, _) in enumerate(self.chosen) if site.path == path), None)

    def add_bias(self, site: Site, update: Tensor) -> None:
        """Add an update of the bias at a site, beside the method that acts there."""
        place, name = self.at(site.path), f"{site.path}.bias"
        if name in self.values:
            self.values[name] = self.values[name] + update
            return
        if place is None:
            self.chosen.append((site, method_from("bitfit")))
        else:
            self.chosen[place] = (site, method_from({"method": "bitfit", "beside": self.chosen[place][1]}))
        self.values[name] = update

    def lora_biases(self) -> None:
        """Turn biases of lora_B, which PEFT scales with the update, into updates of the layers' biases."""
        for site, method in list(self.chosen):
            own = self.values.pop(f"{site.path}.{LORA_BIAS}", None)
            if own is not None:
                assert isinstance(method, Bottleneck)
                self.add_bias(site, own * method.scale(site))

    def bias_of(self, module: str, name: str, key: str) -> bool:
        """Take up a trained bias of the base; return whether it is one."""
        site = self.resolver.find(module)
        value = self.file.read(key)
        if site is None:
            return self._bias_of_other(module, name, key, value)
        if name != "bias" or not site.kind.additive or site.kind.indexed:
            raise self._refused(key, f"the {site.kind.name} site '{site.path}' has no bias that an adapter could carry")
        self.add_bias(site, _difference(value, site.owner._parameters.get("bias"), key, self.file.where))
        return True

    def _bias_of_other(self, module: str, name: str, key: str, value: Tensor) -> bool:
        """Carry a layer whole that has a trained bias and is no site (a norm); its other parameters stay."""
        site = self.resolver.whole(module)
        if site is None or name not in site.owner._parameters:
            return False
        if any(site.owner.children()):
            raise self._refused(key, f"'{site.path}' consists of other modules")
        if self.at(site.path) is None:
            self.chosen.append((site, whole_module()))
            own = {n: p.detach().to(value.dtype) for n, p in site.owner.named_parameters() if "lorry_" not in n}
            self.values.update({f"{site.path}.{n}": t for n, t in own.items()})
        self.values[f"{site.path}.{name}"] = value
        return True

    def rows(self, module: str, key: str, others: Sequence[str]) -> None:
        """Take up the trained rows of an embedding, and of an output head that shares its table."""
        site = self.resolver.find(module)
        if site is None:
            raise self.resolver.missing(module, self.file.where, key)
        tokens, value = self._tokens(module), self.file.read(key)
        if value.ndim != 2 or len(value) != len(tokens):
            raise CheckpointError(
                f"'{self.file.where}': '{key}' must hold a row for each of {len(tokens)} tokens, found "
                f"{tuple(value.shape)}."
            )
        method = method_from({"method": "token-rows", "tokens": tokens})
        places = [site]
        # PEFT saves the rows of a shared table once
        for tied in site.tied:
            other = self.resolver.sites.get(tied.rpartition(".")[0])
            if other is not None and other.path not in others:
                places.append(other)
        order = torch.tensor(tokens).argsort()
        for place in places:
            if self.at(place.path) is not None:
                raise self._refused(key, f"another adapter sits on '{place.path}', which shares its rows")
            method.check_site(place)
            own = place.stored[torch.tensor(tokens, device=place.device)]
            update = _difference(value, own, key, self.file.where)
            self.values[f"{place.path}.rows"] = update[order]
            self.chosen.append((place, method))

    def _tokens(self, module: str) -> list[int]:
        config = self.file.config
        assert config is not None
        tokens = config.values.get("trainable_token_indices")
        if isinstance(tokens, dict):
            fitting = [n for n in tokens if module == n or module.endswith(f".{n}")]
            tokens = tokens[max(fitting, key=len)] if fitting else None
        if not tokens:
            raise CheckpointError(f"'{self.file.where}' holds trained rows of '{module}', but its config no tokens.")
        return list(tokens)

    def _refused(self, key: str, reason: str) -> CheckpointError:
        return CheckpointError(f"'{self.file.where}' holds '{key}', but {reason}; nothing was loaded. {_OTHER_WAY}")


def bind_extras(file: AdapterFile, resolver: Resolver, chosen: Chosen, values: dict[str, Tensor]) -> dict[str, str]:
    """Find the places of biases and trained rows; return the parameters of the base that are neither.

    Parameters
    ----------
    file
        The opened adapter, with its config.
    resolver
        Of the model.
    chosen, values
        Sites with their methods, and tensors by their full names, as far as they are bound; they are extended.

    Raises
    ------
    CheckpointError
        Something has no place, or lies where it cannot be carried; with what to do instead.
    """
    extras, left = _Extras(file, resolver, chosen, values), {}
    extras.lora_biases()
    assert file.config is not None
    biased = file.config.values.get("bias") in ("all", "lora_only")
    tables = [p.removesuffix(_TOKENS) for p in file.base_copies if p.endswith(_TOKENS)]
    known = [site.path for module in tables if (site := resolver.find(module)) is not None]
    for path, key in file.base_copies.items():
        module, _, name = path.rpartition(".")
        if path.endswith(_TOKENS):
            extras.rows(path.removesuffix(_TOKENS), key, known)
        elif not (biased and "bias" in name and extras.bias_of(module, name, key)):
            left[path] = key
    _check_complete(file, tables, extras, biased)
    return left


def _check_complete(file: AdapterFile, tables: Sequence[str], extras: _Extras, biased: bool) -> None:
    """Raise `CheckpointError` if the config names rows or biases that the file does not hold."""
    assert file.config is not None
    if file.config.values.get("trainable_token_indices") and not tables:
        raise CheckpointError(
            f"'{file.where}' names trained tokens, but holds no rows of an embedding. The file is incomplete; nothing "
            "was loaded."
        )
    for site, method in extras.chosen:
        able = biased and not method.whole and site.kind.additive and not site.kind.indexed
        if able and site.kind.bias(site) is not None and f"{site.path}.bias" not in extras.values:
            raise CheckpointError(
                f"'{file.where}' was trained with biases, but lacks that of '{site.path}'. The file is incomplete; "
                "nothing was loaded."
            )


def _difference(value: Tensor, own: Tensor | None, key: str, where: str) -> Tensor:
    """Return what trained values differ by from the base's own."""
    if own is None or own.shape != value.shape:
        found = "none" if own is None else tuple(own.shape)
        raise CheckpointError(
            f"'{where}': '{key}' is of shape {tuple(value.shape)}, but the model has {found} there; nothing was loaded."
        )
    exact = torch.promote_types(torch.promote_types(value.dtype, own.dtype), torch.float32)
    return value.to(exact) - own.detach().to(value.device, exact)
