"""Stage 2 for a bare network and latents that are tensors already: the objective ``signing-latents``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from lorry.core.options import check_options, option
from lorry.protection.codec import Codec
from lorry.protection.drawing import codec_label, codec_of, drawn_messages, fixed_message
from lorry.training.data_errors import DataError
from lorry.training.reference import asking
from lorry.training.task import Batch, Examples, PlainReport, Setting, Task, register_task

#: Diffusion times of a schedule.
TIMES = 1000
#: Schedules that a base was trained with; flow interpolates, the others mix by the square roots of alpha.
SCHEDULES = ("linear", "scaled-linear", "cosine", "flow")


def alphas(schedule: str, times: int = TIMES) -> Tensor:
    """Return the share of signal ``ᾱ`` at each time ``(times,)``, in float64; for flow, the squared one minus t.

    Parameters
    ----------
    schedule
        One of `SCHEDULES`: DDPM's, Stable Diffusion's, Nichol and Dhariwal's, or rectified flow's.
    times
        How many.
    """
    if schedule == "flow":
        return (1 - torch.arange(1, times + 1, dtype=torch.float64) / times).square()
    if schedule == "cosine":
        at = (torch.arange(times + 1, dtype=torch.float64) / times + 0.008) / 1.008 * math.pi / 2
        betas = (1 - at.cos()[1:].square() / at.cos()[:-1].square()).clamp(max=0.999)
    elif schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, times, dtype=torch.float64)
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, times, dtype=torch.float64).square()
    return (1 - betas).cumprod(0)


@register_task
@dataclass(frozen=True)
class SigningLatents(Task):
    """Denoising towards pictures of a style with a message in them: ``L = λ_style L_style + λ_wm L_wm``.

    For latents x0 of the style, a message m and its residual δ_m, the network with the adapter at message m predicts
    the noise of ``z = noised(x0 + δ_m)``. ``L_style`` is its squared error, and ``L_wm`` the squared distance from
    what the base alone predicts of ``noised(x0)``. With probability `zero_rate` the message is zero; by default the
    residual is then zero, too, since the codec reads pictures without residual as the zero message. A codec whose
    zero is "marked" gives the other reading, in which zero is a message like others.

    A record has ``latent`` ``(channels, h, w)``, as the network sees it, and may have ``inputs``, a mapping of further
    arguments of the network (``encoder_hidden_states``). The base is called as ``model(noisy, times, **inputs)`` and
    gives a tensor, or an object with one as ``sample``. The base predicts the noise, or with the schedule "flow"
    the direction ``noise - x0``; time t of flow is t/1000.
    """

    name: ClassVar[str] = "signing-latents"
    unit: ClassVar[str] = "pictures"

    codec: Any = option(None, "The codec: its folder, or the thing itself.")
    lambda_style: float = option(1.0, "Weight of denoising to the picture with its message.", at_least=0)
    lambda_wm: float = option(1.0, "Weight of the distance from the base's prediction.", at_least=0)
    zero_rate: float = option(0.05, "Share of rows with the zero message.", at_least=0, below=1)
    message: str = option("", "The one message of all rows, as zeros and ones; drawn for each row if not given.")
    schedule: str = option("scaled-linear", "Schedule that the base was trained with.", choices=SCHEDULES)
    latent_scale: float = option(1.0, "Factor of the residual: the VAE's scaling factor.", above=0)

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)
        fixed_message(self.message, self.codec, self.name)

    @property
    def family(self) -> str:
        """Jobs of one codec and schedule share passes."""
        return f"{self.name}:{codec_label(self.codec)}:{self.schedule}"

    def reader(self, setting: Setting) -> Codec:
        """Return the codec, frozen; loaded once for all jobs that name it."""
        return codec_of(self.codec, setting)

    def examples(self, setting: Setting, records: Sequence[Any], labels: Any = None) -> Examples[Any]:
        """Take latents and further inputs as they are."""
        fixed_message(self.message, self.codec, self.name, self.reader(setting).shape.bits)
        made = []
        for number, record in enumerate(records):
            latent = torch.as_tensor(record.get("latent", torch.empty(0)))
            if latent.ndim != 3 or not latent.is_floating_point():
                raise DataError(
                    f"Record {number} needs 'latent', floats (channels, h, w); found {tuple(latent.shape)}."
                )
            made.append((latent, dict(record.get("inputs", {}))))
        return Examples(tuple(made), PlainReport(len(records), len(made)))

    def draw(self, examples: Sequence[Any], generator: Generator, setting: Setting, adapter: str) -> Sequence[Any]:
        """Draw messages, times and noise, and ask the base what it says of the pictures without message."""
        codec, device = self.reader(setting), setting.device
        count = len(examples)
        message = drawn_messages(self.message, count, codec.shape.bits, self.zero_rate, generator)
        x0 = torch.stack([latent for latent, _ in examples]).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        times = torch.randint(TIMES, (count,), generator=generator)
        with torch.no_grad():
            residual = self.latent_scale * codec.residual(message.to(device), (x0.shape[-2], x0.shape[-1])).to(x0)
        marked, plain = (self._noised(x, noise, times) for x in (x0 + residual, x0))
        inputs = [more for _, more in examples]
        with asking(setting.model, None, count):
            clean = _predict(setting.model, plain, times.to(device), _stacked(inputs, device))
        wanted = noise - (x0 + residual) if self.schedule == "flow" else noise
        return [
            {"noisy": marked[i], "time": times[i], "inputs": inputs[i], "message": message[i], "wanted": wanted[i]}
            | {"clean": clean[i], "weights": torch.tensor([self.lambda_style, self.lambda_wm])}
            for i in range(count)
        ]

    def _noised(self, x: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        share = alphas(self.schedule)[times].to(x).view(-1, *[1] * (x.ndim - 1))
        if self.schedule == "flow":
            return share.sqrt() * x + (1 - share.sqrt()) * noise
        return share.sqrt() * x + (1 - share).sqrt() * noise

    def collate(self, setting: Setting, examples: Sequence[Any]) -> Batch:
        """Stack rows; methods are told the message of each."""
        device = setting.device
        columns = {k: torch.stack([e[k] for e in examples]).to(device) for k in examples[0] if k != "inputs"}
        inputs: dict[str, Any] = {"noisy": columns["noisy"], "times": columns["time"]}
        inputs["inputs"] = _stacked([e["inputs"] for e in examples], device)
        targets = {name: columns[name] for name in ("wanted", "clean", "weights")}
        return Batch(inputs, targets, {"message": columns["message"], "timestep": columns["time"]})

    def forward(self, setting: Setting, batch: Batch) -> Tensor:
        """Run the base with the adapters of the rows."""
        return _predict(setting.model, batch.inputs["noisy"], batch.inputs["times"], batch.inputs["inputs"])

    def losses(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Both squared errors of each row, means over its elements, weighted."""
        outputs = outputs.float()
        style = (outputs - targets["wanted"].float()).square().flatten(1).mean(1)
        shift = (outputs - targets["clean"].float()).square().flatten(1).mean(1)
        weights = targets["weights"].to(style)
        return weights[:, 0] * style + weights[:, 1] * shift, torch.ones(len(outputs))


def _predict(model: nn.Module, noisy: Tensor, times: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    found = model(noisy, times, **inputs)
    result: Tensor = found if isinstance(found, Tensor) else found.sample
    return result


def _stacked(inputs: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, Tensor]:
    return {k: torch.stack([torch.as_tensor(more[k]) for more in inputs]).to(device) for k in inputs[0]}
