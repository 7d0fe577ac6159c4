"""The datasets as the rollout workers will see them: rows readable, prompts rendered, measured and short enough.

Uses the file of the fast tokenizer and the text of the chat template directly, because transformers takes seconds to
import. Where a folder has no such file, and for what lies beyond the time spent here, the workers check.
"""

from __future__ import annotations

import datetime
import json
import string
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollmesh.config import DataSection, ModelSection
from rollmesh.data.datasets import PromptDataset, open_dataset
from rollmesh.errors import ConfigError

BUDGET_S = 5.0
"""Time to measure one dataset's prompts; a longer one is measured as far as that goes."""
_CHUNK = 256

Prompt = str | list[dict[str, Any]]
Render = Callable[[Prompt], str]


class _TemplateRefusalError(Exception):
    """The chat template called its ``raise_exception``."""


@dataclass(frozen=True)
class CheckedPrompts:
    """A dataset that can be used.

    Attributes:
        result: what was found.
        first_text: the first row's prompt as rendered; None where only the worker can render.
        first_label_json: that row's label; empty where the dataset has none.
    """

    result: str
    first_text: str | None
    first_label_json: str


def check_prompts(
    place: str, name: str, data: DataSection, model: ModelSection, max_new_tokens: int, vocab_size: int | None
) -> CheckedPrompts:
    """Open a dataset and check its prompts.

    Args:
        place: dotted path of ``data``.
        name: of the dataset in prompt ids.
        model: whose tokenizer and length count.
        max_new_tokens: what has to fit behind a prompt.
        vocab_size: tokens that the model knows, where its folder says.

    Raises:
        ConfigError: the file, a row, a template or a prompt cannot be used.
    """
    if data.input_template is not None:
        _check_template(f"{place}.input_template", data.input_template)
    dataset = open_dataset(data, name, place)
    render = _chat_renderer(place, model.path) if data.apply_chat_template else _text_renderer(place, data)
    tokenizer = _load_tokenizer(model.path)
    first_text = None if render is None else _rendered(dataset, 0, data, render)
    first_label_json = dataset.row(0).label_json
    if render is None or tokenizer is None:
        return CheckedPrompts(f"{len(dataset):,} prompts", first_text, first_label_json)
    longest, measured = _measure(place, dataset, data, render, tokenizer, model, max_new_tokens, vocab_size)
    of_first = "" if measured == len(dataset) else f" of the first {measured:,}"
    result = f"{len(dataset):,} prompts, the longest{of_first} {longest} tokens"
    return CheckedPrompts(result, first_text, first_label_json)


def _measure(
    place: str,
    dataset: PromptDataset,
    data: DataSection,
    render: Render,
    tokenizer: Any,
    model: ModelSection,
    max_new_tokens: int,
    vocab_size: int | None,
) -> tuple[int, int]:
    """(tokens of the longest prompt, prompts measured)."""
    limit = model.max_length - max_new_tokens
    deadline = time.monotonic() + BUDGET_S
    longest = measured = 0
    for start in range(0, len(dataset), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(dataset)))
        texts = [_rendered(dataset, row, data, render) for row in rows]
        for row, encoding in zip(rows, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            if vocab_size is not None and max(encoding.ids, default=0) >= vocab_size:
                problem = f"the tokenizer in {model.path} has token {max(encoding.ids)}, but the model's vocab_size is "
                raise ConfigError("model.path", f"{problem}{vocab_size}", "bring the two together from one export")
            if len(encoding) > limit and data.overlong_prompts == "error":
                raise ConfigError(
                    f"{data.path}, row {row + 1}",
                    f"has {len(encoding)} prompt tokens, but model.max_length {model.max_length} less {max_new_tokens} "
                    f"new tokens leaves {limit}",
                    f"raise model.max_length, or set {place}.overlong_prompts to drop or truncate",
                )
            longest = max(longest, len(encoding))
        measured = rows.stop
        if time.monotonic() > deadline:
            break
    return longest, measured


def _rendered(dataset: PromptDataset, row: int, data: DataSection, render: Render) -> str:
    try:
        return render(dataset.row(row).prompt)
    except _TemplateRefusalError as error:
        place = f"{data.path}, row {row + 1}"
        raise ConfigError(place, f"is refused by the chat template ({error})", "correct the row") from error


def _check_template(place: str, template: str) -> None:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(place, f"{template!r} is no format string ({error})", "double literal braces") from error
    if fields not in ([""], ["0"]):
        raise ConfigError(place, f"{template!r} has {len(fields)} fields", "write exactly one {}")


def _text_renderer(place: str, data: DataSection) -> Render:
    def render(prompt: Prompt) -> str:
        if not isinstance(prompt, str):
            raise ConfigError(
                f"{place}.apply_chat_template",
                f"is off, but {data.path} has lists of chat messages under {data.input_key!r}",
                "turn it on, or name a text column as input_key",
            )
        return prompt if data.input_template is None else data.input_template.format(prompt)

    return render


def _load_tokenizer(path: Path) -> Any:
    """None where there is no file of a fast tokenizer, or no library to read it."""
    file = path / "tokenizer.json"
    if not file.exists():
        return None
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more exact
        raise ConfigError(
            "model.path", f"{file} cannot be used ({error})", "save the model's tokenizer again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _chat_renderer(place: str, path: Path) -> Render | None:
    """The model's chat template, with what transformers offers to templates; None where only the worker can tell.

    Raises:
        ConfigError: the model has none, or it is not valid.
    """
    settings = _tokenizer_settings(path)
    source = _template_source(path, settings)
    if source is None:
        raise ConfigError(
            f"{place}.apply_chat_template",
            f"is on, but the tokenizer in {path} has no chat template",
            "turn it off, or add chat_template.jinja to the model folder",
        )
    try:
        from jinja2 import TemplateError, TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        return None

    def refuse(message: str) -> None:
        raise _TemplateRefusalError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.datetime.now().strftime(form))
    try:
        template = environment.from_string(source)
    except TemplateSyntaxError as error:
        if error.message and "unknown tag 'generation'" in error.message.lower():
            return None  # an extension of transformers' own
        problem = f"the chat template in {path} is not valid ({error.message} in line {error.lineno})"
        raise ConfigError("model.path", problem, "correct it") from error
    tokens = {name: _token_text(value) for name, value in settings.items() if name.endswith("_token")}

    def render(prompt: Prompt) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            return template.render(messages=messages, add_generation_prompt=True, **tokens)
        except TemplateError as error:
            raise _TemplateRefusalError(str(error)) from error

    return render


def _tokenizer_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _template_source(path: Path, settings: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
    return source if isinstance(source, str) else None


def _token_text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value
