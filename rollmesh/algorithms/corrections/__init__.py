"""Off-policy corrections by the name that they have in the configuration."""

from __future__ import annotations

from rollmesh.algorithms.corrections.correction import Corrected, Correction, Limits, Policies
from rollmesh.algorithms.corrections.decoupled import decoupled
from rollmesh.algorithms.corrections.dppo import dppo
from rollmesh.algorithms.corrections.m2po import m2po
from rollmesh.algorithms.corrections.none import against_behaviour, against_old
from rollmesh.algorithms.corrections.truncated import icepop, seq_mask_tis, tis

CORRECTIONS: dict[tuple[str, str], Correction] = {
    ("none", "behaviour"): against_behaviour,
    ("none", "old"): against_old,
    ("tis", "old"): tis,
    ("icepop", "old"): icepop,
    ("seq_mask_tis", "old"): seq_mask_tis,
    ("decoupled", "old"): decoupled,
    ("m2po", "behaviour"): m2po,
    ("dppo", "behaviour"): dppo,
}
"""The corrections by their type and by the policy that the ratio is taken against."""

__all__ = ["CORRECTIONS", "Corrected", "Correction", "Limits", "Policies"]
