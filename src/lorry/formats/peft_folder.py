"""Reading PEFT's folder of a LoRA."""

from __future__ import annotations

from collections.abc import Mapping

from lorry.core.errors import CheckpointError
from lorry.core.method.declared import whole_module
from lorry.formats.file import AdapterFile
from lorry.formats.folders import MANIFEST, PEFT_CONFIG, TENSORS
from lorry.formats.peft_config import PeftConfig, understood
from lorry.formats.peft_extras import EXTRAS, has_extras
from lorry.formats.reader import READERS, Location, Reader
from lorry.formats.stored import LORA_BIAS, StoredSite, check_complete, sort_peft_keys


class PeftFolder(Reader):
    """A folder with PEFT's ``adapter_config.json`` of a LoRA, and without a manifest of Lorry's."""

    def recognises(self, location: Location) -> bool:
        """Whether there are a config of a LoRA and tensors."""
        if location.has(MANIFEST) or not location.has(PEFT_CONFIG) or not location.has(TENSORS):
            return False
        return str(location.json(PEFT_CONFIG).get("peft_type", "LORA")).upper() == "LORA"

    def read(self, location: Location) -> AdapterFile:
        """Open it; every option of the config is understood or refused."""
        config = understood(location.json(PEFT_CONFIG), str(location.path / PEFT_CONFIG))
        file, where = location.tensors(), str(location.path)
        keys = sort_peft_keys(file.places, where)
        if not keys.sites and not keys.whole:
            raise CheckpointError(f"'{file.path}' holds no tensors.")
        sites: dict[str, StoredSite] = {}
        parameters = bool(config.values.get("target_parameters"))
        wanted: tuple[str, ...] = ("A", "B", "magnitude") if config.values.get("use_dora") else ("A", "B")
        wanted += (LORA_BIAS,) if config.values.get("lora_bias") else ()
        for (module, depth), names in keys.sites.items():
            if len(names) != len(wanted):
                check_complete(names, module, wanted, where)
            label = module if not depth else module + ".base_layer" * depth
            kind = "conv" if len(file.places[names["A"]].shape) > 2 else None
            if "lora_embedding_A" in names["A"]:
                kind = "embedding"
            parameter = parameters and (depth > 0 or not config.targeted(module))
            method = config.method(module, parameter=parameter, start=kind != "embedding")
            if names["A"].find(".base_layer.") > 0 and module.endswith(".out_proj"):
                kind = "qkv"
            sites[label] = StoredSite(module, method, names, depth, kind, parameter=parameter)
        for label in [p for p, s in sites.items() if s.kind == "qkv"]:
            owner = sites.get(label.removesuffix(".out_proj"))
            if owner is not None:
                owner.kind = "qkv"
        copies = whole_sites(config, keys.whole, sites)
        values = config.values
        facts = {"source": "peft", **{k: values[k] for k in ("task_type", "peft_version") if values.get(k)}}
        return AdapterFile(
            name=location.path.name,
            method=config.method(""),
            sites=sites,
            format="peft",
            path=location.path,
            layout="peft",
            file=file,
            base=str(values.get("base_model_name_or_path") or ""),
            metadata=facts,
            notes=config.notes,
            config=config,
            base_copies=copies,
            targets=lambda: config.values,
            needs_model=EXTRAS if has_extras(config) else "",
        )


READERS.add("peft", PeftFolder())


def whole_sites(config: PeftConfig, whole: Mapping[str, str], sites: dict[str, StoredSite]) -> dict[str, str]:
    """Add the modules that were trained whole to `sites`; return the parameters that are none of theirs.

    As in PEFT, an entry of ``modules_to_save`` is the end of a path, of its last name too: ``norm`` means
    ``input_layernorm`` as well.
    """
    saved = tuple(config.values.get("modules_to_save") or ())
    full = whole_module()
    copies = {}
    for path, key in whole.items():
        words = path.replace(".base_layer.", ".").split(".")
        for size in range(1, len(words)):
            module = ".".join(words[:size])
            if module.endswith(saved):
                stored = sites.setdefault(module, StoredSite(module, full, kind="block", shape=(0, 0)))
                stored.keys[".".join(words[size:])] = key
                break
        else:
            copies[".".join(words)] = key
    return copies
