"""One training step of a U-Net's blocks and of Flux's, beside that of diffusers' DreamBooth-LoRA examples with PEFT.

Both train the same network from the same adapter on the same cached latents and prompts, with the same draws of times
and noise, clipping and AdamW, interleaved in one run. Lorry's side is the image task as the fleet uses it (draw,
collate, forward with the job's adapter in its rows, losses); the peer's is written out here from what the examples
``train_dreambooth_lora`` and ``train_dreambooth_lora_flux`` compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import lorry
from lorry.bench._count import kept, peak
from lorry.bench._measure import interleaved, machine, ratio_table, ratios, threads
from lorry.bench._registry import register
from lorry.core.errors import OptionError
from lorry.diffusion.conditions import Conditions
from lorry.diffusion.families import family_of
from lorry.diffusion.task import Diffusion, Shot
from lorry.training.task import Setting

OURS, PEER, NAME = "lorry", "diffusers with peft", "style"
#: What the examples adapt.
_UNET = ("to_k", "to_q", "to_v", "to_out.0")
_FLUX = (
    *(f"attn.{name}" for name in ("to_k", "to_q", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")),
    *(f"{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")),
)
_RATE, _CLIP = 1e-4, 1.0


@dataclass(frozen=True)
class _Size:
    """Widths of a network, side of its latents and tokens of a prompt."""

    width: int
    text: int
    side: int
    tokens: int


_SIZES = {"tiny": _Size(32, 32, 8, 16), "middle": _Size(192, 256, 32, 77)}


def _unet(size: _Size) -> Any:
    """A ``StableDiffusionPipeline`` with a U-Net alone: two levels, the inner one with attention, as in SD 1.5."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=size.side,
        block_out_channels=(size.width, 2 * size.width),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=size.text,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(unet=network, scheduler=scheduler, requires_safety_checker=False, **parts)


def _flux(size: _Size) -> Any:
    """A ``FluxPipeline`` with a transformer alone: two double and four single blocks."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    head = 16 if size.width < 64 else 64
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=head,
        num_attention_heads=2 * size.width // head,
        joint_attention_dim=size.text,
        pooled_projection_dim=size.text,
        axes_dims_rope=(head // 4, head * 3 // 8, head * 3 // 8),
    )
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=network, **dict.fromkeys(names))


def _unet_loss(pipeline: Any, batch: Sequence[Shot], g: Generator) -> Tensor:
    """The loss of the example for Stable Diffusion: noise at whole times, the mean squared error of its prediction."""
    scheduler = pipeline.scheduler
    drawn = [(torch.randint(0, len(scheduler.alphas_cumprod), (), generator=g), _noise(shot, g)) for shot in batch]
    times, noise = torch.stack([t for t, _ in drawn]), torch.stack([n for _, n in drawn])
    text = torch.cat([shot.conditions["text"] for shot in batch])
    noisy = scheduler.add_noise(torch.stack([shot.mean for shot in batch]), noise, times)
    prediction = pipeline.unet(noisy, times, text, return_dict=False)[0]
    return F.mse_loss(prediction.float(), noise.float(), reduction="mean")


def _flux_loss(pipeline: Any, batch: Sequence[Shot], g: Generator) -> Tensor:
    """The loss of the example for Flux: packed latents, the flow from picture to noise, times drawn uniformly."""
    scheduler = pipeline.scheduler
    drawn = [(int(torch.rand((), generator=g) * len(scheduler.timesteps)), _noise(shot, g)) for shot in batch]
    at, noise = torch.tensor([index for index, _ in drawn]), torch.stack([n for _, n in drawn])
    latents = torch.stack([shot.mean for shot in batch])
    level = scheduler.sigmas[at].view(-1, 1, 1, 1)
    noisy = (1.0 - level) * latents + level * noise
    rows, channels, height, width = noisy.shape
    text = torch.cat([shot.conditions["text"] for shot in batch])
    prediction = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy, rows, channels, height, width),
        timestep=scheduler.timesteps[at] / 1000,
        guidance=None,
        pooled_projections=torch.cat([shot.conditions["pooled"] for shot in batch]),
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3),
        img_ids=pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, noisy.device, noisy.dtype),
        return_dict=False,
    )[0]
    factor = pipeline.vae_scale_factor
    prediction = pipeline._unpack_latents(prediction, height * factor, width * factor, factor)
    error = (prediction.float() - (noise - latents).float()) ** 2
    return error.reshape(rows, -1).mean(1).mean()


def _noise(shot: Shot, generator: Generator) -> Tensor:
    return torch.randn(shot.mean.shape, generator=generator)


@dataclass(frozen=True)
class _Network:
    """How a network is made, what is adapted in it, and the loss of the example for it."""

    make: Callable[[_Size], Any]
    targets: tuple[str, ...]
    loss: Callable[[Any, Sequence[Shot], Generator], Tensor]


_NETWORKS = {"unet": _Network(_unet, _UNET, _unet_loss), "flux": _Network(_flux, _FLUX, _flux_loss)}


class _Trainer:
    """One side: a network with an adapter, and its optimizer."""

    def __init__(self, network: nn.Module, loss: Callable[[Generator], Tensor]) -> None:
        self.network, self.loss = network, loss
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, _RATE)
        self.count = 0

    def backward(self) -> Tensor:
        """Run forward and backward of the next step; return the loss."""
        loss = self.loss(Generator().manual_seed(self.count))
        loss.backward()
        return loss.detach()

    def step(self) -> float:
        """Run the next step and return its loss."""
        loss = self.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1
        return float(loss)


def trainers(network: str, size: str, rank: int = 8, rows: int = 2) -> dict[str, _Trainer]:
    """Return both sides at the same start.

    Raises
    ------
    OptionError
        There is no such network or size.
    """
    for what, given, known in (("network", network, _NETWORKS), ("size", size, _SIZES)):
        if given not in known:
            raise OptionError(f"There is no {what} '{given}'; choose among {', '.join(known)}.")
    kind, sizes = _NETWORKS[network], _SIZES[size]
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(kind.make(sizes))
    ours, peer = made
    shots = _shots(ours, sizes, rows)
    base = family_of(ours).network(ours)
    adapter = lorry.attach(base, lorry.LoRA(rank=rank), targets=list(kind.targets), name=NAME, seed=0)
    base.train()
    other = _with_peft(family_of(peer).network(peer), kind.targets, rank, adapter)
    task, setting = Diffusion(sample_latents=False), Setting(base, ours)

    def loss(generator: Generator) -> Tensor:
        batch = task.collate(setting, task.draw(shots, generator, setting, NAME))
        with lorry.rows(base, [NAME] * rows), lorry.context(base, **batch.facts):
            found, count = task.loss(task.forward(setting, batch), batch.targets)
        return found / count

    return {OURS: _Trainer(base, loss), PEER: _Trainer(other, partial(kind.loss, peer, shots))}


def _shots(pipeline: Any, size: _Size, rows: int) -> list[Shot]:
    g = Generator().manual_seed(1)
    shape = (4, size.side, size.side)
    found = []
    for _ in range(rows):
        told = {"text": torch.randn(1, size.tokens, size.text, generator=g)}
        if family_of(pipeline).flow:
            told["pooled"] = torch.randn(1, size.text, generator=g)
        found.append(Shot(torch.randn(shape, generator=g), torch.zeros(shape), Conditions(told)))
    return found


def _with_peft(network: Any, targets: Sequence[str], rank: int, like: Any) -> nn.Module:
    """Return a network with PEFT's LoRA as the examples add it, whose A are those of an adapter of Lorry."""
    from peft import LoraConfig

    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets)))
    for path, entry in like.entries.items():
        with torch.no_grad():
            network.get_submodule(path).lora_A["default"].weight.copy_(entry.tensors()["A"])
    found: nn.Module = network.train()
    return found


