"""The measurement of a dataset's prompts before a run: they are rendered as the workers render them, in bounded time.

A chat template needs transformers, whose import takes seconds. So the measurement with a chat template is a process of
its own (``python -m rollmesh.data.measure``). The process reads one `MeasureCall` from each line of stdin. It answers
on stdout with its measurements, or with the three parts of a ConfigError. Plain text needs only the file of the fast
tokenizer.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rollmesh.config import DataSection, ModelSection
from rollmesh.data.datasets import PromptDataset, open_dataset
from rollmesh.data.render import OverlongPromptError, PromptRenderer, Tokenizer, UnusablePromptError, load_tokenizer
from rollmesh.data.rows import first_line
from rollmesh.errors import ConfigError

START_TIMEOUT_S = 120.0
"""Seconds that the process may take beyond its budget, to import transformers and to open the datasets again."""


class MeasureCall(BaseModel):
    """A request to measure the token lengths of one dataset.

    Attributes:
        place: the dotted path of ``data``.
        data: the dataset, and how its prompts are rendered.
        model: the model whose tokenizer is used.
        max_new_tokens: the number of tokens that have to fit behind a prompt.
        vocab_size: the number of tokens of the model; None if config.json does not say.
        budget_s: seconds after which the remaining prompts stay unmeasured.
    """

    place: str
    data: DataSection
    model: ModelSection
    max_new_tokens: int
    vocab_size: int | None
    budget_s: float


class Measured(BaseModel):
    """The token lengths that a measurement found.

    Attributes:
        longest: the number of tokens of the longest prompt that the run will use.
        num_measured: the number of rendered prompts, from the first prompt on.
        num_dropped: the number of rendered prompts that the run leaves out for their length.
        first_index: the row of the first prompt that the run will use.
        first_text: the text of this prompt.
    """

    longest: int
    num_measured: int
    num_dropped: int
    first_index: int
    first_text: str


class _Fault(BaseModel):
    """A ConfigError, as one process sends it to another."""

    place: str
    problem: str
    fix: str


class _Answer(BaseModel):
    found: list[Measured] = []
    fault: _Fault | None = None


class _FileTokenizer:
    """The tokenizer in the file of a fast tokenizer, for text without a chat template."""

    chat_template = None

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        try:
            self._tokenizer = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more exact
            problem = f"{file} cannot be used ({first_line(error)})"
            raise ConfigError("model.path", problem, "save the model's tokenizer again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


def measure(dataset: PromptDataset, call: MeasureCall, tokenizer: Tokenizer) -> Measured:
    """Return the token lengths of the prompts, from the first prompt on, until the budget is used up.

    Raises:
        ConfigError: a prompt cannot be used, all prompts are too long, or the tokenizer belongs to another model.
    """
    limit = call.model.max_length - call.max_new_tokens
    renderer = PromptRenderer(tokenizer, call.data, limit, call.place)
    deadline = time.monotonic() + call.budget_s
    longest = num_dropped = num_measured = 0
    first: tuple[int, str] | None = None
    for index in range(len(dataset)):
        num_measured += 1
        try:
            prompt = renderer.render(dataset.row(index).prompt_json, dataset.place(index))
        except OverlongPromptError:
            num_dropped += 1
        except UnusablePromptError as error:
            raise ConfigError(dataset.place(index), error.problem, error.fix) from error
        else:
            _check_vocabulary(prompt.token_ids, call)
            longest = max(longest, len(prompt.token_ids))
            first = first or (index, prompt.text)
        if time.monotonic() > deadline:
            break
    if first is None:
        problem = f"each of the first {num_measured:,} prompts of {call.data.path} has more than {limit} tokens"
        raise ConfigError(f"{call.place}.overlong_prompts", problem, "raise model.max_length, or use truncate")
    return Measured(
        longest=longest,
        num_measured=num_measured,
        num_dropped=num_dropped,
        first_index=first[0],
        first_text=first[1],
    )


def _check_vocabulary(token_ids: Sequence[int], call: MeasureCall) -> None:
    if call.vocab_size is not None and max(token_ids) >= call.vocab_size:
        raise ConfigError(
            "model.path",
            f"the tokenizer in {call.model.path} has token {max(token_ids)}, but the model's vocab_size is "
            f"{call.vocab_size}",
            "bring the two together from one export",
        )


def measure_datasets(datasets: Sequence[PromptDataset], calls: Sequence[MeasureCall]) -> list[Measured] | None:
    """Return the measurement of each dataset; None where a library is missing with which the workers render.

    Raises:
        ConfigError: a model, template or prompt cannot be used.
    """
    file = calls[0].model.path / "tokenizer.json"
    try:
        if file.exists() and not any(call.data.apply_chat_template for call in calls):
            tokenizer: Any = _FileTokenizer(file)
            return [measure(dataset, call, tokenizer) for dataset, call in zip(datasets, calls, strict=True)]
        return _measure_elsewhere(calls)
    except ModuleNotFoundError:
        return None


def _measure_elsewhere(calls: Sequence[MeasureCall]) -> list[Measured]:
    timeout_s = START_TIMEOUT_S + sum(call.budget_s for call in calls)
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-m", "rollmesh.data.measure"],
            input="\n".join(call.model_dump_json() for call in calls),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        problem = f"the tokenizer in {calls[0].model.path} has rendered nothing within {timeout_s:g} s"
        raise ConfigError("model.path", problem, "look for an endless loop in its chat template or code") from error
    lines = process.stdout.splitlines()
    if process.returncode or not lines:
        last = next((line for line in reversed(process.stderr.splitlines()) if line.strip()), "no reason given")
        if last.startswith("ModuleNotFoundError"):
            raise ModuleNotFoundError(last)
        problem = f"the tokenizer in {calls[0].model.path} cannot be tried ({last.strip()})"
        raise ConfigError("model.path", problem, "save the model's tokenizer again")
    answer = _Answer.model_validate_json(lines[-1])
    if answer.fault is not None:
        raise ConfigError(answer.fault.place, answer.fault.problem, answer.fault.fix)
    return answer.found


def main() -> int:
    """Read one call from each line of stdin, and write the answer as the last line of stdout."""
    calls = [MeasureCall.model_validate_json(line) for line in sys.stdin.read().splitlines()]
    model = calls[0].model
    answer = _Answer()
    if not model.trust_remote_code:
        # Without torch, transformers offers only tokenizers. That is enough here, and takes 2 s of work instead of 5.
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries and the model's own code may print
            tokenizer = load_tokenizer(model.path, model.trust_remote_code)
            for call in calls:
                dataset = open_dataset(call.data, call.place, call.place)
                answer.found.append(measure(dataset, call, tokenizer))
    except ConfigError as error:
        answer.fault = _Fault(place=error.place, problem=error.problem, fix=error.fix)
    print(answer.model_dump_json())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
