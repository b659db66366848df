"""What of a trajectory's cache roles share: four schemes, which differ in three choices."""

from __future__ import annotations

from dataclasses import dataclass

from lorry.core.errors import OptionError, near_misses


@dataclass(frozen=True)
class CachePolicy:
    """One scheme (table of section 4 of LRAgent).

    Attributes
    ----------
    name
        Of the scheme.
    shared
        Whether keys and values are kept once for all roles.
    split
        Whether values are kept without the adapters' part, which lies beside them at the adapters' rank.
    low_shared
        Whether that part is kept once for all roles, too; their down factors A must be the same then.
    exact
        Whether a role computes what it would compute if it had read everything by itself.
    """

    name: str
    shared: bool
    split: bool = False
    low_shared: bool = False
    exact: bool = False

    @property
    def rereads(self) -> bool:
        """Whether a role runs all that it has not read, and not only what nobody has."""
        return not self.shared or (self.split and not self.low_shared)


POLICIES: dict[str, CachePolicy] = {
    policy.name: policy
    for policy in (
        CachePolicy("non-shared", shared=False, exact=True),
        CachePolicy("full-shared", shared=True),
        CachePolicy("base-shared", shared=True, split=True),
        CachePolicy("base-lr-shared", shared=True, split=True, low_shared=True),
    )
}


def policy_from(value: str | CachePolicy) -> CachePolicy:
    """Return a scheme from its name.

    Raises
    ------
    OptionError
        There is no scheme of that name.
    """
    if isinstance(value, CachePolicy):
        return value
    if value not in POLICIES:
        raise OptionError(
            f"There is no scheme '{value}' of sharing a cache.{near_misses(value, POLICIES)} There are: "
            f"{', '.join(POLICIES)}."
        )
    return POLICIES[value]
