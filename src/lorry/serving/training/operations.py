"""What clients ask of a model beside passes, one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lorry.serving.training.checkpoints import Checkpoints
from lorry.serving.training.errors import Refused
from lorry.serving.training.folders import save_sampler
from lorry.serving.training.names import Address, check_name
from lorry.serving.training.store import Model, Store
from lorry.serving.training.tenant import Adam, Tenant

#: Where weights lie that clients sample from while they change.
INFLIGHT = "inflight"


class Operations:
    """Does what is no pass.

    Parameters
    ----------
    store, checkpoints
        What is known, and what is saved.
    kept
        Unnamed weights for sampling that stay of each model.
    """

    def __init__(self, store: Store, checkpoints: Checkpoints, kept: int) -> None:
        self.store, self.checkpoints, self.kept = store, checkpoints, kept
        self._kinds: dict[str, Callable[[Tenant, Model, int, Mapping[str, Any]], dict[str, Any]]] = {
            "create": self._create,
            "optim_step": self._step,
            "save": self._save,
            "save_sampler": self._save_sampler,
            "save_external": self._save_external,
            "load": self._load,
        }

    def changes(self, kind: str) -> bool:
        """Whether an operation of a kind changes weights."""
        return kind in ("optim_step", "load")

    def saves(self, kind: str) -> bool:
        """Whether an operation of a kind leaves something behind that need not be done again."""
        return kind.startswith("save")

    def run(self, kind: str, tenant: Tenant, seq: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Do what is asked of a model, and return what is answered.

        Raises
        ------
        LorryError
            The request's fault, with what to do.
        """
        model = self.store.model(tenant.id)
        assert model is not None
        return self._kinds[kind](tenant, model, seq, asked)

    def _create(self, tenant: Tenant, model: Model, seq: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "create_model", "model_id": tenant.id}

    def _step(self, tenant: Tenant, model: Model, seq: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        given = asked.get("adam_params")
        known = {field.name for field in fields(Adam)}
        if not isinstance(given, dict) or not known >= given.keys():
            raise Refused(f"This server's optimizer is AdamW; give AdamParams, whose fields are {', '.join(known)}.")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise Refused(f"{name} must be a number, found {value!r}.")
        return {"type": "optim_step", "metrics": tenant.step(Adam(**given).check())}

    def _save(self, tenant: Tenant, model: Model, seq: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        address = Address(model.id, "weights", check_name(asked.get("path") or f"{seq:06d}"))

        def write(folder: Path) -> int:
            return tenant.save(folder, {"seq": seq})

        self.checkpoints.save(
            address, model.owner, model.config, write, overwrite=bool(asked.get("overwrite")),
            lifetime=asked.get("ttl_seconds"), facts=asked.get("user_metadata"),
        )  # fmt: skip
        return {"type": "save_weights", "path": address.path}

    def _save_sampler(self, tenant: Tenant, model: Model, seq: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        name, number = asked.get("path"), asked.get("sampling_session_seq_id")
        inflight = asked.get("kind") == "inflight"
        unnamed = name is None
        address = Address(
            model.id, "sampler_weights", check_name(name) if name else INFLIGHT if inflight else f"unnamed-{seq:06d}"
        )
        self.checkpoints.save(
            address, model.owner, model.config, lambda folder: save_sampler(tenant.adapter, folder), overwrite=True,
            lifetime=asked.get("ttl_seconds"), facts=asked.get("user_metadata"), unnamed=unnamed and not inflight,
        )  # fmt: skip
        answer: dict[str, Any] = {"type": "save_weights_for_sampler"}
        if number is None:
            return {**answer, "path": address.path}
        sampler = f"{model.session}:sample:{number}"
        self.store.add_sampler(sampler, model.session, model.owner, address.path)
        self.checkpoints.keep_unnamed(model.id, self.kept)
        return {**answer, "sampling_session_id": sampler}

    def _save_external(self, tenant: Tenant, model: Model, seq: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        if asked.get("age_encryption_recipients"):
            raise Refused("This server does not encrypt what it exports; leave age_encryption_recipients out.")
        address = Address(model.id, "external_weights", check_name(asked.get("path") or f"{seq:06d}"))
        self.checkpoints.save(
            address, model.owner, model.config, lambda folder: save_sampler(tenant.adapter, folder, "peft"),
            lifetime=asked.get("ttl_seconds"), facts=asked.get("user_metadata"),
        )  # fmt: skip
        return {"type": "save_weights_external", "path": address.path}

    def _load(self, tenant: Tenant, model: Model, seq: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        saved = self.checkpoints.readable(asked["path"], model.owner)
        if saved.kind == "external_weights":
            raise Refused("External weights are for other programs; load those of save_state.")
        if asked.get("optimizer") and saved.kind != "weights":
            raise Refused(
                "Weights for sampling have no state of the optimizer. Load those of save_state, or none of it."
            )
        tenant.load(self.checkpoints.folder(saved), bool(asked.get("optimizer")))
        return {"type": "load_weights", "path": saved.path, "model_id": tenant.id}
