"""From a dataset row's prompt to the text and the tokens that the policy sees.

::

    prompt_json ── str, chat template on ──► [{"role": "user", "content": str}] ─┐
                ── list of messages, chat template on ──────────────────────────┴─► chat template ─► text ─► token ids
                ── str, template off ──► input_template.format(str), or as it is ────────────────────►

Text is tokenised without added special tokens: what the model should see in front of a prompt, its template writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from rollmesh.config import DataSection
from rollmesh.errors import ConfigError, InvalidArgumentError


class Tokenizer(Protocol):
    """What rendering and decoding need of a Hugging Face tokenizer."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str: ...

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """``text`` is whole; ``token_ids`` ([P], at least 1) may have been cut from the left."""

    text: str
    token_ids: list[int]


class OverlongPromptError(InvalidArgumentError):
    """The prompt leaves no room for the response, and the configuration says to leave such prompts out."""


class PromptRenderer:
    """Renders and tokenises the prompts of one data section.

    Args:
        tokenizer: the policy's.
        data: how to render, and what to do with prompts that are too long.
        max_prompt_tokens: tokens that the model's length leaves for a prompt.
        place: dotted path of ``data`` in the configuration, for messages.

    Raises:
        ConfigError: the template cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, data: DataSection, max_prompt_tokens: int, place: str = "data") -> None:
        self._tokenizer = tokenizer
        self._data = data
        self._max_prompt_tokens = max_prompt_tokens
        self._place = place
        if data.apply_chat_template and not tokenizer.chat_template:
            raise ConfigError(
                f"{place}.apply_chat_template",
                "is on but the model's tokenizer has no chat template",
                "turn it off, or add chat_template.jinja to the model folder",
            )
        if data.input_template is not None:
            _fill(data.input_template, "", place)

    def render(self, prompt_json: str, prompt_id: str = "") -> RenderedPrompt:
        """Render one prompt.

        Args:
            prompt_json: the row's cell as JSON: a string, or a list of chat messages.
            prompt_id: names the prompt in messages.

        Raises:
            InvalidArgumentError: this prompt can never be rendered; `OverlongPromptError` if it is to be left out
                for its length.
            ConfigError: the prompt shows that the data section is wrong, or it is too long and
                ``overlong_prompts`` is ``error``.
        """
        name = f"prompt {prompt_id or prompt_json[:40]}"
        text = self._text(_parse(prompt_json, name), name)
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        if not token_ids:
            raise InvalidArgumentError(f"{name} renders to no tokens; remove the row", "prompt_json")
        if len(token_ids) > self._max_prompt_tokens:
            token_ids = self._shorten(token_ids, name)
        return RenderedPrompt(text, token_ids)

    def _text(self, prompt: str | list[dict[str, Any]], name: str) -> str:
        if self._data.apply_chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            try:
                return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            # The template is the model author's code: what it raises depends on it alone.
            except Exception as error:
                raise InvalidArgumentError(
                    f"{name} is refused by the chat template ({type(error).__name__}: {error})", "prompt_json"
                ) from error
        if not isinstance(prompt, str):
            raise ConfigError(
                f"{self._place}.apply_chat_template",
                f"is off but {name} is a list of chat messages",
                "turn it on, or name a text column as input_key",
            )
        if self._data.input_template is not None:
            return _fill(self._data.input_template, prompt, self._place)
        return prompt

    def _shorten(self, token_ids: list[int], name: str) -> list[int]:
        limit = self._max_prompt_tokens
        match self._data.overlong_prompts:
            case "truncate":
                return token_ids[-limit:]
            case "drop":
                raise OverlongPromptError(f"{name} has {len(token_ids)} tokens of {limit} allowed", "prompt_json")
            case _:
                raise ConfigError(
                    f"{self._place}.overlong_prompts",
                    f"{name} has {len(token_ids)} tokens but model.max_length leaves {limit} for a prompt",
                    f"raise model.max_length or set {self._place}.overlong_prompts to drop or truncate",
                )


def _parse(prompt_json: str, name: str) -> str | list[dict[str, Any]]:
    try:
        prompt = json.loads(prompt_json)
    except ValueError as error:
        raise InvalidArgumentError(f"{name} is not JSON ({error})", "prompt_json") from error
    is_chat = isinstance(prompt, list) and bool(prompt) and all(isinstance(message, dict) for message in prompt)
    if not isinstance(prompt, str) and not is_chat:
        raise InvalidArgumentError(
            f"{name} is {type(prompt).__name__}, neither a string nor a list of chat messages", "prompt_json"
        )
    return cast("str | list[dict[str, Any]]", prompt)


def _fill(template: str, prompt: str, place: str) -> str:
    try:
        return template.format(prompt)
    except (IndexError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{place}.input_template",
            f"{template!r} cannot be filled in ({type(error).__name__}: {error})",
            "write exactly one {} and double literal braces",
        ) from error


def load_tokenizer(model_path: Path, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer that lies in a Hugging Face model folder.

    Raises:
        ConfigError: there is no such folder, or no tokenizer in it that can be loaded.
    """
    if not model_path.is_dir():
        raise ConfigError("model.path", f"{str(model_path)!r} is not a folder", "name a Hugging Face model folder")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_path), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(
            "model.path",
            f"{str(model_path)!r} has no tokenizer that can be loaded ({first_line})",
            "save the model's tokenizer into the same folder",
        ) from error
    return cast(Tokenizer, tokenizer)
