"""Names on the Hugging Face hub, such as ``Qwen/Qwen3-0.6B@main``: found in its own cache, or downloaded into it."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Literal

from lorry.core.errors import CheckpointError, near_misses

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?)(@(?P<revision>[\w.\-/]+))?")
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.md")
#: What is fetched: never a pickle, never code.
_FILES = {"config": _SMALL, "model": (*_SMALL, "*.safetensors"), "adapter": ("*.json", "*.safetensors", "*.md")}
#: What the hub's library raises: no network, no access, a name that the hub refuses.
HUB_ERRORS = (OSError, ValueError)
What = Literal["config", "model", "adapter"]


def is_hub_name(text: str) -> bool:
    """Return whether a text can be ``NAME``, ``OWNER/NAME`` or either with ``@REVISION``, and nothing lies there."""
    return bool(_NAME.fullmatch(text)) and not Path(text).exists()


def repository(text: str) -> str:
    """Return the name without its revision: what an adapter says of its base."""
    return text.partition("@")[0]


@lru_cache
def from_hub(text: str, what: What) -> Path:
    """Return the folder of a model or adapter in the hub's cache; it is downloaded if it is not there.

    Parameters
    ----------
    text
        ``NAME``, ``OWNER/NAME``, or either with ``@REVISION`` (a branch, tag or commit).
    what
        ``model``; ``config`` for its configuration and tokenizer alone; ``adapter``.

    Raises
    ------
    CheckpointError
        Not there, no access, or offline and not in the cache, with what to do.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    found = _NAME.fullmatch(text)
    assert found is not None
    repo, revision = found["repo"], found["revision"]
    at = f" at revision {revision}" if revision else ""
    get = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(_FILES[what])))
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE forbids downloads" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise CheckpointError(
            f"There is no folder {text}, and the hub's cache ({constants.HF_HUB_CACHE}) has no {repo}{at}; {why}."
            f"{near_misses(text, ['pocket'])} Where there is a network, `{get}` fetches it; then bring that cache "
            "here, or give a local folder."
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no folder {text}, and no repository {repo} on the hub (a private one needs `hf auth login`)."
        ) from error
    except HUB_ERRORS as error:
        raise CheckpointError(f"Cannot fetch {repo}{at} from the hub: {why_not(error)}.") from error


def why_not(error: Exception) -> str:
    """Return why the hub could not be used, on one line."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids connections"
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
