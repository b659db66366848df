"""The messages of the client ``tinker`` that go as protocol buffers: training data in, tensors and samples out.

The schema is the public one of the client, version 0.38; field numbers are all that both sides share, so the messages
are declared here by name, number and type, in a pool of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorry.serving.results import Completed
from lorry.serving.training.datum import Datum
from lorry.serving.training.errors import Refused

MEDIA = "application/x-protobuf"
#: Where no alternative is known: the client's own mark.
_NOTHING = (0, -99999.0)

# type, or ``*type`` for a repeated field, ``{type}`` for a map from strings, ``?type`` for one that may be absent
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "SparseCsr": {"values": (1, "bytes"), "crow_indices": (2, "bytes"), "col_indices": (3, "bytes")},
    "Tensor": {"dense": (1, "?bytes"), "sparse_csr": (2, "SparseCsr"), "dtype": (3, "int32"), "shape": (4, "*int64")},
    "EncodedTextChunk": {"tokens": (1, "bytes")},
    "Chunk": {"encoded_text": (1, "EncodedTextChunk")},
    "Datum": {"model_input": (1, "*Chunk"), "loss_fn_inputs": (2, "{Tensor}")},
    "LossConfigValue": {"number": (1, "?double"), "text": (2, "?string")},
    "ForwardBackwardRequest": {
        "model_id": (1, "string"), "seq_id": (2, "int32"), "data": (3, "*Datum"), "loss_fn": (4, "string"),
        "loss_fn_config": (5, "{double}"), "forward_only": (6, "bool"), "loss_fn_config_v2": (7, "{LossConfigValue}"),
    },
    "BatchedTensor": {
        "data": (1, "bytes"), "offsets": (2, "bytes"), "dtype": (3, "int32"), "trailing_shape": (4, "*int64"),
    },
    "ArrayRecord": {"type_tag": (1, "string"), "fields": (2, "{BatchedTensor}"), "num_datums": (3, "int64")},
    "ForwardBackwardOutput": {
        "loss_fn_output_type": (1, "string"), "loss_fn_outputs": (2, "*ArrayRecord"), "metrics": (3, "{double}"),
    },
    "TopkLogprobs": {
        "token_ids": (1, "bytes"), "logprobs": (2, "bytes"), "k": (3, "uint32"), "length": (4, "uint32"),
    },
    "SampledSequence": {
        "stop_reason": (1, "int32"), "tokens": (2, "bytes"), "logprobs": (3, "?bytes"),
        "topk_sampled_logprobs": (4, "TopkLogprobs"),
    },
    "SampleResponse": {
        "sequences": (1, "*SampledSequence"), "prompt_logprobs": (2, "?bytes"),
        "topk_prompt_logprobs": (3, "TopkLogprobs"), "prompt_cache_hit_tokens": (4, "int32"),
        "target_prompt_logprobs": (5, "Tensor"),
    },
}  # fmt: skip
_TYPES = {1: torch.float32, 2: torch.int64, 3: torch.int32, 4: torch.bfloat16}
_FLOAT32, _STOP, _LENGTH = 1, 0, 1


@cache
def messages() -> dict[str, Any]:
    """Return the classes of the messages by name."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    package = "lorry.tinker"
    file = descriptor_pb2.FileDescriptorProto(name="lorry/tinker.proto", package=package, syntax="proto3")
    field_types: Any = descriptor_pb2.FieldDescriptorProto
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for label, (number, kind) in fields.items():
            _declare(field_types, message, label, number, kind, package)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {n: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{n}")) for n in _MESSAGES}


def _declare(types: Any, message: Any, label: str, number: int, kind: str, package: str) -> None:
    """Add a field to a message."""
    field = message.field.add(name=label, number=number, label=types.LABEL_OPTIONAL)
    if kind.startswith("{"):
        entry = message.nested_type.add(name="".join(part.title() for part in label.split("_")) + "Entry")
        entry.options.map_entry = True
        _declare(types, entry, "key", 1, "string", package)
        _declare(types, entry, "value", 2, kind[1:-1], package)
        field.label, field.type = types.LABEL_REPEATED, types.TYPE_MESSAGE
        field.type_name = f".{package}.{message.name}.{entry.name}"
        return
    if kind.startswith("*"):
        field.label = types.LABEL_REPEATED
    elif kind.startswith("?"):
        field.proto3_optional = True
        field.oneof_index = len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{label}")
    kind = kind.lstrip("*?")
    if kind in _MESSAGES:
        field.type, field.type_name = types.TYPE_MESSAGE, f".{package}.{kind}"
    else:
        field.type = getattr(types, f"TYPE_{kind.upper()}")


class PassRequest:
    """A request for a forward pass, or a forward and a backward one.

    Parameters
    ----------
    body
        As the client sent it.

    Attributes
    ----------
    model, seq, forward_only, loss, config
        As in the message.

    Raises
    ------
    Refused
        It is no such message.
    """

    def __init__(self, body: bytes) -> None:
        from google.protobuf.message import DecodeError

        found = messages()["ForwardBackwardRequest"]()
        try:
            found.ParseFromString(body)
        except DecodeError:
            raise Refused("The body is no message ForwardBackwardRequest; use the client 'tinker'.") from None
        self.model: str = found.model_id
        self.seq: int = found.seq_id
        self.forward_only: bool = found.forward_only
        self.loss: str = found.loss_fn
        self.config: dict[str, float | str] = dict(found.loss_fn_config)
        for name, value in found.loss_fn_config_v2.items():
            self.config[name] = value.text if value.HasField("text") else value.number
        self._data = found.data

    def data(self) -> list[Datum]:
        """Return the examples; raise `Refused` if they are not what they should be."""
        return [_datum(each, place) for place, each in enumerate(self._data)]


def _datum(message: Any, place: int) -> Datum:
    parts = []
    for chunk in message.model_input:
        if not chunk.HasField("encoded_text"):
            raise Refused(f"Example {place} holds something else than tokens of text, which this base cannot read.")
        parts.append(_read(chunk.encoded_text.tokens, torch.int32, f"the tokens of example {place}"))
    tokens = torch.cat(parts).long() if parts else torch.zeros(0, dtype=torch.long)
    inputs = {n: _tensor(t, f"'{n}' of example {place}") for n, t in message.loss_fn_inputs.items()}
    return Datum(tokens, inputs)


def _read(data: bytes, dtype: torch.dtype, what: str) -> Tensor:
    if len(data) % dtype.itemsize:
        raise Refused(f"The bytes of {what} are no whole number of {dtype} values.")
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.zeros(0, dtype=dtype)


def _tensor(message: Any, what: str) -> Tensor:
    """Return a tensor of the client, a sparse one filled up with zeros."""
    dtype, shape = _TYPES.get(message.dtype), tuple(message.shape)
    if dtype is None:
        raise Refused(f"The type of {what} is {message.dtype}; expected float32 or int64.")
    if any(n < 0 for n in shape) or len(shape) > 2:
        raise Refused(f"The shape of {what} is {shape}; expected one or two dimensions.")
    if not message.HasField("sparse_csr"):
        values = _read(message.dense, dtype, what)
        shape = shape or (len(values),)
        if values.numel() != torch.Size(shape).numel():
            raise Refused(f"{what} has {values.numel()} values for the shape {shape}.")
        return values.reshape(shape)
    sparse = message.sparse_csr
    crow, col = (_read(b, torch.int64, what) for b in (sparse.crow_indices, sparse.col_indices))
    values = _read(sparse.values, dtype, what)
    counts = crow.diff()
    fits = len(shape) == 2 and len(crow) == shape[0] + 1 and len(col) == len(values) and bool((counts >= 0).all())
    if not fits or int(crow[0]) != 0 or int(crow[-1]) != len(col) or shape[1] > 4096:
        raise Refused(f"The indices of {what} do not fit its shape {shape}.")
    if len(col) and not (0 <= int(col.min()) and int(col.max()) < shape[1]):
        raise Refused(f"A column of {what} lies outside of its shape {shape}.")
    dense = torch.zeros(shape, dtype=dtype)
    dense[torch.repeat_interleave(torch.arange(shape[0]), counts), col] = values
    return dense


def pass_response(outputs: Sequence[Mapping[str, Tensor]], metrics: Mapping[str, float]) -> bytes:
    """Return the answer to a pass.

    Parameters
    ----------
    outputs
        For each example its fields, whose first dimension counts tokens.
    metrics
        Name with the way in which several answers are put together, such as ``loss:sum``.
    """
    found = messages()["ForwardBackwardOutput"](loss_fn_output_type="ArrayRecord")
    # one record for each run of examples whose fields have the same further dimensions
    start = 0
    while start < len(outputs):
        widths = {name: value.shape[1:] for name, value in outputs[start].items()}
        stop = start
        while stop < len(outputs) and {n: v.shape[1:] for n, v in outputs[stop].items()} == widths:
            stop += 1
        record = found.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=stop - start)
        for name, width in widths.items():
            values = [each[name].detach().to("cpu", torch.float32) for each in outputs[start:stop]]
            sizes = torch.tensor([0, *(4 * v.numel() for v in values)])
            field = record.fields[name]
            field.data, field.dtype = b"".join(map(raw, values)), _FLOAT32
            field.offsets = raw(sizes.cumsum(0))
            field.trailing_shape.extend(width)
        start = stop
    found.metrics.update(metrics)
    return bytes(found.SerializeToString())


