"""The main job from data to saved adapters, on the pocket model, in two minutes: what ``lorry demo`` runs."""

from lorry.demo.job import Demo, run

__all__ = ["Demo", "run"]
