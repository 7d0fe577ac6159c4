"""The configuration: one YAML file describes the mesh, every process reads all of it.

`section` has the base class and the loader, `shared` the sections that no single service owns. Each service's own
section lies beside the service, and `services.config.MeshConfig` composes and cross-checks them.
"""

from rollmesh.config.section import Section, load_yaml, merge, validate
from rollmesh.config.shared import (
    DataSection,
    EvaluationSection,
    ModelSection,
    ReplaySection,
    RunSection,
    SamplingSection,
    TrainingSection,
    WeightsSection,
)

__all__ = [
    "DataSection",
    "EvaluationSection",
    "ModelSection",
    "ReplaySection",
    "RunSection",
    "SamplingSection",
    "Section",
    "TrainingSection",
    "WeightsSection",
    "load_yaml",
    "merge",
    "validate",
]
