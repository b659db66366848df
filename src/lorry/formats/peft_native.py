"""Adapters of PEFT's other tuners (LoHa, LoKr, VeRA, ...), loaded exactly, as Lorry's own methods.

PEFT opens the folder, since names, seeds and drawn projections are its own; what each tuner's layers hold is then
copied to the tensors of the method that computes the same.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError, CheckpointError
from lorry.core.forward.entry import Entry
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import attach
from lorry.core.method.registry import method_from
from lorry.formats.convolutions import check_convolution
from lorry.formats.file import AdapterFile
from lorry.formats.folders import MANIFEST, PEFT_CONFIG, TENSORS, located
from lorry.formats.reader import READERS, Location, Reader
from lorry.formats.registry import LOADERS
from lorry.formats.tensors import check_finite
from lorry.formats.tuners import NAME as _NAME
from lorry.formats.tuners import TUNERS, no_options, plain, rank_and_alpha
from lorry.formats.tuners import Tuner as _Tuner


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = _NAME,
    trainable: bool = False,
    activate: bool = True,
    dtype: torch.dtype | None = None,
    expect: str | None = None,
    check_base: bool = True,
) -> Adapter:
    """Load a PEFT folder of another tuner than LoRA (AdaLoRA, LoHa, OFT, ...) onto a model, as `lorry.load` does.

    Parameters
    ----------
    model
        The base; a copy of it is made for PEFT to read the folder.
    path
        The folder, with safetensors.
    name
        Of the adapter.
    trainable
        Go on training it.
    activate
        Let it apply from now on.
    dtype
        Of the adapter's floating tensors; float32 if not given.
    expect
        Slug of the method that the folder must hold.
    check_base
        Refuse a folder that holds nothing of any layer, so that it would fit any base, unless it names this one.

    Raises
    ------
    AdapterError
        PEFT is not installed, or the tuner is none that Lorry knows.
    CheckpointError
        The folder is missing, unsafe or no adapter, or its tensors do not fit. The model is as it was.
    """
    location = Location(located(path))
    if not location.has(PEFT_CONFIG) or not location.has(TENSORS):
        raise CheckpointError(f"'{location.path}' is no folder of PEFT's with {PEFT_CONFIG} and {TENSORS}.")
    with _READER.read(location) as file:
        return load_tuner(
            file,
            model,
            name=name,
            trainable=trainable,
            activate=activate,
            dtype=dtype,
            expect=expect,
            check_base=check_base,
        )


class TunerFolder(Reader):
    """A PEFT folder of another tuner than LoRA, whose tensors only PEFT can place in a model."""

    def recognises(self, location: Location) -> bool:
        """Whether the config names another tuner than LoRA."""
        if location.has(MANIFEST) or not location.has(PEFT_CONFIG) or not location.has(TENSORS):
            return False
        return str(location.json(PEFT_CONFIG).get("peft_type", "LORA")).upper() != "LORA"

    def read(self, location: Location) -> AdapterFile:
        """Open it; that Lorry carries the tuner and its options is checked here."""
        place, values = location.path, location.json(PEFT_CONFIG)
        kind = str(values.get("peft_type", "")).upper()
        tuner = _TUNERS.get(kind)
        if tuner is None:
            raise AdapterError(
                f"'{place}' is an adapter of PEFT's tuner {kind}; exactly loaded are {', '.join(sorted(_TUNERS))}, a "
                "LoRA by lorry.load, and others as far as lorry.formats.peft_tuners.convert can."
            )
        left_out = {"bias": (None, "none"), "use_effective_conv2d": (None, False)}
        for option, unset in left_out.items():
            if values.get(option) not in unset:
                raise CheckpointError(
                    f"'{place}' sets {option}={values[option]!r}, which Lorry cannot carry for {kind}."
                )
        return AdapterFile(
            name=place.name,
            method=method_from(tuner.method),
            sites={},
            format="peft-tuner",
            path=place,
            layout="peft",
            file=location.tensors(),
            base=str(values.get("base_model_name_or_path") or ""),
            metadata={"source": "peft", "peft_type": kind},
            loader="peft-tuner",
            needs_model=f"names and drawn projections of PEFT's {kind} are PEFT's own, so it is read onto its model",
        )


_READER = TunerFolder()
READERS.add("peft-tuner", _READER)


def load_tuner(
    file: AdapterFile,
    model: nn.Module,
    *,
    name: str | None = None,
    trainable: bool = False,
    activate: bool = True,
    dtype: torch.dtype | None = None,
    expect: str | None = None,
    check_base: bool = True,
    transient: bool = False,
) -> Adapter:
    """Load an opened folder of another tuner; options as in `load`. PEFT's folders carry no fingerprint to check, so
    `check_base` asks for no more than that something in the file belongs to this base.
    """
    kind = str(file.metadata["peft_type"])
    tuner = _TUNERS[kind]
    file.check_method(expect)
    if check_base:
        _check_drawn(file, model)
    peer = _opened(file, kind, model)
    adapter = _attached(model, tuner, peer, name or _NAME, dtype or torch.float32, activate, file.where)
    adapter.train(trainable)
    return adapter


LOADERS.add("peft-tuner", load_tuner)


def _check_drawn(file: AdapterFile, model: nn.Module) -> None:
    """Raise `CheckpointError` if nothing ties the file to this base: with no tensor at any site, PEFT draws what it
    lacks for a base of any width and depth.
    """
    places = file.file.places if file.file is not None else {}
    sites = {name.rpartition(".")[0] for name in places} - {"", "base_model"}
    own = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if sites or (file.base and file.base == own):
        return
    raise CheckpointError(
        f"'{file.where}' holds vectors that all layers share and nothing of a layer, so it would fit a base of any "
        f"width and depth. It says that its base is '{file.base}', and this model is called '{own}'. Save it in PEFT "
        "with save_indices=True; or, if this is surely the base, load it with check_base=False."
    )


def _attached(
    model: nn.Module, tuner: _Tuner, peer: Any, name: str, dtype: torch.dtype, activate: bool, place: str
) -> Adapter:
    """Return an adapter on `model` that computes what PEFT's model does."""
    inside = dict(peer.base_model.model.named_modules())
    whole = {n: m.modules_to_save[_NAME] for n, m in inside.items() if _NAME in getattr(m, "modules_to_save", ())}
    layers = {n: m for n, m in inside.items() if _holds(m) and n not in whole}
    options = {"method": tuner.method, **tuner.options(peer.peft_config[_NAME])}
    sites = {n: tuner.site(m) for n, m in layers.items()}
    adapter = attach(
        model,
        options,
        targets=list(layers),
        name=name,
        site_options=sites,
        train_also=list(whole),
        dtype=dtype,
        activate=activate,
    )
    try:
        _fill(adapter, tuner, peer.base_model, layers, whole)
        _check_updates(adapter, tuner, layers, place)
    except BaseException:
        adapter.detach()
        raise
    return adapter


