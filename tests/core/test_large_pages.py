"""Memory in large pages: what is cut from it are ordinary tensors that own what they show."""

import copy
import io

import pytest
import torch
from safetensors.torch import load, save

from lorry.core.memory import LargePages

SHAPES = [(3, 5), (1000, 700), (1,), (0, 4), (5000, 4000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_do_not_overlap_and_keep_what_is_written(dtype):
    memory, like = LargePages(), torch.empty(0, dtype=dtype)
    tensors = [memory.empty(torch.Size(shape), like) for shape in SHAPES]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    del memory
    for number, (tensor, shape) in enumerate(zip(tensors, SHAPES, strict=True)):
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert bool((tensor == number + 1).all())


def test_each_has_a_storage_of_its_own_size():
    """Files and copies of one tensor do not drag the others along."""
    memory, like = LargePages(), torch.empty(0)
    first, second = (memory.empty(torch.Size((100, 100)), like).fill_(v) for v in (1.0, 2.0))
    assert second.untyped_storage().nbytes() == second.numel() * 4 and second.data_ptr() % 64 == 0
    file = io.BytesIO()
    torch.save(second, file)
    assert file.tell() < 2 * second.numel() * 4
    torch.testing.assert_close(load(save({"a": first, "b": second}))["b"], second)
    twin = copy.deepcopy(torch.nn.Parameter(first))
    first.zero_()
    assert bool((twin == 1).all()) and bool((second == 2).all())
