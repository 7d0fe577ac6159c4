"""Off-policy corrections, one file each, by the name they have in the configuration."""

from __future__ import annotations

from rollmesh.algorithms.corrections.correction import Corrected, Correction, Limits, Policies
from rollmesh.algorithms.corrections.decoupled import decoupled
from rollmesh.algorithms.corrections.dppo import dppo
from rollmesh.algorithms.corrections.icepop import icepop
from rollmesh.algorithms.corrections.m2po import m2po
from rollmesh.algorithms.corrections.none import against_behaviour, against_old
from rollmesh.algorithms.corrections.seq_mask_tis import seq_mask_tis
from rollmesh.algorithms.corrections.tis import tis

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
"""By type and by the policy that the ratio is taken against."""

__all__ = ["CORRECTIONS", "Corrected", "Correction", "Limits", "Policies"]