def _opened(adapter: AdapterFile, kind: str, model: nn.Module) -> Any:
    """Return PEFT's model with the adapter, every tensor of which is finite and was found."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise AdapterError(f"Reading PEFT's tuner {kind} needs peft: {error}.") from None
    place, file = adapter.path, adapter.file
    assert place is not None and file is not None
    adapter.read_all()
    assert adapter.loaded is not None
    try:
        check_finite(adapter.loaded.tensors, place)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Its values are not finite; nothing was loaded.") from None
    try:
        peer = PeftModel.from_pretrained(copy.deepcopy(model), str(place))
    except Exception as error:  # whatever another tool makes of a damaged file
        raise CheckpointError(f"PEFT cannot read '{place}' as {kind} for this model: {error}") from None
    there, wanted = set(file.places), set(get_peft_model_state_dict(peer, save_embedding_layers=False))
    if there != wanted:
        raise CheckpointError(
            f"'{place}' does not fit the model; nothing was loaded. Missing: {sorted(wanted - there)[:3]}, surplus: "
            f"{sorted(there - wanted)[:3]}."
        )
    return peer


def _holds(module: nn.Module) -> bool:
    return any(_NAME in getattr(module, n, {}) for n in getattr(module, "adapter_layer_names", ()))


def _fill(
    adapter: Adapter, tuner: _Tuner, peer: Any, layers: Mapping[str, nn.Module], whole: Mapping[str, nn.Module]
) -> None:
    theirs = layers.keys() | whole.keys()
    if adapter.entries.keys() != theirs:
        raise CheckpointError(f"PEFT has layers at {sorted(theirs)}, the model has sites at {sorted(adapter.entries)}.")
    values = {f"shared.{n}": t for n, t in tuner.shared(peer).items()}
    for path, layer in layers.items():
        values |= {f"{path}.{n}": t for n, t in tuner.tensors(layer, adapter.entries[path]).items()}
    for path, module in whole.items():
        values |= {f"{path}.{n}": t for n, t in module.named_parameters()}
    own = {name: (tensor, spec) for name, tensor, spec in adapter.named_tensors()}
    with torch.no_grad():
        for name, value in values.items():
            tensor, spec = own[name]
            if tensor.numel() != value.numel():
                raise CheckpointError(f"'{name}' must be of shape {tuple(tensor.shape)}, found {tuple(value.shape)}.")
            if (wrong := spec.misplaced(value)) is not None:
                raise CheckpointError(f"'{name}' must hold {wrong}; nothing was loaded. The file is damaged.")
            tensor.copy_(value.reshape(tensor.shape))


def _check_updates(adapter: Adapter, tuner: _Tuner, layers: Mapping[str, nn.Module], where: str) -> None:
    """Raise `CheckpointError` if Lorry's update of a weight is not PEFT's."""
    if tuner.update is None:
        return
    for path, layer in layers.items():
        entry = adapter.entries[path]
        check_convolution(where, entry.site, factors=False)
        with torch.no_grad():
            ours, theirs = entry.delta(), tuner.update(layer)
            rough = 1e-3 if min(ours.dtype.itemsize, theirs.dtype.itemsize) > 2 else 3e-2
            ours, theirs = ours.float(), entry.site.kind.to_matrix(entry.site, theirs.float()).to(ours.device)
            fits = theirs.shape == ours.shape and bool((theirs - ours).norm() <= rough * theirs.norm())
        if not fits:
            raise CheckpointError(
                f"'{where}': at '{path}' ({entry.site.kind.name} of {tuple(entry.site.shape)}) PEFT makes another "
                f"update of its tensors than {type(entry.method).__name__} does, so it cannot be carried as such; "
                "nothing was loaded. Convert it to a plain LoRA with lorry.formats.peft_tuners.convert(path, "
                "base_model, out), or where PEFT has no conversion merge it there into its base (merge_and_unload)."
            )


def _adalora_site(layer: Any) -> dict[str, Any]:
    """The rank that is left, and the scale, which PEFT divides by it."""
    rank = len(layer.lora_A[_NAME])
    scale = float(layer.scaling[_NAME]) / (float(layer.ranknum[_NAME]) + 1e-5)
    return {"initial_rank": rank, "target_rank": rank, "alpha": scale * rank}


def _lokr(layer: Any, entry: Entry) -> dict[str, Tensor]:
    """C is PEFT's w1 and D its w2, each whole or in two factors."""
    found: dict[str, Tensor] = {}
    for ours, theirs in (("C", "lokr_w1"), ("D", "lokr_w2")):
        whole = ours in entry.tensors()
        names = {ours: theirs} if whole else {f"{ours}_b": f"{theirs}_a", f"{ours}_a": f"{theirs}_b"}
        found |= {mine: getattr(layer, peer)[_NAME].detach() for mine, peer in names.items()}
    return found


