"""Adapters loaded and unloaded while the server runs, from allowed folders alone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from lorry.core.errors import AdapterError
from lorry.serving.http.bodies import LoadBody, UnloadBody
from lorry.serving.http.errors import ApiError
from lorry.serving.http.names import BASE
from lorry.serving.http.state import GUARDED, WORKING, Caller, Serving, Shared

router = APIRouter(tags=["adapters"])


@router.post("/v1/load_lora_adapter", dependencies=WORKING)
async def load(body: LoadBody, serving: Shared, caller: Caller) -> dict[str, Any]:
    """Load an adapter under a name; the answer holds the receipt."""
    name = body.lora_name
    caller.check_manage(name)
    if name in (BASE, serving.base):
        raise ApiError(400, f"'{name}' names the base; give the adapter another name.", param="lora_name")
    _check_mode(serving, name)
    path = await asyncio.to_thread(allowed, body.lora_path, serving.folders)
    if not body.load_inplace and name in serving.names():
        message = f"An adapter '{name}' is served already; send load_inplace: true to exchange it, or unload it first."
        raise ApiError(409, message, code="adapter_exists", param="lora_name")
    receipt = await asyncio.to_thread(serving.engine.load, name, path, body.pinned)
    return {"object": "adapter", "id": name, "receipt": receipt.to_dict()}


@router.post("/v1/unload_lora_adapter", dependencies=WORKING)
async def unload(body: UnloadBody, serving: Shared, caller: Caller) -> dict[str, Any]:
    """Unload an adapter; requests that use it end as they began."""
    caller.check_manage(body.lora_name)
    _check_mode(serving, body.lora_name)
    try:
        await asyncio.to_thread(serving.engine.unload, body.lora_name)
    except AdapterError as error:
        raise serving.unknown(body.lora_name, caller) from error
    return {"object": "adapter", "id": body.lora_name, "deleted": True}


@router.get("/v1/lora_adapters", dependencies=GUARDED)
async def listed(serving: Shared, caller: Caller) -> dict[str, Any]:
    """List the adapters with their versions, sizes and places; of their paths the last part alone."""
    caller.check_manage()
    found = await asyncio.to_thread(serving.engine.adapters)
    rows = [
        {
            "id": each.name,
            "version": each.version,
            "path": each.path and each.path.name,
            "rank": each.rank,
            "bytes": each.bytes,
            "place": each.place,
            "in_use": each.in_use,
        }
        for each in found
        if caller.may_use(each.name)
    ]
    return {"object": "list", "data": rows}


def _check_mode(serving: Serving, name: str) -> None:
    """Raise 409 for the adapter of a mode, which belongs to a head."""
    if name in serving.modes:
        message = f"'{name}' belongs to a mode of this server and stays as it is."
        raise ApiError(409, message, code="mode_adapter", param="lora_name")


def allowed(path: str, folders: Sequence[Path]) -> Path:
    """Return where an adapter lies, with every link followed.

    Parameters
    ----------
    path
        Absolute, or relative to one of the folders.
    folders
        Below which it must lie, itself and every file in it.

    Raises
    ------
    ApiError
        403 for what lies elsewhere, be it there or not; 404 for what is not there.
    """
    if not folders:
        raise ApiError(
            403, "This server loads no adapters; start it with --adapter-dir FOLDER.", code="path_not_allowed"
        )
    outside = ApiError(
        403, "The lora_path lies outside of the folders that this server loads from.", code="path_not_allowed",
        param="lora_path",
    )  # fmt: skip
    roots = [Path(os.path.realpath(folder)) for folder in folders]
    inside = False
    for root in roots:
        try:
            found = Path(os.path.realpath(root / path))
        except (OSError, ValueError):  # a null byte, a circle of links
            raise outside from None
        if not _below(found, roots):
            continue
        inside = True
        if os.path.exists(found):  # unlike the path's own method, which raises for a name that is too long
            if not all(_below(Path(os.path.realpath(each)), roots) for each in _files(found)):
                raise outside
            return found
    if not inside:
        raise outside
    raise ApiError(404, f"There is no adapter at '{path}'.", code="adapter_not_found", param="lora_path")


def _below(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _files(path: Path) -> list[Path]:
    return [path, *(Path(folder) / name for folder, below, files in os.walk(path) for name in [*below, *files])]
