"""A base and adapters in parts on two processes: the outputs of one process, and no more traffic than the formula."""

import json
from pathlib import Path

import pytest
import torch
from serving.tiny_engines import VOCABULARY, adapt, tiny
from training.launching import forked

import lorry
from lorry.core.errors import AdapterError, OptionError, SiteError
from lorry.serving.parallel import TensorParallel

RANKS = {"one": 1, "three": 3, "four": 4, "eight": 8}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = TARGETS[:4]
ROWS = ["three", None, "one", {"four": 0.5, "eight": -0.25}, "eight", None]
LENGTH = 5
HIDDEN, WIDTHS = 32, {"q": 32, "k": 16}


def ids():
    return torch.randint(VOCABULARY, (len(ROWS), LENGTH), generator=torch.Generator().manual_seed(3))


class Traffic(torch.utils._python_dispatch.TorchDispatchMode):
    """Adds up the numbers that each process of a ring sends in what really runs of collectives."""

    def __init__(self, size):
        super().__init__()
        self.size, self.gathered, self.reduced = size, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name() if hasattr(function, "name") else str(function)
        if name.startswith("c10d::"):
            assert name in ("c10d::_allgather_base_", "c10d::allreduce_")
            if name == "c10d::_allgather_base_":
                self.gathered += (self.size - 1) * args[1].numel()
            else:
                self.reduced.append(2 * (self.size - 1) * args[0][0].numel() // self.size)
        return function(*args, **(kwargs or {}))


def worker(folder: Path) -> None:
    """Run the parts of one process; see `training.forking`."""
    import torch.distributed as dist
    from safetensors.torch import save_file
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    with torch.no_grad():
        for family in ("llama", "qwen2"):
            parallel = TensorParallel(tiny(family), mesh)
            held = sum(layer.weight.numel() for layer in parallel.layers.values())
            for name in RANKS:
                parallel.load(name, folder / family / name)
            with parallel.rows(ROWS) as model:
                found[f"{family}.rows"] = model(ids()).logits
            with parallel.rows(ROWS, [LENGTH] * len(ROWS)) as model:
                found[f"{family}.packed"] = model(ids().view(1, -1)).logits
            found[f"{family}.bare"] = parallel.model(ids()).logits
            with parallel.rows([None] * len(ROWS)) as model:
                found[f"{family}.none"] = model(ids()).logits
            found[f"{family}.held"] = torch.tensor(held)
        traffic = sent(mesh, folder)
    if dist.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "found.safetensors")
        (folder / "traffic.json").write_text(json.dumps(traffic))
    (folder / f"refused.{dist.get_rank()}.json").write_text(json.dumps(refused(mesh, folder)))
    dist.destroy_process_group()


def sent(mesh, folder):
    """Count what one pass sends, for all rows with one adapter of attention, and for the bare base."""
    parallel = TensorParallel(tiny(), mesh)
    parallel.load("attention", folder / "attention")
    counts = []
    for rows in (["attention"] * len(ROWS), [None] * len(ROWS)):
        with parallel.rows(rows) as model, Traffic(2) as traffic:
            model(ids())
        counts.append([traffic.gathered, sum(traffic.reduced)])
    return counts


def refused(mesh, folder):
    parallel, said = TensorParallel(tiny(), mesh), []
    parallel.load("one", folder / "llama" / "one")
    for wrong, error in (
        (lambda: parallel.load("one", folder / "llama" / "one"), AdapterError),
        (lambda: parallel.load("head", folder / "head"), SiteError),
        (lambda: parallel.rows(["two"]).__enter__(), AdapterError),
        (lambda: parallel.unload("two"), AdapterError),
        (lambda: TensorParallel(tiny("gpt2"), mesh), OptionError),
    ):
        try:
            wrong()
        except error as found:
            said.append(str(found))
    return said


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What two processes found, and what one finds."""
    from safetensors.torch import load_file

    folder, expected = tmp_path_factory.mktemp("parallel"), {}
    for family in ("llama", "qwen2"):
        model = tiny(family)
        for seed, (name, rank) in enumerate(RANKS.items()):
            method = {"method": "lora", "rank": rank, "alpha": 8}
            adapt(model, name, method, seed, targets=TARGETS).save(folder / family / name)
        with torch.no_grad():
            with lorry.rows(model, ROWS):
                expected[f"{family}.rows"] = model(ids()).logits
            with lorry.rows(model, ROWS, lengths=[LENGTH] * len(ROWS)):
                expected[f"{family}.packed"] = model(ids().view(1, -1)).logits
            expected[f"{family}.bare"] = expected[f"{family}.none"] = model(ids()).logits
        split = [m.weight.numel() for path, m in model.named_modules() if path.rpartition(".")[2] in TARGETS]
        expected[f"{family}.held"] = torch.tensor(sum(split) // 2)
    adapt(tiny(), "a", {"method": "lora", "rank": 4, "alpha": 8}, targets=ATTENTION).save(folder / "attention")
    adapt(tiny(), "a", targets=["lm_head"]).save(folder / "head")
    forked(__name__, (2, folder))
    return folder, load_file(folder / "found.safetensors"), expected


def test_two_processes_give_what_one_gives(done):
    _, found, expected = done
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10, msg=name)
    assert (expected["llama.rows"] - expected["llama.bare"]).abs().max() > 0.1


def test_the_traffic_is_that_of_the_formula(done):
    """S-LoRA's section on tensor parallelism: 5 (N - 1) T r / N beside the base's 2 (N - 1) T h / N, in a block."""
    (gathered, reduced), bare = json.loads((done[0] / "traffic.json").read_text())
    devices, layers, rank, tokens = 2, 2, 4, LENGTH * len(ROWS)
    share = (devices - 1) * tokens * rank * layers // devices
    base = 2 * (devices - 1) * tokens * HIDDEN * layers // devices
    assert bare == [0, 2 * base]  # attention's sum, and that of the layers beside it
    assert (gathered, reduced - bare[1]) == (3 * share, 2 * share)


def test_what_cannot_be_split_is_refused(done):
    for rank in range(2):
        said = json.loads((done[0] / f"refused.{rank}.json").read_text())
        assert len(said) == 5 and "already" in said[0] and "lm_head" in said[1] and "no layers" in said[4]