def _shira(layer: Any, entry: Entry) -> dict[str, Tensor]:
    """Positions in ascending order, with their values."""
    rows, columns = layer.shira_indices[_NAME].long()
    if bool(((columns < 0) | (columns >= layer.in_features)).any()):
        raise CheckpointError(
            f"'{entry.site.path}' has {layer.in_features} columns, and the file names columns {int(columns.min())} to "
            f"{int(columns.max())}; nothing was loaded. The file is damaged."
        )
    index, order = (rows * layer.in_features + columns).sort()
    return {"index": index, "values": layer.shira_weight[_NAME].detach()[order]}


def _unilora(layer: Any, entry: Entry) -> dict[str, Tensor]:
    indices = (layer.unilora_indices_A[_NAME], layer.unilora_indices_B[_NAME])
    return {"index": torch.cat([i.flatten() for i in indices])}


def _unilora_shared(model: Any) -> dict[str, Tensor]:
    theta = model.unilora_theta_d[_NAME].detach()
    roots = torch.zeros_like(theta)
    for module in model.modules():
        if _NAME in getattr(module, "unilora_scales_A", {}):
            for side in "AB":
                indices = getattr(module, f"unilora_indices_{side}")[_NAME]
                roots[indices.long()] = getattr(module, f"unilora_scales_{side}")[_NAME].to(roots)
    return {"theta": theta, "inverse_roots": roots}


_TUNERS: dict[str, _Tuner] = {
    **TUNERS,
    "ADALORA": _Tuner("adalora", lambda c: {}, _adalora_site, plain(A="lora_A", B="lora_B", E="lora_E")),
    "HIRA": _Tuner(
        "hira",
        lambda c: {"rank": c.r},
        lambda m: {"rank": m.r[_NAME]},
        plain(A="hira_A", B="hira_B"),
        update=lambda m: m.get_delta_weight(_NAME) * m.get_base_layer().weight,
    ),
    "LOHA": _Tuner(
        "loha",
        lambda c: {"rank": c.r, "alpha": float(c.alpha)},
        rank_and_alpha,
        plain(B1="hada_w1_a", A1="hada_w1_b", B2="hada_w2_a", A2="hada_w2_b"),
    ),
    "LOKR": _Tuner(
        "lokr",
        lambda c: {"rank": c.r, "factor": c.decompose_factor, "decompose_both": c.decompose_both},
        rank_and_alpha,
        _lokr,
    ),
    "SHIRA": _Tuner(
        "shira",
        lambda c: {"rank": c.r},
        no_options,
        _shira,
        update=lambda m: m.get_delta_weight(_NAME).to_dense(),
    ),
    "UNILORA": _Tuner(
        "uni-lora",
        lambda c: {"rank": c.r, "size": c.theta_d_length, "save_indices": True},
        no_options,
        _unilora,
        _unilora_shared,
    ),
    "VERA": _Tuner(
        "vera",
        lambda c: {"rank": c.r, "save_projection": True},
        no_options,
        plain(lambda_b="vera_lambda_b", lambda_d="vera_lambda_d"),
        lambda model: {"projection_A": model.vera_A[_NAME], "projection_B": model.vera_B[_NAME]},
    ),
}
