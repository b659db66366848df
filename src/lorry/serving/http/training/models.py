"""Models: made, trained, saved, loaded, sampled from."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from lorry.serving.http.errors import ApiError
from lorry.serving.http.training.bodies import (
    Load,
    NewModel,
    NewSampler,
    OfModel,
    OfSampler,
    Sample,
    Save,
    SaveSampler,
)
from lorry.serving.http.training.state import GUARDED, Owner, Taking, promise
from lorry.serving.training.sampling import Wish

router = APIRouter(prefix="/api/v1", tags=["training"], dependencies=GUARDED)


@router.post("/create_model")
def create_model(body: NewModel, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Make a model: an adapter on the base."""
    desk.check_base(body.base_model)
    if (body.optimizer_config or {}).get("type", "adamw") != "adamw":
        raise ApiError(400, "This server's optimizer is AdamW; leave optimizer_config out.", param="optimizer_config")
    lora = body.lora_config
    if lora is None:
        raise ApiError(400, "This server trains adapters; give a lora_config.", param="lora_config")
    return promise(
        desk.create_model(
            owner.name, body.session_id, body.model_seq_id, rank=lora.rank, seed=lora.seed, attention=lora.train_attn,
            mlp=lora.train_mlp, unembed=lora.train_unembed, facts=body.user_metadata,
        )
    )  # fmt: skip


@router.post("/get_info")
def get_info(body: OfModel, desk: Taking, owner: Owner, request: Request) -> dict[str, Any]:
    """Say what a model is."""
    model = desk.model(body.model_id, owner.name)
    tokenizer = getattr(request.app.state, "tokenizer", None) or desk.base
    data = {"arch": "lora", "model_name": desk.base, "tokenizer_id": tokenizer}
    return {
        "type": "get_info",
        "model_data": data,
        "model_id": model.id,
        "is_lora": True,
        "lora_rank": model.config["rank"],
        "model_name": desk.base,
    }


@router.post("/unload_model")
async def unload_model(body: OfModel, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Forget a model; its saved weights stay."""
    model = desk.model(body.model_id, owner.name)
    await desk.trainer.unload(model.id)
    return {"type": "unload_model", "model_id": model.id}


@router.post("/forward_backward")
@router.post("/forward")
async def forward_backward(request: Request, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Compute losses, and gradients unless the message says otherwise."""
    return promise(desk.ask_pass(owner.name, await request.body()))


@router.post("/optim_step")
async def optim_step(body: OfModel, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Change the weights by the gradient that was collected."""
    return promise(desk.ask(owner.name, "optim_step", body.model_id, body.seq_id, body.asked()))


@router.post("/save_weights")
def save_weights(body: Save, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Save weights and optimizer, to go on from."""
    return promise(desk.ask(owner.name, "save", body.model_id, body.seq_id, body.asked()))


@router.post("/save_weights_for_sampler")
def save_weights_for_sampler(body: SaveSampler, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Save weights to sample from."""
    return promise(desk.ask(owner.name, "save_sampler", body.model_id, body.seq_id, body.asked()))


@router.post("/save_weights_external")
def save_weights_external(body: Save, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Save weights in PEFT's format, to download."""
    return promise(desk.ask(owner.name, "save_external", body.model_id, body.seq_id, body.asked()))


@router.post("/load_weights")
def load_weights(body: Load, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Load saved weights onto a model, or as a new one."""
    desk.check_base(body.base_model)
    if body.model_id is not None:
        asked = {"path": body.path, "optimizer": body.optimizer}
        return promise(desk.ask(owner.name, "load", body.model_id, body.seq_id, asked))
    if body.session_id is None or body.model_seq_id is None:
        raise ApiError(400, "Give model_id with seq_id, or session_id with model_seq_id.")
    return promise(
        desk.create_by_loading(
            owner.name, body.session_id, body.model_seq_id, body.path, body.optimizer, body.user_metadata
        )
    )


@router.post("/create_sampling_session")
def create_sampling_session(body: NewSampler, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Open a session of samples from saved weights or from the base."""
    id = desk.open_sampler(owner.name, body.session_id, body.sampling_session_seq_id, body.model_path, body.base_model)
    return {"type": "create_sampling_session", "sampling_session_id": id}


@router.post("/join_sampling_session")
def join_sampling_session(body: OfSampler, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Give one more client of a sampling session a number of its own."""
    desk.sampler(owner.name, body.sampling_session_id)
    return {"type": "join_sampling_session", "client_counter": desk.store.join_sampler(body.sampling_session_id)}


@router.get("/samplers/{sampler}")
def get_sampler(sampler: str, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Say what a sampling session samples from."""
    return {"sampler_id": sampler, "base_model": desk.base, "model_path": desk.sampler(owner.name, sampler)}


@router.post("/asample")
async def asample(body: Sample, desk: Taking, owner: Owner) -> dict[str, Any]:
    """Begin to sample."""
    for name in ("target_prompt_logprobs", "prompt_alt_tokens_k", "record_stability_info"):
        if getattr(body, name):
            raise ApiError(400, f"This server does not know {name}; leave it out.", param=name)
    if any(chunk.tokens is None for chunk in body.prompt.chunks):
        raise ApiError(400, "The prompt holds something else than tokens of text, which this base cannot read.")
    path = body.model_path
    if body.sampling_session_id is not None:
        path = desk.sampler(owner.name, body.sampling_session_id)
    elif path is not None:
        path = desk.sampled_path(owner.name, path)
    desk.check_base(body.base_model)
    if path is None:
        owner.check_model(())
    params = body.sampling_params
    most = min((each for each in (params.max_tokens, owner.max_tokens) if each is not None), default=None)
    wish = Wish(
        tuple(token for chunk in body.prompt.chunks for token in chunk.tokens or ()),
        samples=body.num_samples,
        max_tokens=most,
        seed=params.seed,
        stop=params.stop,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        prompt_logprobs=bool(body.prompt_logprobs),
        top_prompt=body.topk_prompt_logprobs,
        top=body.topk_sample_logprobs,
    )
    id = desk.sample(owner.name, wish, path, body.sampling_session_id, body.seq_id, owner.take)
    return {"request_id": id, "sample_sequence_ids": [f"{id}:{turn}" for turn in range(body.num_samples)]}
