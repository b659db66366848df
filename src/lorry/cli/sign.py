"""``lorry codec``, ``lorry sign`` and ``lorry verify``: messages in what an image model's adapter makes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.arguments import Json, key_values
from lorry.cli.output import note, out, print_json
from lorry.core.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

#: What is taken for a picture in a folder.
_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def codec(
    pictures: Annotated[Path, typer.Argument(help="Folder of pictures, or one picture.")],
    to: Annotated[Path, typer.Option("--out", help="Folder for the codec; keep it private.")],
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="KEY=VALUE", help="bits, channels, size, grid, decoder, ...; repeatable."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="steps, rows, rate, distortions, ...; repeatable."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Pipeline for whose latents the codec is: a folder, a pocket model, or a name on the hub."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of start and draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a codec that writes messages into pictures, or into a pipeline's latents, and reads them (stage 1)."""
    from lorry.core.options import from_options
    from lorry.protection.codec import Codec, CodecShape
    from lorry.protection.codec_fit import CodecTraining

    pipeline = _pipeline(base)
    given = _shape_for(pipeline) | key_values(shape, "--shape")
    made, settings = from_options(CodecShape, given), from_options(CodecTraining, key_values(option))
    if pipeline is None and (made.channels != made.picture_channels or made.size != made.picture_size):
        raise OptionError(
            f"A codec that is trained on pictures has channels = picture_channels and size = picture_size, found "
            f"{made.channels}, {made.picture_channels} and {made.size}, {made.picture_size}."
        )
    found = Codec(made, seed)

    def report(step: int, loss: float) -> None:
        if (step + 1) % max(1, settings.steps // 10) == 0:
            note(f"step {step + 1} of {settings.steps}: message loss {loss:.3f}")

    side = made.picture_size if pipeline is None else _side(pipeline)
    pixels = read_pictures([pictures], made.picture_channels, side)
    losses = _trained(found, pixels, settings, seed, pipeline, report)
    facts = {"codec": str(to), "digest": found.save(to), "bits": made.bits, "message_loss": losses[-1]}
    if as_json:
        print_json(facts)
    else:
        out().print(f"wrote {to}: messages of {made.bits} bits, last message loss {losses[-1]:.3f}", highlight=False)


def _pipeline(base: str | None) -> Any:
    from lorry.cli.diffusion_bases import load_pipeline

    return None if base is None else load_pipeline(base)


def _side(pipeline: Any) -> int:
    """Return the side of a pipeline's pictures, in pixels."""
    from lorry.diffusion.making import size_of

    return int(min(size_of(pipeline, None, None)))


def _shape_for(pipeline: Any) -> dict[str, Any]:
    """Return the shape of a codec: for small pictures, or for the latents of a pipeline and its pictures."""
    if pipeline is None:
        return {"decoder": "small", "channels": 3, "picture_channels": 3, "size": 32, "picture_size": 32}
    from lorry.diffusion import family_of

    side = _side(pipeline)
    channels, size, _ = family_of(pipeline).latents_shape(pipeline, side, side)
    # a small network reads small pictures; the large one was made for 512 pixels
    reader = {"decoder": "small", "picture_size": side} if side <= 64 else {}
    return {"channels": channels, "size": size, "picture_channels": 3, **reader}


def _trained(codec: Any, pixels: Tensor, settings: Any, seed: int, pipeline: Any, report: Any) -> list[float]:
    """Train a codec on pictures or, through a pipeline's autoencoder, on their latents; return its losses."""
    from lorry.protection.autoencoding import decoding, latents_of
    from lorry.protection.codec_fit import train_codec

    if pipeline is None:
        return train_codec(codec, pixels, settings, seed, report=report)
    latents = latents_of(pipeline, pixels)
    with decoding(pipeline) as decode:
        return train_codec(codec, latents, settings, seed, decode=decode, report=report)


def sign(
    adapter: Annotated[Path, typer.Argument(help="Adapter of the method authen-lora.")],
    to: Annotated[Path, typer.Option("--out", help="Folder for the signed adapter, a plain LoRA.")],
    private: Annotated[Path, typer.Option("--private", help="File for the secret; outside of --out.")],
    message: Annotated[str | None, typer.Option(help="Zeros and ones; drawn at random if not given.")] = None,
    user: Annotated[str, typer.Option(help="Whom it is for; only the private file says it.")] = "",
    codec_folder: Annotated[
        Path | None, typer.Option("--codec", help="Codec that reads it; its digest is noted.")
    ] = None,
    gain: Annotated[float, typer.Option(help="Factor of the update; AquaLoRA's release uses 1.03.")] = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Bake an adapter for one user: a plain LoRA whose pictures carry that user's message."""
    import secrets

    from torch import Generator

    from lorry.formats.reader import open_adapter
    from lorry.methods.authen_lora import AuthenLoRA
    from lorry.protection import bake, messages
    from lorry.protection.codec import digest, load_codec

    file = open_adapter(adapter)
    if not isinstance(file.method, AuthenLoRA):
        raise OptionError(
            f"'{adapter}' is of the method '{file.method.info.slug}'; only adapters of authen-lora can be signed."
        )
    bits = file.method.bits
    if to.exists() and any(to.iterdir()) and not overwrite:
        raise CheckpointError(f"{to} exists already. Choose another folder, or pass --overwrite.")
    generator = Generator().manual_seed(secrets.randbits(63))
    chosen = messages.drawn(bits, generator) if message is None else messages.from_text(message, bits)
    mark = ""
    if codec_folder is not None:
        reader = load_codec(codec_folder)
        if reader.shape.bits != bits:
            raise OptionError(f"The adapter has messages of {bits} bits, the codec of {reader.shape.bits}.")
        mark = digest(reader)
    secret = bake.new_secret(chosen, codec=mark, user=user, adapter=to.name)
    receipt = bake.sign(file, to, secret, private, gain=gain, overwrite=overwrite)
    if as_json:
        print_json({"adapter": str(to), "private": str(private), "mark": secret.mark, "sites": receipt.sites})
        return
    out().print(f"wrote {to}: {receipt.sites} sites, a plain LoRA", highlight=False, soft_wrap=True)
    out().print(f"wrote {private}: the message; keep it, and the codec, to yourself", highlight=False, soft_wrap=True)


def verify(
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    codec_folder: Annotated[Path, typer.Option("--codec", help="The codec.")],
    private: Annotated[Path | None, typer.Option("--private", help="The secret that `lorry sign` wrote.")] = None,
    message: Annotated[str | None, typer.Option(help="The message, in place of a secret.")] = None,
    rate: Annotated[float, typer.Option("--fpr", help="Accepted false-positive rate of one picture.")] = 1e-3,
    as_json: Json = False,
) -> None:
    """Read the message of pictures, and say whether it is the owner's: bits, threshold, p-value.

    Exit code 0 if all pictures together are signed, 1 if they are not.
    """
    from lorry.protection import messages
    from lorry.protection.bake import load_secret
    from lorry.protection.codec import digest, load_codec
    from lorry.protection.verify import verify as judge

    if (private is None) == (message is None):
        raise OptionError("Give either --private FILE or --message BITS.")
    codec = load_codec(codec_folder)
    bits = codec.shape.bits
    if private is not None:
        secret = load_secret(private)
        if secret.codec and secret.codec != digest(codec):
            raise OptionError(f"The secret belongs to another codec than the one in '{codec_folder}'.")
        wanted = messages.from_text(secret.message, bits)
    else:
        wanted = messages.from_text(message or "", bits)
    paths = picture_files(pictures)
    each, together = judge(
        codec, read_pictures(paths, codec.shape.picture_channels, codec.shape.picture_size), wanted, rate
    )
    rows = [{"picture": str(p), "signed": v.signed, **asdict(v)} for p, v in zip(paths, each, strict=True)]
    if as_json:
        print_json({"pictures": rows, "together": {"signed": together.signed, **asdict(together)}})
    else:
        for row in rows:
            _say(str(row["picture"]), row)
        if len(rows) > 1:
            _say("all together", {"signed": together.signed, **asdict(together)})
    if not together.signed:
        raise typer.Exit(1)


def _say(name: str, row: dict[str, Any]) -> None:
    verdict = "signed" if row["signed"] else "not signed"
    out().print(
        f"{name}: {verdict}, {row['matching']} of {row['bits']} bits (threshold {row['threshold']}), p = "
        f"{row['p_value']:.2g}",
        highlight=False,
        soft_wrap=True,
    )


def picture_files(given: list[Path]) -> list[Path]:
    """Return the pictures that are meant, those of a folder in the order of their names.

    Raises
    ------
    CheckpointError
        Nothing is there.
    """
    found: list[Path] = []
    for path in given:
        if not path.exists():
            raise CheckpointError(f"There is no picture at '{path}'.")
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in _ENDINGS) if path.is_dir() else [path]
        if not inside:
            raise CheckpointError(f"The folder '{path}' holds no pictures ({', '.join(sorted(_ENDINGS))}).")
        found += inside
    return found


def read_pictures(given: list[Path], channels: int, side: int) -> Tensor:
    """Return pictures ``(n, channels, side, side)`` from -1 to 1.

    Raises
    ------
    CheckpointError
        One cannot be read.
    """
    import torch
    from PIL import Image

    tensors = []
    for path in picture_files(given):
        try:
            with Image.open(path) as image:
                ready = image.convert("L" if channels == 1 else "RGB").resize((side, side), Image.Resampling.BILINEAR)
                raw = torch.frombuffer(bytearray(ready.tobytes()), dtype=torch.uint8)
        except OSError as error:
            raise CheckpointError(f"The picture '{path}' cannot be read: {error}.") from None
        tensors.append(raw.view(side, side, -1).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(tensors)
