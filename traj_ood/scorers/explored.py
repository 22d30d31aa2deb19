"""What the training pass found in a batch, as a part of a store and back."""

from __future__ import annotations

from collections.abc import Sequence

from traj_ood.attractors import AttractorDictionary
from traj_ood.io.parts import Part
from traj_ood.scorers.base import Evidence

_DICTIONARY = "dictionary/"


def explored_part(
    ids: tuple[str, ...],
    dictionary: AttractorDictionary | None,
    evidence: Evidence,
    failures: Sequence[dict[str, str]] = (),
) -> Part:
    """The part of a batch of :meth:`ScorerSet.explore_all`: B ids, end points and the evidence that is kept."""
    tensors, notes = evidence.tensors(), {}
    if dictionary is not None:
        tensors |= {_DICTIONARY + name: values for name, values in dictionary.tensors().items()}
        notes = {"provenance": dict(dictionary.provenance)}
    return Part(ids, list(failures), tensors, notes)


def joined_parts(parts: Sequence[Part]) -> tuple[AttractorDictionary | None, Evidence]:
    """The end points, if there are any, and the evidence of all batches in ``parts``, each with at least one image."""
    found = [_dictionary_of(part) for part in parts if "provenance" in part.notes]
    evidence = Evidence.join([Evidence.from_tensors(part.tensors) for part in parts])
    return AttractorDictionary.concatenate(found) if found else None, evidence


def _dictionary_of(part: Part) -> AttractorDictionary:
    tensors = {k.removeprefix(_DICTIONARY): v for k, v in part.tensors.items() if k.startswith(_DICTIONARY)}
    return AttractorDictionary(ids=part.ids, provenance=part.notes["provenance"], **tensors)
