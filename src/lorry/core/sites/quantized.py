"""Quantised storage: bitsandbytes in 8 and 4 bit, and torchao.

A weight is recognised by its class and the package that the class comes from, so that this file costs nothing where
neither package is used. Reading dequantises; writing quantises again with the settings of the weight that is there.
Both lose precision, which `lorry.core.life.fuse` measures.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import SiteError
from lorry.core.sites.storage import Storage, Stored, register_storage


def _is(weight: Tensor, package: str, name: str = "") -> bool:
    """Whether the class of `weight`, or one it derives from, comes from `package` and is called `name`."""
    return any(
        cls.__module__.partition(".")[0] == package and (not name or cls.__name__ == name)
        for cls in type(weight).__mro__
    )


class BitsAndBytes8bit(Storage):
    """``bitsandbytes.nn.Int8Params``: int8 values ``(out, in)`` and a scale for each row (LLM.int8(), arXiv
    2208.07339).
    """

    name = "bitsandbytes 8 bit"
    lossless = False

    def keeps(self, weight: Tensor) -> bool:
        """Whether it is an Int8Params that was quantised."""
        return _is(weight, "bitsandbytes", "Int8Params") and weight.dtype == torch.int8

    def read(self, place: Stored) -> Tensor:
        """Return values times scales in float32."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        values: Tensor = int8_vectorwise_dequant(place.stored.data, self._scales(place))
        return values

    def encode(self, place: Stored, value: Tensor) -> nn.Parameter:
        """Quantise row by row, from float16 as the package does."""
        from bitsandbytes.functional import int8_vectorwise_quant

        present: Any = place.stored
        # The layer moves values and scales from the weight into itself at its first forward and uses those from
        # then on. Both the present weight and the new one carry them, so the layer takes them up anew whenever the
        # weight is exchanged.
        present.CB, present.SCB = present.data, self._scales(place)
        values, scales, _ = int8_vectorwise_quant(value.to(torch.float16))
        fresh: nn.Parameter = type(present)(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
        return fresh

    def codes(self, place: Stored) -> Sequence[Tensor]:
        """Return values and scales."""
        return [place.stored.data, self._scales(place)]

    @staticmethod
    def _scales(place: Stored) -> Tensor:
        """Return the scales, which lie in the weight before the layer's first forward and in the layer after it."""
        own = getattr(place.stored, "SCB", None)
        scales = own if own is not None else place.holder.state.SCB  # type: ignore[union-attr]
        assert isinstance(scales, Tensor)
        return scales


class BitsAndBytes4bit(Storage):
    """``bitsandbytes.nn.Params4bit``: nf4 or fp4 blocks, their scales quantised too or not (QLoRA, arXiv
    2305.14314).
    """

    name = "bitsandbytes 4 bit"
    lossless = False

    def keeps(self, weight: Tensor) -> bool:
        """Whether it is a Params4bit that was quantised."""
        return _is(weight, "bitsandbytes", "Params4bit") and getattr(weight, "quant_state", None) is not None

    def read(self, place: Stored) -> Tensor:
        """Return the dequantised weight ``(out, in)`` in the dtype that it was quantised from."""
        from bitsandbytes.functional import dequantize_4bit

        data, state = self.plain(place.stored)
        values: Tensor = dequantize_4bit(data, state)
        return values

    def encode(self, place: Stored, value: Tensor) -> nn.Parameter:
        """Quantise with the same block size, code and treatment of scales."""
        present: Any = place.stored
        fresh: Any = type(present)(
            value.detach().to(torch.float32).cpu().contiguous(),
            requires_grad=False,
            blocksize=present.blocksize,
            compress_statistics=present.compress_statistics,
            quant_type=present.quant_type,
            quant_storage=present.quant_storage,
        )
        fresh = fresh.to(present.device)
        state = present.quant_state
        fresh.quant_state.dtype = getattr(state, "original_dtype", state.dtype)
        parameter: nn.Parameter = fresh
        return parameter

    def codes(self, place: Stored) -> Sequence[Tensor]:
        """Return the 4-bit codes. The scales are left out: on some processors the layer rounds them in evaluation."""
        data, _ = self.plain(place.stored)
        return [data]

    @staticmethod
    def plain(weight: Any) -> tuple[Tensor, Any]:
        """Return data and state in the ordinary layout.

        On processors with AVX-512 BF16 the layer repacks its weight at the first forward in evaluation: the codes in
        another order, the scales ``(in / block, out)``, rounded to bfloat16 and no longer quantised themselves. The
        weight with which the layer computes from then on is the one of these scales.
        """
        packed = weight.quant_state
        if not getattr(packed, "packing_format_for_cpu", False):
            return weight.data, packed
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        # the package's inverse changes the state that it is given, quantises the scales again (with another offset)
        # where they were, and leaves them transposed where they were not: only its codes are used
        data, _ = _convert_weight_packed_for_cpu_inverse(weight.data, copy.copy(packed))
        state = copy.copy(packed)
        state.absmax = packed.absmax.T.contiguous().reshape(-1).float()
        state.nested, state.packing_format_for_cpu, state.dtype = False, False, packed.original_dtype
        return data, state


class TorchAO(Storage):
    """A weight that ``torchao.quantization.quantize_`` left: a tensor subclass with ``dequantize`` and ``from_hp``."""

    name = "torchao"
    lossless = False

    def keeps(self, weight: Tensor) -> bool:
        """Whether its class comes from torchao and can be dequantised."""
        return _is(weight, "torchao") and hasattr(weight, "dequantize")

    def read(self, place: Stored) -> Tensor:
        """Return the dequantised weight in the dtype that it stands for."""
        stored: Any = place.stored.detach()
        values: Tensor = stored.dequantize()
        return values

    def encode(self, place: Stored, value: Tensor) -> nn.Parameter:
        """Quantise with the settings that the present weight shows.

        Raises
        ------
        SiteError
            The class of the weight does not say how it was made.
        """
        weight: Any = place.stored
        kind = type(weight)
        make = getattr(kind, "from_hp", None)
        if make is None:
            raise self._unknown(place, "it has no from_hp")
        _, *parameters = inspect.signature(make).parameters.values()
        settings: dict[str, Any] = {}
        for parameter in parameters:
            try:
                settings[parameter.name] = self._setting(weight, parameter.name)
            except AttributeError:
                if parameter.default is inspect.Parameter.empty:
                    raise self._unknown(place, f"its {parameter.name} is not kept") from None
        return nn.Parameter(make(value.to(weight.dtype), **settings), requires_grad=False)

    def codes(self, place: Stored) -> Sequence[Tensor] | None:
        """Return the plain tensors inside the weight, in the order in which its class names them."""
        stored: Any = place.stored.detach()
        if not hasattr(stored, "__tensor_flatten__"):
            return None
        return [inner for name in stored.__tensor_flatten__()[0] if isinstance(inner := getattr(stored, name), Tensor)]

    @staticmethod
    def _setting(weight: Any, name: str) -> Any:
        """Return one argument of ``from_hp`` as the weight shows it; AttributeError if it does not."""
        if name in ("scale", "zero_point"):
            raise AttributeError(name)  # chosen anew for the new values
        if name == "float8_dtype":
            return weight.qdata.dtype
        if name == "granularity":
            return _granularity(tuple(weight.block_size), tuple(weight.shape))
        if name == "mapping_type":
            from torchao.quantization.quant_primitives import MappingType

            shifted = weight.zero_point is not None and bool(weight.zero_point.any())
            return MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC
        return getattr(weight, name)

    @staticmethod
    def _unknown(place: Stored, reason: str) -> SiteError:
        return SiteError(
            f"The weight of '{place.path}' is a torchao {type(place.stored).__name__} that cannot be quantised again "
            f"in the same way ({reason}). Serve the adapter unfused, or fuse it into the base before quantising."
        )


def keep_differentiable(root: nn.Module) -> None:
    """Let gradients flow through the 4-bit layers of a model that is evaluated between steps of training.

    On processors with AVX-512 BF16, bitsandbytes repacks a layer at its first forward in evaluation, and no gradient
    passes the product with what it makes, in training mode neither. The layers of `root` are put into the ordinary
    layout, with the weights by which they were evaluated, and stay there.
    """
    if "bitsandbytes" not in sys.modules:
        return
    for module in root.modules():
        weight: Any = module._parameters.get("weight")
        if module.__dict__.get("support_avx512bf16_for_cpu") and weight is not None:
            module.__dict__["support_avx512bf16_for_cpu"] = False
            if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
                weight.data, weight.quant_state = BitsAndBytes4bit.plain(weight)
                module.quant_state = weight.quant_state


def _granularity(block: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    from torchao.quantization.granularity import PerBlock, PerRow, PerTensor

    if block == shape:
        return PerTensor()
    if block == (*[1] * (len(shape) - 1), shape[-1]):
        return PerRow()
    return PerBlock(list(block))


register_storage(TorchAO())
register_storage(BitsAndBytes4bit())
register_storage(BitsAndBytes8bit())
