"""Writing the folder that vLLM serves: PEFT's, within the rules of vLLM's ``lora/peft_helper.py``.

It refuses modules that were trained whole, DoRA, biases and starts that change the base, and ranks above its
``max_lora_rank``. Releases differ in whether they read ``rank_pattern`` and ``alpha_pattern``, so the folder has none:
all sites get one rank, by rows and columns of zeros, and one alpha.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lorry.core.errors import CheckpointError
from lorry.core.life.adapter import Adapter
from lorry.core.life.writers import WRITERS
from lorry.core.receipt import Receipt
from lorry.formats.export import plain_updates
from lorry.formats.file import AdapterFile
from lorry.formats.folders import PEFT_CONFIG, TENSORS, write_folder
from lorry.formats.peft_config import read_json
from lorry.formats.peft_write import NotPlain, Plain, peft_folder
from lorry.formats.save import check_tensors, model_name, sealed
from lorry.formats.updates import NeedsBase
from lorry.formats.uses import USES, Exported

#: What ``--max-lora-rank`` may be.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def save_vllm(
    adapter: Adapter | AdapterFile,
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    max_rank: int = RANKS[-1],
    overwrite: bool = True,
) -> Receipt:
    """Write a folder that vLLM loads, in which every site has the same rank and alpha.

    Parameters
    ----------
    adapter
        Of linear layers and embeddings. What is no plain ``scale · B A`` (DoRA, LoHa) is approximated as by
        `lorry.formats.export.export_plain`, with the error in the receipt.
    path
        The folder.
    rank
        Of updates that have to be approximated.
    max_rank
        The ``--max-lora-rank`` of the server.
    overwrite
        Replace an adapter that lies there.

    Raises
    ------
    CheckpointError
        vLLM would refuse the folder: why, and which conversion helps.
    AdapterError
        The update depends on the input, or a rank is needed.
    """
    file, plain, error, notes = plain_updates(adapter, rank)
    if file.flat or file.needs_model:
        raise NeedsBase(f"'{file.where}' does not say where in its model its sites are; load it onto the model first")
    _check(file, plain, max_rank)
    uniform = _uniform(plain)
    chosen = file.targets() if file.targets is not None else None
    try:
        form = peft_folder(file.root, uniform, {}, base=model_name(file), task="CAUSAL_LM", chosen=chosen)
    except NotPlain as reason:
        raise CheckpointError(f"Adapter '{file.name}' cannot be said in PEFT's format: {reason}.") from None
    check_tensors(form.tensors, file.name)
    files = {TENSORS: sealed(form.tensors)[0], PEFT_CONFIG: form.config_bytes()}
    write_folder(Path(path), files, overwrite=overwrite)
    if len({(p.rank, p.alpha) for p in plain}) > 1:
        notes.append(f"ranks were filled up to {uniform[0].rank} with zeros, and scales went into B")
    count = len(form.tensors)
    return Receipt("export", file.name, count, count, len(plain), "match", *error, tuple(notes + form.notes))


WRITERS.add("vllm", save_vllm)


def _check(file: AdapterFile, plain: list[Plain], max_rank: int) -> None:
    whole = [p for p, m in file.methods.items() if m.whole] + list(file.base_copies)
    if whole:
        raise CheckpointError(
            f"vLLM takes no modules that were trained whole, and '{whole[0]}' was. Fuse the adapter into the base "
            "(lorry fuse) and serve that, or train without modules_to_save."
        )
    for item in plain:
        if item.site.kind.name not in ("linear", "embedding"):
            raise CheckpointError(
                f"vLLM has no LoRA at '{item.site.path}' ({item.site.kind.name}). Fuse the adapter into the base "
                "(lorry fuse) and serve that."
            )
    widest = max((item.rank for item in plain), default=0)
    if widest > max_rank:
        raise CheckpointError(
            f"vLLM takes ranks up to {max_rank}, and '{file.name}' has rank {widest}. Make it smaller (open it with "
            f"lorry.open, resize({max_rank}), which says its error, and save), or raise max_rank up to {RANKS[-1]}."
        )


def _uniform(plain: list[Plain]) -> list[Plain]:
    """Return the sites with one rank, filled up with zeros, and one alpha; exact but for the rounding of B by a scale.

    Sites that agree already are returned as they are.
    """
    if len({(item.rank, item.alpha) for item in plain}) < 2:
        return plain
    rank = max(item.rank for item in plain)
    made = []
    for item in plain:
        a, b = item.tensors["A"], item.tensors["B"]
        b = (b.double() * (item.alpha / item.rank)).to(b.dtype)
        more = rank - item.rank
        a = torch.cat([a, a.new_zeros(more, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], more)], dim=1)
        made.append(Plain(item.site, rank, float(rank), {"A": a, "B": b}))
    return made


def _commands(exported: Exported) -> list[str]:
    rank = int(read_json(exported.path / PEFT_CONFIG)["r"])
    limit = next((r for r in RANKS if r >= rank), RANKS[-1])
    name, base = exported.name, exported.base
    serve = ("vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(limit), "--lora-modules")
    body = f'{{"model": "{name}", "prompt": "Hello", "max_tokens": 32}}'
    url = "http://localhost:8000/v1/completions"
    return [
        exported.quoted(*serve, f"{name}={exported.path}"),
        exported.quoted("curl", url, "-H", "Content-Type: application/json", "-d", body),
    ]


USES.add("vllm", _commands)