def raw(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's values."""
    return tensor.contiguous().numpy().tobytes()


def sample_response(answers: Sequence[Completed], *, prompt: bool, top_prompt: int, top: int) -> bytes:
    """Return the answer to a request for samples of one prompt.

    Parameters
    ----------
    answers
        The samples, each with its log-probabilities; the first one also with those of the prompt.
    prompt
        Whether the log-probabilities of the prompt are wanted.
    top_prompt, top
        How many alternatives are wanted for each token of the prompt and of the samples.
    """
    found = messages()["SampleResponse"](prompt_cache_hit_tokens=answers[0].usage.cached)
    for answer in answers:
        sequence = found.sequences.add(stop_reason=_STOP if answer.finish == "stop" else _LENGTH)
        sequence.tokens = raw(torch.tensor(answer.tokens, dtype=torch.int32))
        sequence.logprobs = raw(torch.tensor([each.logprob for each in answer.logprobs], dtype=torch.float32))
        if top:
            _alternatives(sequence.topk_sampled_logprobs, [each.top for each in answer.logprobs], top)
    known = answers[0].prompt_logprobs or ()
    if prompt:
        values = [float("nan") if each is None else each.logprob for each in known]
        found.prompt_logprobs = raw(torch.tensor(values, dtype=torch.float32))
    if top_prompt:
        _alternatives(found.topk_prompt_logprobs, [() if each is None else each.top for each in known], top_prompt)
    return bytes(found.SerializeToString())


def _alternatives(message: Any, rows: Sequence[Sequence[tuple[int, float]]], k: int) -> None:
    filled = [[*row[:k], *[_NOTHING] * (k - len(row))] for row in rows]
    message.k, message.length = k, len(filled)
    message.token_ids = raw(torch.tensor([[t for t, _ in row] for row in filled], dtype=torch.int32))
    message.logprobs = raw(torch.tensor([[p for _, p in row] for row in filled], dtype=torch.float32))
