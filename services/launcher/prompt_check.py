"""Check the datasets: their rows can be read, and their prompts can be rendered and are short enough.

The check has a bounded time, and judges as many rows from the first on as fit. The rollout worker judges later rows by
the same rules, when they are leased and rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollmesh.config import DataSection, ModelSection
from rollmesh.data.datasets import open_dataset
from rollmesh.data.measure import MeasureCall, Measured, measure_datasets

ROWS_BUDGET_S = 10.0
"""Time to judge the rows of one dataset."""
BUDGET_S = 5.0
"""Time to render and measure the prompts of one dataset."""


@dataclass(frozen=True)
class PromptSource:
    """A dataset of the mesh file.

    Attributes:
        place: the dotted path of the section, e.g. "evaluation.data".
        data: the section that names the dataset.
        max_new_tokens: the number of tokens that have to fit behind a prompt.
    """

    place: str
    data: DataSection
    max_new_tokens: int


@dataclass(frozen=True)
class CheckedPrompts:
    """A dataset that can be used.

    Attributes:
        result: the facts that the check found, for a person.
        num_rows: the number of prompts of one epoch.
        first_place: the file and the row of the first prompt that will be used.
        first_text: that prompt as rendered text; None where only the rollout worker can render prompts.
        first_label_json: the label of that row; empty where the dataset has no labels.
    """

    result: str
    num_rows: int
    first_place: str
    first_text: str | None
    first_label_json: str


def check_prompts(sources: Sequence[PromptSource], model: ModelSection, vocab_size: int | None) -> list[CheckedPrompts]:
    """Open datasets and check their prompts.

    Args:
        sources: the datasets.
        model: the model whose tokenizer and length count.
        vocab_size: the number of tokens that the model knows; None where its folder does not tell.

    Returns:
        The result for each source.

    Raises:
        ConfigError: a file, a row, a template or a prompt cannot be used.
    """
    datasets = [open_dataset(source.data, source.place, source.place) for source in sources]
    nums_judged = [dataset.check_rows(ROWS_BUDGET_S) for dataset in datasets]
    calls = [
        MeasureCall(
            place=source.place,
            data=source.data,
            model=model,
            max_new_tokens=source.max_new_tokens,
            vocab_size=vocab_size,
            budget_s=BUDGET_S,
        )
        for source in sources
    ]
    found: Sequence[Measured | None] = measure_datasets(datasets, calls) or [None] * len(datasets)
    checked = []
    for dataset, num_judged, measured in zip(datasets, nums_judged, found, strict=True):
        first = 0 if measured is None else measured.first_index
        checked.append(
            CheckedPrompts(
                result=_describe(len(dataset), num_judged, measured),
                num_rows=len(dataset),
                first_place=dataset.place(first),
                first_text=None if measured is None else measured.first_text,
                first_label_json=dataset.row(first).label_json,
            )
        )
    return checked


def _describe(num_rows: int, num_judged: int, measured: Measured | None) -> str:
    """Return the facts that were found as text, with a clause for each part that was not checked."""
    clauses = [f"{num_rows:,} prompts"]
    if num_judged < num_rows:
        clauses.append(f"the first {num_judged:,} readable, the rest not looked at")
    if measured is None:
        return ", ".join([*clauses, "not measured: transformers is not installed here"])
    of_first = "" if measured.num_measured == num_rows else f" of the first {measured.num_measured:,}"
    if measured.num_dropped:
        clauses.append(f"{measured.num_dropped:,}{of_first} left out as too long")
    clauses.append(f"the longest{of_first} {measured.longest} tokens")
    return ", ".join(clauses)
