"""PEFT's tuners that train parts of the base as they are: norms (LN tuning) and rows of embeddings."""

from __future__ import annotations

from lorry.core.errors import CheckpointError
from lorry.core.method.declared import whole_module
from lorry.core.method.registry import method_from
from lorry.formats.file import AdapterFile
from lorry.formats.folders import MANIFEST, PEFT_CONFIG, TENSORS
from lorry.formats.peft_config import PeftConfig
from lorry.formats.peft_extras import EXTRAS, token_key
from lorry.formats.peft_folder import whole_sites
from lorry.formats.reader import READERS, Location, Reader
from lorry.formats.stored import PREFIX, StoredSite


class _Tuner(Reader):
    """A PEFT folder of one tuner, recognised before those that PEFT itself must open."""

    precedence = 1
    kind: str

    def recognises(self, location: Location) -> bool:
        """Whether the config names the tuner."""
        if location.has(MANIFEST) or not location.has(PEFT_CONFIG) or not location.has(TENSORS):
            return False
        return str(location.json(PEFT_CONFIG).get("peft_type", "")).upper() == self.kind

    def keys(self, location: Location, mark: str) -> tuple[dict[str, str], dict[str, str]]:
        """Return the tensors of the tuner by their path without `mark`, and the others by theirs.

        Raises
        ------
        CheckpointError
            There are none.
        """
        file = location.tensors()
        paths = {key: key.removeprefix(PREFIX) for key in file.places}
        own = {path.replace(mark, ""): key for key, path in paths.items() if mark in path}
        if not own:
            raise CheckpointError(f"'{location.path}' holds no tensor with '{mark}', as PEFT's {self.kind} has them.")
        rest = {path.removesuffix(".modules_to_save"): key for key, path in paths.items() if mark not in path}
        return own, rest


class NormTuning(_Tuner):
    """Norms that were trained whole."""

    kind = "LN_TUNING"

    def read(self, location: Location) -> AdapterFile:
        """Open it as whole modules."""
        own, rest = self.keys(location, ".ln_tuning_layers")
        full, sites = whole_module(), dict[str, StoredSite]()
        for path, key in own.items():
            module, _, name = path.rpartition(".")
            stored = sites.setdefault(module, StoredSite(module, full, kind="block", shape=(0, 0)))
            stored.keys[name] = key
        values = location.json(PEFT_CONFIG)
        strange = whole_sites(PeftConfig(values), rest, sites)
        if strange:
            raise CheckpointError(f"'{location.path}' holds {sorted(strange.values())[:3]}, which are no norms.")
        return AdapterFile(
            name=location.path.name,
            method=full,
            sites=sites,
            format="peft-norms",
            path=location.path,
            layout="peft",
            file=location.tensors(),
            base=str(values.get("base_model_name_or_path") or ""),
            metadata={"source": "peft", "peft_type": self.kind},
        )


class TokenTuning(_Tuner):
    """Trained rows of embeddings and nothing else."""

    kind = "TRAINABLE_TOKENS"

    def read(self, location: Location) -> AdapterFile:
        """Open it; which rows they are is in the config."""
        own, rest = self.keys(location, ".trainable_tokens_delta")
        if rest:
            raise CheckpointError(f"'{location.path}' holds {sorted(rest.values())[:3]}, which are no rows of tokens.")
        values = location.json(PEFT_CONFIG)
        tokens = values.get("token_indices")
        whole = isinstance(tokens, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in tokens)
        if not whole:
            raise CheckpointError(
                f"'{location.path / PEFT_CONFIG}': token_indices must be a list of whole numbers, found {tokens!r:.80}."
            )
        return AdapterFile(
            name=location.path.name,
            method=method_from({"method": "token-rows", "tokens": tokens}),
            sites={},
            format="peft",
            path=location.path,
            layout="peft",
            file=location.tensors(),
            base=str(values.get("base_model_name_or_path") or ""),
            metadata={"source": "peft", "peft_type": self.kind},
            config=PeftConfig({"trainable_token_indices": tokens}),
            base_copies={token_key(module): key for module, key in own.items()},
            needs_model=EXTRAS,
        )


READERS.add("peft-norms", NormTuning())
READERS.add("peft-tokens", TokenTuning())
