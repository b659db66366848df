"""Writing adapters for llama.cpp (one GGUF file) and for Ollama (that file with a Modelfile).

What llama.cpp expects is in its ``src/llama-adapter.cpp``, and how its converter lays weights out in ``conversion/``:
``general.type`` is ``adapter``, ``adapter.type`` is ``lora``, ``general.architecture`` is the base's, and each matrix
has ``NAME.lora_a`` (rank, in) and ``NAME.lora_b`` (out, rank). It multiplies by ``adapter.lora.alpha / rank``, with one
alpha for all. For the token embedding A is stored as (tokens, rank).
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorry.core.errors import CheckpointError, OptionError, near_misses
from lorry.core.life.adapter import Adapter
from lorry.core.life.state import unwrapped
from lorry.core.life.writers import WRITERS
from lorry.core.receipt import Receipt
from lorry.formats.export import plain_updates
from lorry.formats.file import AdapterFile
from lorry.formats.folders import write_folder
from lorry.formats.peft_write import Plain
from lorry.formats.save import check_tensors, model_name
from lorry.formats.updates import NeedsBase
from lorry.formats.uses import USES, Exported

#: File of `save_ollama` that holds the adapter.
GGUF_NAME = "adapter.gguf"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Family:
    """How llama.cpp keeps the models of a class.

    Attributes
    ----------
    architecture
        Its name among ``gguf.MODEL_ARCH``.
    interleaved
        Whether rotary positions turn neighbouring elements there; the rows of q and k are reordered for that, since
        transformers turns those that are half a head apart.
    """

    architecture: str
    interleaved: bool = False


#: Class of the base -> its family in llama.cpp, for those whose matrices it takes over one by one.
FAMILIES = {
    "LlamaForCausalLM": Family("LLAMA", interleaved=True),
    "MistralForCausalLM": Family("LLAMA", interleaved=True),
    "MixtralForCausalLM": Family("LLAMA", interleaved=True),
    "SmolLM3ForCausalLM": Family("SMOLLM3", interleaved=True),
    "GraniteForCausalLM": Family("GRANITE", interleaved=True),
    "Qwen2ForCausalLM": Family("QWEN2"),
    "Qwen3ForCausalLM": Family("QWEN3"),
    "Qwen2MoeForCausalLM": Family("QWEN2MOE"),
    "Qwen3MoeForCausalLM": Family("QWEN3MOE"),
}


def save_gguf(
    adapter: Adapter | AdapterFile,
    path: str | os.PathLike[str],
    *,
    config: Any = None,
    rank: int | None = None,
    dtype: str = "float32",
    overwrite: bool = True,
) -> Receipt:
    """Write the LoRA file of llama.cpp.

    Parameters
    ----------
    adapter
        Of linear layers and the token embedding. What is no plain ``scale · B A`` is approximated as by
        `lorry.formats.export.export_plain`.
    path
        The file, ending in ``.gguf``.
    config
        The base's config: an object of transformers, a mapping, or its folder. The adapter's own base if not given.
    rank
        Of updates that have to be approximated.
    dtype
        ``float32``, ``float16`` or ``bfloat16``.
    overwrite
        Replace a file that lies there.

    Returns
    -------
    Receipt
        With the errors of approximation; rounding to a smaller dtype is not among them.

    Raises
    ------
    CheckpointError
        llama.cpp has no place for a site, the base is of a class that it lays out in another way, or the disk refuses.
    AdapterError
        The update depends on the input, or a rank is needed.
    ImportError
        The package ``gguf`` is not installed.
    """
    goal = Path(path)
    if goal.suffix != ".gguf":
        raise CheckpointError(f"'{goal}' must end in .gguf, as llama.cpp's tools expect.")
    if goal.is_dir() or (goal.exists() and not overwrite):
        raise CheckpointError(f"'{goal}' exists. Choose another name, or pass overwrite=True.")
    temporary = goal.with_name(f".{goal.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        receipt = _write(adapter, temporary, config, rank, dtype)
        temporary.replace(goal)
    except OSError as error:
        raise CheckpointError(f"Saving to '{goal}' failed: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return receipt


def save_ollama(
    adapter: Adapter | AdapterFile,
    path: str | os.PathLike[str],
    *,
    config: Any = None,
    rank: int | None = None,
    dtype: str = "float32",
    model: str | None = None,
    overwrite: bool = True,
) -> Receipt:
    """Write a folder that ``ollama create`` takes: a Modelfile, and beside it the file of `save_gguf`.

    Parameters
    ----------
    adapter, path, config, rank, dtype, overwrite
        As of `save_gguf`; the path is that of the folder.
    model
        What the Modelfile's FROM names: the same base as a model of Ollama, a GGUF file or a folder. The adapter's own
        base if not given.

    Raises
    ------
    CheckpointError
        As `save_gguf` raises; or nothing says where Ollama finds the base.
    """
    goal = Path(path)
    base = model or _base_of(adapter, config)
    if not base or any(c in base for c in "\r\n"):
        raise CheckpointError("A Modelfile needs the base: give model, a model of Ollama or the path of a GGUF file.")
    if goal.is_dir() and any(goal.iterdir()) and not overwrite:
        raise CheckpointError(f"'{goal}' exists. Choose another folder, or pass overwrite=True.")
    temporary = goal.with_name(f".{goal.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}.gguf")
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        receipt = _write(adapter, temporary, config, rank, dtype)
        text = f"FROM {base}\nADAPTER ./{GGUF_NAME}\n"
        write_folder(goal, {GGUF_NAME: temporary.read_bytes(), "Modelfile": text.encode()}, overwrite=overwrite)
    except OSError as error:
        raise CheckpointError(f"Saving to '{goal}' failed: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return receipt


WRITERS.add("gguf", save_gguf)
WRITERS.add("ollama", save_ollama)


def _write(adapter: Adapter | AdapterFile, path: Path, config: Any, rank: int | None, dtype: str) -> Receipt:
    import gguf

    if dtype not in _DTYPES:
        raise OptionError(
            f"dtype must be one of {', '.join(_DTYPES)}, found {dtype!r}.{near_misses(str(dtype), _DTYPES)}"
        )
    facts = config_facts(config if config is not None else _own_config(adapter))
    family = family_of(facts)
    file, plain, error, notes = plain_updates(adapter, rank)
    _refuse_foreign(file, plain, facts)
    alpha = common_alpha([(p.rank, p.alpha) for p in plain])
    tensors = _tensors(plain, facts, family, alpha)
    check_tensors(tensors, file.name)
    architecture = gguf.MODEL_ARCH[family.architecture]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(file.name)
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().to(_DTYPES[dtype]).contiguous()
        if dtype == "bfloat16":
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, value.view(torch.uint8).numpy(), raw_dtype=kind)
        else:
            writer.add_tensor(name, value.numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return Receipt("export", file.name, len(tensors), len(tensors), len(plain), "match", *error, tuple(notes))


def config_facts(config: Any) -> Mapping[str, Any]:
    """Return a base's config as a mapping, from transformers' object, a mapping or a folder.

    Raises
    ------
    CheckpointError
        There is none, or it cannot be read.
    """
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        try:
            config = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"Cannot read the base's config in '{path}': {error}.") from error
    facts = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(facts, Mapping):
        raise CheckpointError(
            "Writing for llama.cpp needs the config of the base, for its architecture and its heads; give config, the "
            "base's folder."
        )
    return facts


def family_of(facts: Mapping[str, Any]) -> Family:
    """Return how llama.cpp keeps a base, by the class that its config names.

    Raises
    ------
    CheckpointError
        It keeps models of this class in another way than matrix by matrix, or that way is not known here.
    """
    given = facts.get("architectures") or []
    short = str(facts.get("model_type", "")).replace("_", "")
    kind = str(given[0]) if given else next((n for n in FAMILIES if n.lower() == f"{short}forcausallm"), short)
    found = FAMILIES.get(kind)
    if found is None:
        raise CheckpointError(
            f"Adapters for bases of the class {kind} cannot be written for llama.cpp; known are "
            f"{', '.join(FAMILIES)}. Fuse the adapter into the base and convert that with convert_hf_to_gguf.py."
        )
    return found


def interleaved_rows(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of q or k from halves of a head to neighbours: row ``i + j · head / 2`` goes to ``2 i + j``.

    Parameters
    ----------
    rows
        (heads · head, n).
    heads
        How many heads the rows belong to.
    """
    return rows.reshape(heads, 2, -1, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def common_alpha(pairs: Sequence[tuple[int, float]]) -> float:
    """Return the alpha of most sites, given rank and alpha of each; never 0, which llama.cpp takes for no scale."""
    alphas = Counter(alpha for _, alpha in pairs if alpha)
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0
    return float(torch.tensor(alpha, dtype=torch.float32))


def _tensors(plain: Sequence[Plain], facts: Mapping[str, Any], family: Family, alpha: float) -> dict[str, Tensor]:
    """Return all factors by llama.cpp's names; a scale that its one alpha does not give goes into B, rounded once."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.architecture], int(facts["num_hidden_layers"]))
    tensors: dict[str, Tensor] = {}
    for item in plain:
        path, a, b = item.site.path, item.tensors["A"], item.tensors["B"]
        place = names.get_name(path)
        if place is None:
            raise CheckpointError(f"llama.cpp's {family.architecture} has no matrix for the site '{path}'.")
        if item.alpha != alpha:
            b = (b.double() * (item.alpha / alpha)).to(b.dtype)
        if family.interleaved and path.endswith(("q_proj", "k_proj")):
            heads = _heads(facts, path)
            if b.shape[0] % (2 * heads):
                raise CheckpointError(
                    f"The config has {heads} heads, which the {b.shape[0]} rows of '{path}' do not fit: it is another "
                    "base's."
                )
            b = interleaved_rows(b, heads)
        if item.site.kind.name == "embedding":
            a = a.mT
        tensors[f"{place}.weight.lora_a"], tensors[f"{place}.weight.lora_b"] = a, b
    return tensors


def _heads(facts: Mapping[str, Any], path: str) -> int:
    heads = int(facts["num_attention_heads"])
    return heads if path.endswith("q_proj") else int(facts.get("num_key_value_heads") or heads)


def _refuse_foreign(file: AdapterFile, plain: Sequence[Plain], facts: Mapping[str, Any]) -> None:
    """Refuse what a LoRA file of llama.cpp cannot say."""
    if file.flat or file.needs_model:
        raise NeedsBase(f"'{file.where}' does not say where in its model its sites are; load it onto the model first")
    whole = [p for p, m in file.methods.items() if m.whole] + list(file.base_copies)
    if whole:
        raise CheckpointError(
            f"'{whole[0]}' was trained whole, which a LoRA file of llama.cpp cannot hold. Fuse the adapter into the "
            "base and convert that with convert_hf_to_gguf.py."
        )
    for item in plain:
        kind, path = item.site.kind.name, item.site.path
        if kind not in ("linear", "embedding"):
            raise CheckpointError(f"A LoRA file of llama.cpp has no place for '{path}' ({kind}).")
        if path == "lm_head" and facts.get("tie_word_embeddings"):
            raise CheckpointError(
                "The base has one matrix for 'lm_head' and the embedding, and llama.cpp keeps no head to adapt then. "
                "Train without lm_head, or fuse the adapter into the base."
            )


def _own_config(adapter: Adapter | AdapterFile) -> Any:
    """Return the config of the base that the adapter sits on or names; None where there is none."""
    root = adapter.root if isinstance(adapter, AdapterFile) else adapter.state.root
    if root is not None:
        config: Any = getattr(root, "config", None)
        kind = {"architectures": [type(unwrapped(root)).__name__]}
        return {**config.to_dict(), **kind} if hasattr(config, "to_dict") else config
    base = adapter.base if isinstance(adapter, AdapterFile) else ""
    return base if base and (Path(base) / "config.json").is_file() else None


def _base_of(adapter: Adapter | AdapterFile, config: Any) -> str:
    """Return the folder of the base, if there is one."""
    names = [config] if isinstance(config, str | os.PathLike) else []
    if isinstance(adapter, AdapterFile):
        names += [model_name(adapter), adapter.base]
    else:
        names += [str(getattr(getattr(adapter.state.root, "config", None), "_name_or_path", ""))]
    return next((str(Path(n).resolve()) for n in names if n and (Path(n) / "config.json").is_file()), "")


def _llama_cpp(exported: Exported) -> list[str]:
    return [
        exported.quoted("python", "convert_hf_to_gguf.py", exported.base, "--outfile", "base.gguf"),
        exported.quoted("llama-cli", "-m", "base.gguf", "--lora", exported.path),
        exported.quoted("llama-server", "-m", "base.gguf", "--lora", exported.path),
    ]


def _ollama(exported: Exported) -> list[str]:
    return [
        exported.quoted("ollama", "create", exported.name, "-f", exported.path / "Modelfile"),
        exported.quoted("ollama", "run", exported.name),
    ]


USES.add("gguf", _llama_cpp)
USES.add("ollama", _ollama)
