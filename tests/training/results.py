"""What training left in the adapters, and how far two results lie apart."""


def tensors(result, name):
    """Return copies of the tensors of one job's adapter."""
    return {n: t.detach().clone() for n, t, _ in result.adapters[name].named_tensors()}


def difference(a, b):
    """Return the largest difference between two results of `tensors`, which have the same names."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)
