"""A plain LoRA for one user's message, and what is kept of it: in public only hashes, in private the secret."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorry.core.errors import AdapterError, CheckpointError
from lorry.core.method.declared import plain_lora
from lorry.core.receipt import Receipt
from lorry.formats.bundle import bundled
from lorry.formats.file import AdapterFile
from lorry.formats.reader import open_adapter
from lorry.formats.save import save_adapter
from lorry.formats.stored import StoredSite
from lorry.methods.authen_lora import AuthenLoRA
from lorry.protection.messages import check_message, from_text, to_text

#: What the secret of AquaLoRA's release is multiplied by beyond what it was trained with.
AQUALORA_GAIN = 1.03


@dataclass(frozen=True)
class Secret:
    """What only the owner keeps of a signed adapter.

    Attributes
    ----------
    message
        Zeros and ones.
    salt
        Random text, so that nobody can try messages against the public hash.
    codec
        Digest of the codec that reads the message.
    user
        Whom the adapter was given to; may be empty.
    adapter
        Name of the signed adapter.
    """

    message: str
    salt: str
    codec: str = ""
    user: str = ""
    adapter: str = ""

    @property
    def mark(self) -> str:
        """The hash that the public metadata has."""
        return hashlib.sha256(f"{self.salt}:{self.message}".encode()).hexdigest()

    def bits(self) -> Tensor:
        """Return the message ``(bits,)``."""
        return from_text(self.message)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the secret as JSON that only its owner may read; a file that exists is not replaced.

        Raises
        ------
        CheckpointError
            The file exists, or cannot be written.
        """
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                json.dump(asdict(self), file, indent=1)
                file.write("\n")
        except FileExistsError:
            raise CheckpointError(f"'{target}' exists; a secret is not replaced. Choose another file.") from None
        except OSError as error:
            raise CheckpointError(f"The secret cannot be written to '{target}': {error}.") from None


def load_secret(path: str | os.PathLike[str]) -> Secret:
    """Return a secret that `Secret.save` wrote.

    Raises
    ------
    CheckpointError
        The file cannot be read, or is none.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        found = Secret(**values)
        found.bits()
    except FileNotFoundError:
        raise CheckpointError(f"There is no secret at '{path}'.") from None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"'{path}' is no secret as `lorry sign` writes it: {error}.") from None
    return found


def bake(file: AdapterFile, message: Tensor, *, gain: float = 1.0, name: str | None = None) -> AdapterFile:
    """Return the plain LoRA that does what an adapter of ``authen-lora`` does at one message.

    Parameters
    ----------
    file
        The adapter, of one model or of several; it stays as it is.
    message
        ``(bits,)``; neither zero nor near to it.
    gain
        Factor of the whole update; `AQUALORA_GAIN` in AquaLoRA's release.
    name
        Of the result; the adapter's own if not given.

    Raises
    ------
    AdapterError
        The adapter is of another method.
    OptionError
        The message is reserved.
    """
    check_message(message)
    if file.components:
        parts = {root: bake(part, message, gain=gain) for root, part in file.components.items()}
        return bundled(parts, name or file.name, _public(file.metadata))
    sites = {}
    for path, method in file.methods.items():
        if not isinstance(method, AuthenLoRA):
            raise AdapterError(
                f"Adapter '{file.name}' cannot be signed: at '{path}' it is of the method '{method.info.slug}', "
                "expected was 'authen-lora'. Train one with the objective 'signing'."
            )
        with torch.no_grad():
            a, b, scale = method.at_message(file.all_tensors(path), file.site(path), message)
        values = {"A": a.detach().clone(), "B": b.detach().clone()}
        facts, rank = file.facts(path), a.shape[-2]
        plain = plain_lora(rank, scale * gain * rank)
        sites[path] = StoredSite(
            path, plain, kind=facts.kind, shape=facts.shape, kernel=facts.kernel, values=values, site=file.site(path)
        )
    return AdapterFile(
        name=name or file.name,
        method=next(iter(sites.values())).method,
        sites=sites,
        fingerprint=file.fingerprint,
        base=file.base,
        metadata=_public(file.metadata),
    )


def _public(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata without how the adapter was trained, which names the codec and the message."""
    return {k: v for k, v in metadata.items() if k not in ("training", "signed")}


def sign(
    source: AdapterFile | str | os.PathLike[str],
    to: str | os.PathLike[str],
    secret: Secret,
    private: str | os.PathLike[str],
    *,
    gain: float = 1.0,
    overwrite: bool = False,
) -> Receipt:
    """Bake an adapter for a user, write it, and write the secret elsewhere.

    Parameters
    ----------
    source
        The adapter of ``authen-lora``.
    to
        Folder of the signed adapter, which may be given away: its metadata has hashes only.
    secret
        Message, salt and codec.
    private
        File for the secret; outside of `to` and of the adapter's own folder.
    gain
        See `bake`.
    overwrite
        Replace an adapter that lies at `to`.

    Raises
    ------
    AdapterError, OptionError
        See `bake`.
    CheckpointError
        The secret would lie in the public folder, or something cannot be written.
    """
    folder, hidden = Path(to).resolve(), Path(private).resolve()
    if hidden == folder or folder in hidden.parents:
        raise CheckpointError(f"The secret '{private}' would lie inside of '{to}', which is given away. Keep it apart.")
    if hidden.exists():
        raise CheckpointError(f"'{private}' exists; a secret is not replaced. Choose another file.")
    signed = bake(open_adapter(source), secret.bits(), gain=gain, name=folder.name)
    signed.metadata["signed"] = {"bits": len(secret.message), "mark": secret.mark, "codec": secret.codec}
    secret.save(hidden)
    try:
        return save_adapter(signed, folder, overwrite=overwrite)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise


def new_secret(message: Tensor, *, codec: str = "", user: str = "", adapter: str = "") -> Secret:
    """Return a secret for a message, with fresh salt."""
    return Secret(to_text(check_message(message)), secrets.token_hex(16), codec, user, adapter)
