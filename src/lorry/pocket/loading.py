"""Load the pocket model that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

#: A Hugging Face directory: ``AutoModelForCausalLM.from_pretrained(lorry.pocket.PATH)`` works too.
PATH = Path(__file__).with_name("weights")


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A fresh copy of the trained model, in eval mode on the CPU, and its tokenizer.

    Parameters
    ----------
    dtype
        Of the weights in memory; they are stored in bfloat16.

    Returns
    -------
    tuple
        A ``LlamaForCausalLM`` of about one million parameters and a ``PreTrainedTokenizerFast``.

    Raises
    ------
    ImportError
        Transformers is not installed.
    FileNotFoundError
        The installation lacks the weights.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("The pocket model needs transformers: pip install 'lorry[train]'.") from error
    if not (PATH / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"Expected the pocket model's weights in {PATH}, found none: reinstall lorry, or train them with "
            f"python -m lorry.pocket.train --out {PATH}."
        )
    model = AutoModelForCausalLM.from_pretrained(PATH, dtype=dtype, local_files_only=True)
    # adapters note the name of their base; where this installation lies is nobody's business
    model.config._name_or_path = "pocket"
    return model.eval(), AutoTokenizer.from_pretrained(PATH, local_files_only=True)
