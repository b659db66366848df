"""Tasks of rows: the one that each row belongs to, and embeddings of tasks that are trained by contrast.

Rows say their task by ``task_ids`` in `lorry.context`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorry.core.errors import AdapterError
from lorry.core.method.call import Call


def one_hot_tasks(call: Call, tasks: int, ndim: int) -> Tensor:
    """Return gates ``(rows, 1, ..., tasks)`` of `ndim` dimensions that are 1 at the task of each row.

    Raises
    ------
    AdapterError
        Rows without a task, or with one that does not exist.
    """
    found = call.of_rows(call.context.task_ids)
    if found is None or int(found.max()) >= tasks or int(found.min()) < 0:
        shown = "none" if found is None else sorted(set(found.tolist()))
        raise AdapterError(
            f"Hard routing of adapter '{call.adapter}' needs task_ids below {tasks} (lorry.context), found {shown}."
        )
    return F.one_hot(found.long(), tasks).reshape(len(found), *[1] * (ndim - 2), tasks)


def task_rows(call: Call, embeddings: Tensor) -> Tensor:
    """Return the embedding ``(rows, width)`` of each row's task.

    Raises
    ------
    AdapterError
        Rows without a task.
    """
    found = call.of_rows(call.context.task_ids)
    if found is None:
        raise AdapterError(
            f"The gate of adapter '{call.adapter}' reads the task: give task_ids in lorry.context, or set serve_task. "
            "lorry.methods.parts.tasks.nearest_tasks guesses tasks from features."
        )
    return embeddings[found.long()]


def leave_contrast(call: Call, embeddings: Tensor, weight: float, temperature: float) -> None:
    """Leave the contrastive loss between the rows' pooled inputs and embeddings that sites share; the last layer as
    wide counts.

    Nothing is left where rows have no task or the layer has another width.
    """
    found = call.of_rows(call.context.task_ids)
    if found is None or call.x.shape[-1] != embeddings.shape[1]:
        return
    logits = similarities(pooled(call.x, call.of_tokens(call.context.padding_mask)), embeddings, temperature)
    call.add_loss("contrastive", weight * F.cross_entropy(logits, found.long()), at="tasks")


def similarities(features: Tensor, embeddings: Tensor, temperature: float) -> Tensor:
    """Return cosine similarities over the temperature, ``(rows, tasks)``."""
    unit = F.normalize(features, dim=-1) @ F.normalize(embeddings.to(features.dtype), dim=-1).mT
    return unit / temperature


def pooled(x: Tensor, real: Tensor | None) -> Tensor:
    """Return the mean over the real tokens of each row, ``(rows, width)`` in float32."""
    if x.ndim == 2:
        return x.float()
    if real is None:
        return x.flatten(1, -2).mean(1, dtype=torch.float32)
    weight = real.to(x.dtype)
    total = torch.einsum("bl,bld->bd", weight, x).float()
    return total / weight.float().sum(1, keepdim=True).clamp_min(1)


def nearest_tasks(features: Tensor, embeddings: Tensor) -> Tensor:
    """Return the task whose embedding is most similar to each row of `features` ``(rows, width)``."""
    return similarities(features, embeddings, 1.0).argmax(-1)
