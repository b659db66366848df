"""``lorry doctor``: what this machine and this installation can do."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorry.cli.arguments import Json
from lorry.cli.output import facts_table, out, print_json, size, table

#: Package -> the extra that brings it (none where the project needs it anyway), and what it adds.
OPTIONAL: dict[str, tuple[str, str]] = {
    "transformers": ("train", "bases and tokenizers: train, eval, generate, chat"),
    "accelerate": ("train", "several processes and devices"),
    "datasets": ("train", "folders written by datasets.save_to_disk, Parquet"),
    "matplotlib": ("train", "loss curves and heat maps"),
    "scipy": ("train", "some merges and statistics"),
    "diffusers": ("diffusion", "U-Nets and diffusion transformers as bases"),
    "bitsandbytes": ("quantized", "bases in 4 and 8 bits"),
    "torchao": ("quantized", "bases in torchao's quantised tensors"),
    "tensorboard": ("tensorboard", "the logger 'tensorboard'"),
    "wandb": ("wandb", "the logger 'wandb'"),
    "scikit-learn": ("claims", "data sets of some claims"),
    "peft": ("dev", "the peer of benchmarks: lorry bench"),
    "triton": ("dev", "kernels for batches of many adapters on a GPU"),
}
#: Flags of /proc/cpuinfo that decide which kernels torch has for low precision.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")


def doctor(as_json: Json = False) -> None:
    """Show versions, devices, instruction sets, threads, and which optional packages are there or missing."""
    report = examined()
    if as_json:
        print_json(report)
        return
    rows = [(name, f"{value}") for name, value in report["versions"].items()]
    out().print(facts_table("Versions", rows))
    machine = report["machine"]
    facts = [
        ("processor", f"{machine['processor']}, {machine['cores']} cores, {size(machine['memory'])} of memory"),
        (
            "instruction sets",
            f"torch uses {machine['torch_uses']}; there are {' '.join(machine['flags']) or 'no others'}",
        ),
        ("threads", f"torch {machine['threads']}, OMP_NUM_THREADS {machine['omp'] or 'not set'}"),
        *((f"device {i}", f"{d['name']}, {size(d['memory'])}") for i, d in enumerate(report["devices"])),
        *([] if report["devices"] else [("devices", "none besides the processor")]),
        ("hub", f"cache {report['hub']['cache']}" + (", offline (HF_HUB_OFFLINE)" if report["hub"]["offline"] else "")),
    ]
    out().print(facts_table("Machine", facts))
    shown = [
        (
            name,
            entry["version"] or "missing",
            entry["adds"],
            "" if entry["version"] else f"pip install 'lorry[{entry['extra']}]'",
        )
        for name, entry in report["optional"].items()
    ]
    out().print(table("Optional packages", ("package", "version", "what it adds", "to get it"), shown))


def examined() -> dict[str, Any]:
    """Return all facts as plain data."""
    import torch

    import lorry

    cpu, flags = _processor()
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    optional = {
        name: {"version": installed(name), "extra": extra, "adds": adds} for name, (extra, adds) in OPTIONAL.items()
    }
    return {
        "versions": {
            "lorry": lorry.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": installed("safetensors"),
            "system": platform.platform(),
        },
        "machine": {
            "processor": cpu,
            "cores": os.cpu_count(),
            "memory": pages,
            "flags": flags,
            "torch_uses": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "omp": os.environ.get("OMP_NUM_THREADS"),
        },
        "devices": [{"name": d.name, "memory": d.total_memory} for d in devices],
        "hub": _hub(),
        "optional": optional,
    }


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> tuple[str, list[str]]:
    """Return the processor's name and those of its flags that matter here."""
    facts: dict[str, str] = {}
    file = Path("/proc/cpuinfo")
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    there = (facts.get("flags") or facts.get("Features") or "").split()
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, [flag for flag in _FLAGS if flag in there]


def _hub() -> dict[str, Any]:
    if importlib.util.find_spec("huggingface_hub") is None:
        return {"cache": None, "offline": True}
    from huggingface_hub import constants

    return {"cache": constants.HF_HUB_CACHE, "offline": constants.HF_HUB_OFFLINE}
