"""What each of the tests' architectures ends with, and the table of it in `docs/models.md`.

::

    python -m tests.unit.models.table      writes the table anew
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollmesh.models.attention import AUTO, implementation_of, name_of, settle_attention
from rollmesh.models.probe import ModelProbe, choose_batching, ways_of_batching
from rollmesh.models.rows import Batching, Rectangle
from services.learner.policy import PolicyModel
from tests.unit.models.architectures import ARCHITECTURES, make_model

DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"
BEGIN, END = "<!-- table: python -m tests.unit.models.table -->\n", "<!-- end of table -->\n"


def make_probe(policy: PolicyModel, dtype: str = "float32") -> ModelProbe:
    """The probe of a policy outside of an engine."""
    config = policy.causal_lm.config

    @torch.no_grad()
    def forward(rectangle: Rectangle, predictors: Tensor, targets: Tensor) -> Tensor:
        logprobs: Tensor = policy(
            rectangle.input_ids, rectangle.position_ids, predictors, targets, rectangle.boundaries
        )[0]
        return logprobs

    return ModelProbe(name_of(policy.causal_lm), forward, config.get_text_config().vocab_size, dtype, list)


def choose(model: Any) -> tuple[PolicyModel, Batching]:
    """As a learner does with one rank on a CPU."""
    policy = PolicyModel(model, temperature=1.0)
    probe = settle_attention(model, lambda: make_probe(policy), AUTO, "learner.attention")
    candidates = ways_of_batching([implementation_of(model)], may_pack=True)
    return policy, choose_batching([probe], candidates, should_log=False)


@functools.cache
def examined(architecture: str) -> tuple[PolicyModel, Batching]:
    """An architecture of the tests, and how its sequences are batched."""
    return choose(make_model(architecture))


def table() -> str:
    """Markdown, one line for each architecture."""
    lines = ["| architecture | attention | sequences are |", "|---|---|---|"]
    for architecture in sorted(ARCHITECTURES):
        policy, batching = examined(architecture)
        lines.append(f"| `{architecture}` | {implementation_of(policy.causal_lm)} | {batching} |")
    return "\n".join(lines) + "\n"


def written_table() -> str:
    """The table in the document."""
    return DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Write the table anew."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
