"""Writing single files that diffusion tools read: in diffusers' naming and in kohya's."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lorry.core.errors import CheckpointError
from lorry.core.life.adapter import Adapter
from lorry.core.life.writers import WRITERS
from lorry.core.method.families import Bottleneck
from lorry.core.receipt import Receipt
from lorry.formats.file import AdapterFile
from lorry.formats.save import check_tensors, sealed
from lorry.formats.snapshot import as_file
from lorry.formats.stored import foreign
from lorry.formats.tensors import with_metadata
from lorry.formats.updates import NeedsBase

#: What diffusers calls the models of a pipeline -> what kohya does.
_KOHYA_ROOTS = {"text_encoder": "te1", "text_encoder_2": "te2", "text_encoder_3": "te3"}


def save_diffusers(
    adapter: Adapter | AdapterFile, path: str | os.PathLike[str], *, component: str = "unet", overwrite: bool = True
) -> Receipt:
    """Write a ``.safetensors`` file in diffusers' naming (``unet.PATH.lora_A.weight``).

    diffusers reads alpha from the file's metadata only where it is told the name of the file, so the scale goes into B
    (rounded once unless it is a power of two) and alpha is the rank.

    Parameters
    ----------
    adapter
        Plain low rank at every site; a bundle writes each root under its own name.
    path
        The file.
    component
        Which model of a pipeline the adapter belongs to; not used for bundles.
    overwrite
        Replace a file that lies there.

    Raises
    ------
    CheckpointError
        An update is not ``scale · B A``, or a site has no place in such files; or the disk refuses.
    """
    file = as_file(adapter, copy=False)
    tensors: dict[str, Tensor] = {}
    config: dict[str, object] = {}
    for root, part in _parts(file, component):
        ranks, alphas = {}, {}
        for place, rank, alpha, a, b in _factors(part):
            tensors[f"{root}.{place}.lora_A.weight"] = a
            tensors[f"{root}.{place}.lora_B.weight"] = (b.double() * (alpha / rank)).to(b.dtype)
            ranks[f"^{_escaped(place)}"] = alphas[f"^{_escaped(place)}"] = rank
        options = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "rank_pattern": ranks, "alpha_pattern": alphas}
        options["target_modules"] = list(part.sites)
        config |= {f"{root}.{key}": value for key, value in options.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True)}
    return _written(file, path, tensors, metadata, overwrite)


def save_kohya(
    adapter: Adapter | AdapterFile, path: str | os.PathLike[str], *, component: str = "unet", overwrite: bool = True
) -> Receipt:
    """Write a ``.safetensors`` file in kohya's naming (``lora_unet_PATH.lora_down.weight``), alpha beside each pair.

    Parameters and errors are those of `save_diffusers`; paths that are one with underscores for dots are refused too.
    """
    file = as_file(adapter, copy=False)
    tensors: dict[str, Tensor] = {}
    for root, part in _parts(file, component):
        for place, _, alpha, a, b in _factors(part):
            name = f"lora_{_KOHYA_ROOTS.get(root, root)}_{_named(root, place).replace('.', '_')}"
            if f"{name}.alpha" in tensors:
                raise CheckpointError(f"'{place}' and another site are both called '{name}' in kohya's naming.")
            tensors |= {
                f"{name}.lora_down.weight": a,
                f"{name}.lora_up.weight": b,
                f"{name}.alpha": torch.tensor(alpha, dtype=torch.float64),
            }
    return _written(file, path, tensors, {"format": "pt"}, overwrite)


WRITERS.add("diffusers", save_diffusers)
WRITERS.add("kohya", save_kohya)


def _parts(file: AdapterFile, component: str) -> Iterator[tuple[str, AdapterFile]]:
    if file.needs_model or file.flat:
        raise NeedsBase(f"'{file.where}' does not say where in its model its sites are; load it onto the model first")
    yield from (file.components or {component: file}).items()


def _factors(file: AdapterFile) -> Iterator[tuple[str, int, float, Tensor, Tensor]]:
    """Yield path, rank, alpha, A and B of every site, in the layout that both namings use."""
    if file.shared or file.shared_values:
        raise CheckpointError(f"The sites of '{file.where}' share tensors, which such files cannot say.")
    for path, method in file.methods.items():
        facts = file.facts(path) if not method.whole else None
        if facts is None or facts.kind not in ("linear", "conv") or (facts.kind == "conv" and not facts.kernel):
            raise CheckpointError(
                f"'{file.where}': '{path}' ({'whole module' if facts is None else facts.kind}) has no place in a "
                "single file of diffusion tools; save a folder."
            )
        if not isinstance(method, Bottleneck) or not method.plain:
            raise CheckpointError(
                f"'{file.where}': the update of {type(method).__name__} at '{path}' is not scale · B A. Export it as a "
                "plain LoRA first (lorry.formats.export.export_plain)."
            )
        site = file.site(path)
        with torch.no_grad():
            a, b = method.factors(file.all_tensors(path), site)
        rank = a.shape[-2]
        alpha = method.scale(site) * rank
        yield path, rank, alpha, foreign("A", a, facts.kind, facts.kernel), foreign("B", b, facts.kind, facts.kernel)


def _named(root: str, path: str) -> str:
    """Return a path as kohya calls it: CLIP's text models had a name around their layers until transformers 5."""
    return f"text_model.{path}" if root.startswith("text_encoder") and path.startswith("encoder.layers.") else path


def _escaped(path: str) -> str:
    return path.replace(".", r"\.")


def _written(
    file: AdapterFile,
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    overwrite: bool,
) -> Receipt:
    """Write beside the goal and move it there in one step."""
    goal = Path(path)
    if goal.suffix != ".safetensors":
        raise CheckpointError(f"'{goal}' must end in .safetensors, as every tool expects of such files.")
    if goal.is_dir() or (goal.exists() and not overwrite):
        raise CheckpointError(f"'{goal}' exists. Choose another name, or pass overwrite=True.")
    check_tensors(tensors, file.name)
    blob = with_metadata(sealed(tensors)[0], metadata)
    temporary = goal.with_name(f".{goal.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as out:
            out.write(blob)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(goal)
    except OSError as error:
        raise CheckpointError(f"Saving to '{goal}' failed: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return Receipt("save", file.name, len(tensors), len(tensors), len(file.sites), "match")
