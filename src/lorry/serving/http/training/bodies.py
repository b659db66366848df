"""What the client ``tinker`` sends as JSON; fields that later clients add are left aside."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(max_length=1000)]
Number = Annotated[int, Field(ge=0, lt=1 << 31)]
Facts = dict[str, Any] | None


class Sent(BaseModel):
    """A body."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), hide_input_in_errors=True)


class NewSession(Sent):
    """``create_session``."""

    tags: list[str] = []
    user_metadata: Facts = None
    display_name: str | None = None


class OfSession(Sent):
    """What names a session."""

    session_id: Name


class Lora(Sent):
    """What is trained."""

    rank: int
    seed: Annotated[int, Field(ge=-(1 << 62), lt=1 << 62)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class NewModel(OfSession):
    """``create_model``."""

    model_seq_id: Number
    base_model: Name
    user_metadata: Facts = None
    lora_config: Lora | None = None
    optimizer_config: dict[str, Any] | None = None


class OfModel(Sent):
    """A request of a model; what it asks for is checked when its turn comes, and answered by then."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), hide_input_in_errors=True)

    model_id: Name
    seq_id: int | None = None

    def asked(self) -> dict[str, Any]:
        """Return what is asked for."""
        return dict(self.model_extra or {})


class Save(OfModel):
    """``save_weights``, ``save_weights_for_sampler``, ``save_weights_external``."""

    path: Name | None = None
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None
    overwrite: bool = False

    def asked(self) -> dict[str, Any]:
        """Return what is asked for."""
        own = {"path": self.path, "ttl_seconds": self.ttl_seconds, "user_metadata": self.user_metadata}
        return {**super().asked(), **own, "overwrite": self.overwrite}


class SaveSampler(Save):
    """``save_weights_for_sampler``."""

    sampling_session_seq_id: Number | None = None

    def asked(self) -> dict[str, Any]:
        """Return what is asked for."""
        return {**super().asked(), "sampling_session_seq_id": self.sampling_session_seq_id}


class Load(Sent):
    """``load_weights``, onto a model or as a new one."""

    path: Name
    optimizer: bool
    model_id: Name | None = None
    seq_id: int | None = None
    session_id: Name | None = None
    model_seq_id: Number | None = None
    base_model: Name | None = None
    user_metadata: Facts = None


class Retrieve(Sent):
    """``retrieve_future`` and ``cancel_future``."""

    request_id: Name


class NewSampler(OfSession):
    """``create_sampling_session``."""

    sampling_session_seq_id: Number
    base_model: Name | None = None
    model_path: Name | None = None


class OfSampler(Sent):
    """``join_sampling_session``."""

    sampling_session_id: Name


class Chunk(Sent):
    """A part of a prompt."""

    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]] | None = None
    type: str = "encoded_text"


class Prompt(Sent):
    """The parts of a prompt."""

    chunks: list[Chunk]


class Params(Sent):
    """How to sample."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: int = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class Sample(Sent):
    """``asample``."""

    prompt: Prompt
    sampling_params: Params
    num_samples: int = 1
    base_model: Name | None = None
    model_path: Name | None = None
    sampling_session_id: Name | None = None
    seq_id: int | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


class OfPath(Sent):
    """What names saved weights."""

    tinker_path: Name


class Copy(Sent):
    """``copy_weights``."""

    source_path: Name
    session_id: Name | None = None
    model_seq_id: Number | None = None
    ttl_seconds: int | None = None


class Lifetime(Sent):
    """How long saved weights live from now on; for ever without a number."""

    ttl_seconds: int | None = None
