"""End points of ID training samples: the dictionary of attractors, its health and its verdict."""

from traj_ood.attractors.dictionary import AttractorDictionary, NearestAttractor, NearestOther
from traj_ood.attractors.health import Health, Verdict

__all__ = ["AttractorDictionary", "Health", "NearestAttractor", "NearestOther", "Verdict"]
