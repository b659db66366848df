"""Receipts: what an operation did, counted, so that nothing is ever a silent no-op."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FingerprintVerdict = Literal["match", "unknown", "quantized", "ignored"]


@dataclass(frozen=True)
class Receipt:
    """Proof of what was applied.

    Attributes
    ----------
    action
        What was done: ``attach``, ``load``, ``save``, ``fuse``, ``unfuse``, ``export``, ...
    adapter
        The adapter's name.
    tensors_applied, tensors_total
        How many tensors of the source found their place, of how many there were.
    sites
        Number of places in the model that the adapter now sits in.
    fingerprint
        ``match``: the base is the one that the adapter was made for; ``unknown``: the source carries no fingerprint;
        ``quantized``: names and shapes match, the weights could not be compared; ``ignored``: the caller said so.
    max_error, relative_error
        Largest absolute error that rounding introduced, and its Frobenius norm relative to the norm of the update; 0
        where the operation is exact.
    notes
        Whatever else the user should know.
    """

    action: str
    adapter: str
    tensors_applied: int
    tensors_total: int
    sites: int
    fingerprint: FingerprintVerdict = "unknown"
    max_error: float = 0.0
    relative_error: float = 0.0
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        """Return the receipt as one line and a line for each note."""
        text = (
            f"{self.action} '{self.adapter}': applied {self.tensors_applied} of {self.tensors_total} tensors to "
            f"{self.sites} sites, base fingerprint {self.fingerprint}"
        )
        if self.max_error:
            text += f", rounding error {self.max_error:.2e} at most ({self.relative_error:.2e} of the update)"
        return "\n".join([text, *(f"  note: {n}" for n in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt as plain data for JSON."""
        return asdict(self)
