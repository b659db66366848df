"""DDP and FSDP2 on two processes equal one process."""

from pathlib import Path

import pytest
import torch
from training.launching import forked
from training.tiny_bases import tiny_llama, token_rows

from lorry.core.life.api import attach
from lorry.training.huggingface import whole

STEPS = 6
CASES = [(kind, method) for kind in ("ddp", "fsdp2") for method in ("lora", "dora")]


def batch(first: int = 0, count: int = 4) -> torch.Tensor:
    return torch.stack([r.input_ids.long() for r in token_rows(4, (10, 10), 1).rows[first : first + count]])


def trained(model, adapter, ids):
    """The adapter's tensors after some steps; SGD, so that the size of the gradient counts."""
    parameters = adapter.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: whole(t).detach().clone() for n, t, _ in adapter.named_tensors()}


def worker(folder: Path) -> None:
    """Train with each way and method; see `forking`."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for kind, method in CASES:
        train_in_one_of_two(kind, method, folder / f"{kind}-{method}", dist.get_rank())
        dist.barrier()
    dist.destroy_process_group()


def train_in_one_of_two(kind: str, method: str, target: Path, rank: int) -> None:
    target.mkdir(exist_ok=True)
    model = tiny_llama()
    adapter = attach(model, {"method": method, "rank": 4}, name="job", seed=1)
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        wrapped = model
    tensors = trained(wrapped, adapter, batch(2 * rank, 2))
    if rank == 0 or kind == "fsdp2":  # FSDP2 gathers, so every process takes part
        adapter.save(target / "adapter")
    if rank == 0:
        from safetensors.torch import save_file

        save_file({n: t.contiguous() for n, t in tensors.items()}, target / "tensors.safetensors")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    forked(__name__, (2, folder))
    return folder


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_two_processes_equal_one(kind, method, two):
    from safetensors.torch import load_file

    made = two / f"{kind}-{method}"
    model = tiny_llama()
    adapter = attach(model, {"method": method, "rank": 4}, name="job", seed=1)
    start = {n: t.detach().clone() for n, t, _ in adapter.named_tensors()}
    expected = trained(model, adapter, batch())
    found = load_file(made / "tensors.safetensors")
    assert max(float((expected[n] - start[n]).abs().max()) for n in start) > 1e-3
    assert found.keys() == expected.keys()
    assert max(float((found[n] - expected[n]).abs().max()) for n in expected) < 1e-5
    from lorry.formats.load import load

    other = tiny_llama()
    loaded = load(other, made / "adapter", name="job")
    again = {n: t for n, t, _ in loaded.named_tensors()}
    assert max(float((again[n] - expected[n]).abs().max()) for n in expected) < 1e-5
