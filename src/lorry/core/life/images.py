"""All tensors of an adapter as one vector of bytes, bit for bit, as they lie in host memory, in files and in pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorry.core.errors import AdapterError
from lorry.core.forward.entry import TensorHome

#: Bytes to whose multiples tensors are aligned, so that they serve every kernel as fresh ones would.
ALIGNED = 64
Values = Mapping[TensorHome, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a vector of bytes.

    Attributes
    ----------
    name, dtype, shape
        Of the tensor.
    stride
        In elements; memory order is kept, so that kernels compute the same bits afterwards.
    start
        First byte.
    nbytes
        Number of bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def stop(self) -> int:
        """The byte behind the last one."""
        return self.start + self.nbytes

    def of(self, own: Tensor) -> Tensor:
        """Return the tensor that shares the memory of its bytes ``(nbytes,)``."""
        if not self.nbytes:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=own.device)
        return own.view(self.dtype).as_strided(self.shape, self.stride)


#: The slots of every home, home after home.
Plan = Mapping[TensorHome, Sequence[Slot]]


def plan_of(values: Values, who: str) -> Plan:
    """Return how tensors lie one after another.

    Raises
    ------
    AdapterError
        A tensor that has no plain memory of its own (sharded, sparse, quantised).
    """
    plan: dict[TensorHome, list[Slot]] = {}
    for home, tensors in values.items():
        plan[home] = []
        for name, tensor in tensors.items():
            if (
                type(tensor) not in (Tensor, torch.nn.Parameter)
                or tensor.layout != torch.strided
                or tensor.is_quantized
            ):
                raise AdapterError(
                    f"Tensor '{name}' of adapter '{who}' is a {type(tensor).__name__} ({tensor.layout}). Only plain "
                    "dense tensors can be placed; leave the adapter on the device."
                )
            # a copy as torch would make it: dense, in the same memory order
            stride = torch.empty_like(tensor, device="meta").stride()
            plan[home].append(Slot(name, tensor.dtype, tuple(tensor.shape), stride, 0, tensor.nbytes))
    return arranged(plan)


def arranged(plan: Plan, page_bytes: int | None = None) -> Plan:
    """Return the same tensors one after another; with pages, one that fits into a page does not cross into the next,
    and one that does not fit begins with a page.
    """
    position = 0
    moved: dict[TensorHome, list[Slot]] = {}
    for home, slots in plan.items():
        moved[home] = []
        for slot in slots:
            position = rounded(position, ALIGNED)
            if page_bytes is not None and slot.nbytes > -position % page_bytes:
                position = rounded(position, page_bytes)
            moved[home].append(replace(slot, start=position))
            position += slot.nbytes
    return moved


def size_of(plan: Plan) -> int:
    """Return the number of bytes, a multiple of `ALIGNED`."""
    return rounded(max((slots[-1].stop for slots in plan.values() if slots), default=0), ALIGNED)


def rounded(number: int, step: int) -> int:
    """Return the next multiple of `step`."""
    return -(-number // step) * step


class Image:
    """Tensors of an adapter in one piece of memory.

    Attributes
    ----------
    flat
        All bytes.
    plan
        Where the tensors lie in it.
    tensors
        Home -> its tensors, which share the memory of `flat`.
    """

    def __init__(self, flat: Tensor, plan: Plan) -> None:
        self.flat = flat
        self.plan = plan
        self.tensors = {h: {s.name: s.of(flat[s.start : s.stop]) for s in slots} for h, slots in plan.items()}

    @classmethod
    def packed(cls, values: Values, plan: Plan) -> Image:
        """Return copies of tensors in host memory."""
        with torch.inference_mode(False), torch.no_grad():
            devices = {t.device.type for tensors in values.values() for t in tensors.values()}
            image = cls(host_memory(size_of(plan), "cuda" in devices), plan)
            for home, tensors in values.items():
                for name, tensor in tensors.items():
                    image.tensors[home][name].copy_(tensor.detach())
        return image

    def unpacked(
        self, device_of: Callable[[TensorHome], torch.device], stream: object = None
    ) -> dict[TensorHome, dict[str, Tensor]]:
        """Return copies of all tensors on the device of each home, in one piece where it is the same for all."""
        devices = {home: device_of(home) for home in self.plan}
        with torch.inference_mode(False), torch.no_grad():
            if len(set(devices.values())) == 1:
                return Image(copied(self.flat, next(iter(devices.values())), stream), self.plan).tensors
            return {h: on_device(tensors, devices[h], copy=True) for h, tensors in self.tensors.items()}


def host_memory(size: int, pinned: bool = False) -> Tensor:
    """Return zeroed host memory; page-locked where tensors go to and come from a CUDA device."""
    return torch.zeros(size, dtype=torch.uint8, pin_memory=pinned and torch.cuda.is_available())


def on_device(tensors: Mapping[str, Tensor], device: torch.device, *, copy: bool = False) -> dict[str, Tensor]:
    """Return tensors on a device, in their own memory order."""
    with torch.inference_mode(False), torch.no_grad():
        return {n: t.to(device, copy=copy) for n, t in tensors.items()}


def copied(flat: Tensor, device: torch.device, stream: object = None) -> Tensor:
    """Return a copy on a device.

    Parameters
    ----------
    flat
        Bytes in host memory.
    device
        Where they are needed.
    stream
        The CUDA stream that is going to use them, if the copy is to be made beside what runs there.
    """
    if not isinstance(stream, torch.cuda.Stream) or stream.device != device:
        return flat.to(device, copy=True)
    with torch.cuda.stream(stream):  # the memory belongs to the stream that uses it, so its reuse is in order
        fresh = torch.empty_like(flat, device=device)
    side = torch.cuda.Stream(device)
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        fresh.copy_(flat, non_blocking=True)
    side.synchronize()
    return fresh
