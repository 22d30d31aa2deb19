"""The dictionary of attractors (end points of ID training trajectories), its health and its verdict."""

from traj_ood.attractors.dictionary import AttractorDictionary, NearestAttractor, NearestOther
from traj_ood.attractors.health import Health, Verdict

__all__ = ["AttractorDictionary", "Health", "NearestAttractor", "NearestOther", "Verdict"]
