"""Prompt datasets, opened from what a section of the mesh file names.

::

    file ── rollmesh.data.files ──► Columns (lists or Arrow) ──► PromptDataset ── rollmesh.data.rows ──► PromptRow

A dataset is opened without a look at every row. `check_rows` looks at them before a run starts, and `row` judges them
by the same rule whenever one is leased.
"""

from __future__ import annotations

import time

from rollmesh.config import DataSection
from rollmesh.data.files import Columns, read_columns
from rollmesh.data.rows import Cells, PromptRow, read_row
from rollmesh.errors import ConfigError

_ROWS_PER_LOOK_AT_THE_CLOCK = 256


class PromptDataset:
    """Rows that are asked for by index; made by `open_dataset`."""

    def __init__(self, name: str, section: DataSection, columns: Columns) -> None:
        self.name = name
        self._section = section
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns.prompts)

    def place(self, index: int) -> str:
        """Where row ``index`` stands, for messages: the file with the line, or with the row from 1."""
        lines = self._columns.lines
        where = f"row {index + 1}" if lines is None else f"line {lines[index]}"
        return f"{self._section.path}, {where}"

    def row(self, index: int) -> PromptRow:
        """Row ``index`` of the file, from 0.

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
        """Judge the rows in the order of the file for ``budget_s`` seconds at most; returns how many were judged.

        Raises:
            ConfigError: one of them cannot be used.
        """
        deadline = time.monotonic() + budget_s
        for index in range(len(self)):
            self.row(index)
            if index % _ROWS_PER_LOOK_AT_THE_CLOCK == 0 and time.monotonic() > deadline:
                return index + 1
        return len(self)


def open_dataset(section: DataSection, name: str, place: str = "data") -> PromptDataset:
    """Open the dataset that a section of the mesh file names.

    Args:
        section: which file, and which of its columns.
        name: what prompt ids call it, e.g. "train".
        place: dotted path of the section, for messages.

    Raises:
        ConfigError: the file is missing, empty, of an unknown kind, broken, or lacks a column; or its first row cannot
            be used.
    """
    columns = read_columns(section, place)
    if not len(columns.prompts):
        raise ConfigError(f"{place}.path", f"{section.path} has no rows", "name a file with at least one prompt")
    dataset = PromptDataset(name, section, columns)
    dataset.row(0)
    return dataset
