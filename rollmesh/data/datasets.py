"""Prompt datasets, opened by a data section of the mesh file.

::

    file ── rollmesh.data.files ──► Columns (lists or Arrow) ──► PromptDataset ── rollmesh.data.rows ──► PromptRow

`open_dataset` looks at the first row only. `check_rows` looks at many rows before a run starts. `row` looks at a row
when the row is leased. All three apply the same rule.
"""

from __future__ import annotations

import time

from rollmesh.config import DataSection
from rollmesh.data.files import Columns, read_columns
from rollmesh.data.rows import Cells, PromptRow, read_row
from rollmesh.errors import ConfigError

_ROWS_PER_LOOK_AT_THE_CLOCK = 256


class PromptDataset:
    """The rows of one dataset, found by index; made by `open_dataset`."""

    def __init__(self, name: str, section: DataSection, columns: Columns) -> None:
        self.name = name
        self._section = section
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns.prompts)

    def place(self, index: int) -> str:
        """Return the place of row ``index`` for messages: the file, and the line or the row counted from 1."""
        lines = self._columns.lines
        where = f"row {index + 1}" if lines is None else f"line {lines[index]}"
        return f"{self._section.path}, {where}"

    def row(self, index: int) -> PromptRow:
        """Return row ``index`` of the file, from 0.

        Raises:
            IndexError: there is no such row.
            ConfigError: a cell cannot be used; the message names file, row and column.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} lies outside the {len(self)} rows of {self._section.path}")
        columns, section = self._columns, self._section
        return read_row(
            Cells(
                place=self.place(index),
                prompt=columns.prompts[index],
                label=None if columns.labels is None else columns.labels[index],
                has_label=columns.labels is not None,
                datasource=None if columns.datasources is None else columns.datasources[index],
                prompt_key=section.input_key,
                label_key=section.label_key or "label",
                datasource_key=section.datasource_key,
            )
        )

    def check_rows(self, budget_s: float) -> int:
        """Check the rows in the order of the file for about ``budget_s`` seconds. Return the number of checked rows.

        Raises:
            ConfigError: a row cannot be used.
        """
        deadline = time.monotonic() + budget_s
        for index in range(len(self)):
            self.row(index)
            if index % _ROWS_PER_LOOK_AT_THE_CLOCK == 0 and time.monotonic() > deadline:
                return index + 1
        return len(self)


def open_dataset(section: DataSection, name: str, place: str = "data") -> PromptDataset:
    """Return the dataset that a data section of the mesh file names.

    Args:
        section: the file and its columns.
        name: the name of the dataset in prompt ids, e.g. "train".
        place: the dotted path of the section, for messages.

    Raises:
        ConfigError: the file is missing, is empty, is of an unknown kind, is broken or lacks a column; or the first row
            cannot be used.
    """
    columns = read_columns(section, place)
    if not len(columns.prompts):
        raise ConfigError(f"{place}.path", f"{section.path} has no rows", "name a file with at least one prompt")
    dataset = PromptDataset(name, section, columns)
    dataset.row(0)
    return dataset
