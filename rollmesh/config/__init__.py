"""The configuration: one YAML file describes the mesh, and every process reads the whole file.

`yaml_file` reads and writes the file. `section` has the base class of sections. `shared` has the sections that no
single service owns. Each service's own section lies beside the service. `services.config.MeshConfig` composes all
sections and checks them against each other.
"""

from rollmesh.config.section import Section, merge, validate, with_absolute_paths
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
from rollmesh.config.yaml_file import dump_yaml, load_yaml

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
    "dump_yaml",
    "load_yaml",
    "merge",
    "validate",
    "with_absolute_paths",
]