def run(
    networks: str = "unet,flux", sizes: str = "tiny,middle", rounds: int = 7, rank: int = 8, rows: int = 2
) -> dict[str, Any]:
    """Measure time, memory and losses of both sides.

    Times are those of this process's processor. ``kept`` is what the graph saves for the backward pass: bytes of
    distinct storages that go through ``torch.autograd.graph.saved_tensors_hooks``, parameters left out. ``peak`` is by
    how much a whole step raises the bytes of live tensors, at most. Both in MB.
    """
    found = {}
    with threads(1):
        for network in networks.split(","):
            for size in sizes.split(","):
                sides = trainers(network.strip(), size.strip(), rank, rows)
                losses = {name: [side.step() for _ in range(3)] for name, side in sides.items()}
                pairs = list(zip(losses[OURS], losses[PEER], strict=True))
                seconds = interleaved({name: side.step for name, side in sides.items()}, rounds)
                found[f"{network.strip()}, {size.strip()}"] = {
                    **ratios(seconds, PEER)[OURS],
                    "loss": losses[OURS][0],
                    "difference": max(abs(a - b) / b for a, b in pairs),
                    "kept_mb": {n: kept(s.network, s.backward) / 1e6 for n, s in sides.items()},
                    "peak_mb": {n: peak(s.step) / 1e6 for n, s in sides.items()},
                }
        return {"machine": machine("cpu"), "rows": rows, "rank": rank, "cases": found}


def table(result: dict[str, Any]) -> Any:
    """Return the ratios as a rich table."""
    shown = {
        f"{name} (kept {c['kept_mb'][OURS]:.3g} to {c['kept_mb'][PEER]:.3g} MB, peak {c['peak_mb'][OURS]:.3g} to "
        f"{c['peak_mb'][PEER]:.3g} MB, losses equal to {c['difference']:.0e})": c
        for name, c in result["cases"].items()
    }
    return ratio_table(f"Training step of pictures, {result['machine']}", shown, PEER)


register("diffusion-step", run, table, help=__doc__)
