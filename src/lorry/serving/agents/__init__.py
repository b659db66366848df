"""Roles with adapters of their own that work on one growing text and share its cache (LRAgent, arXiv 2602.01053)."""

from __future__ import annotations

from lorry.serving.agents.policy import POLICIES, CachePolicy, policy_from
from lorry.serving.agents.trajectory import Counts, Trajectory, Turn

__all__ = ["POLICIES", "CachePolicy", "Counts", "Trajectory", "Turn", "policy_from"]
