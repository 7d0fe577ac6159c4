"""The rendering of a dataset row's prompt into the text and the tokens that the policy sees.

::

    prompt_json ── str, chat template on ──► [{"role": "user", "content": str}] ─┐
                ── list of messages, chat template on ──────────────────────────┴─► chat template ─► text ─► token ids
                ── str, template off ──► input_template.format(str), or as it is ────────────────────►

The tokenizer adds no special tokens to the text: the template writes all tokens that the model should see in front of a
prompt.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from rollmesh.config import DataSection
from rollmesh.data.rows import first_line, kind_of
from rollmesh.errors import ConfigError, InvalidArgumentError


class Tokenizer(Protocol):
    """The methods of a Hugging Face tokenizer that rendering and decoding need."""

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
    """A prompt as text and as token ids.

    Attributes:
        text: the whole text.
        token_ids: the ids of the P tokens of the text, P at least 1; an overlong prompt may lack tokens on the left.
    """

    text: str
    token_ids: list[int]


class UnusablePromptError(InvalidArgumentError):
    """A prompt cannot be rendered, however often it is tried.

    Args:
        name: the name of the prompt; it begins the sentence that ``problem`` ends.
        problem: the reason.
        fix: the remedy, as an imperative.
    """

    def __init__(self, name: str, problem: str, fix: str) -> None:
        super().__init__(f"{name} {problem}; {fix}", "prompt_json")
        self.problem = problem
        self.fix = fix


class OverlongPromptError(UnusablePromptError):
    """A prompt leaves no room for the response, and the configuration says to leave such prompts out."""


class PromptRenderer:
    """The renderer and tokeniser of the prompts of one data section.

    Args:
        tokenizer: the policy's tokenizer.
        data: the settings of rendering, and of prompts that are too long.
        max_prompt_tokens: the number of tokens that the model's length leaves for a prompt.
        place: the dotted path of ``data`` in the configuration, for messages.

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
            _check_template(data.input_template, f"{place}.input_template")

    def render(self, prompt_json: str, prompt_id: str = "") -> RenderedPrompt:
        """Return one prompt as text and token ids.

        Args:
            prompt_json: the row's cell as JSON: a string, or a list of chat messages.
            prompt_id: the name of the prompt in messages; if it is empty, the prompt's first 40 characters.

        Raises:
            OverlongPromptError: the prompt is too long, and ``overlong_prompts`` is "drop".
            UnusablePromptError: the prompt cannot be rendered for another reason.
            ConfigError: the model's chat template is not valid.
        """
        name = f"prompt {prompt_id or prompt_json[:40]}"
        text = self._text(_parse(prompt_json, name), name)
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        if not token_ids:
            raise UnusablePromptError(name, "renders to no tokens", "take the row out")
        if len(token_ids) > self._max_prompt_tokens:
            token_ids = self._shorten(token_ids, name)
        return RenderedPrompt(text, token_ids)

    def _text(self, prompt: str | list[dict[str, Any]], name: str) -> str:
        if self._data.apply_chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            try:
                return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            # The template is the code of the model's author, and may raise anything.
            except Exception as error:
                if type(error).__name__ == "TemplateSyntaxError":
                    problem = f"has a chat template that is not valid ({first_line(error)})"
                    raise ConfigError("model.path", problem, "correct the template") from error
                problem = f"is refused by the chat template ({type(error).__name__}: {first_line(error)})"
                raise UnusablePromptError(name, problem, "correct the row, or the template") from error
        if not isinstance(prompt, str):
            fix = f"turn {self._place}.apply_chat_template on, or name a text column as {self._place}.input_key"
            raise UnusablePromptError(name, "is a list of chat messages, and no chat template is applied", fix)
        return prompt if self._data.input_template is None else self._data.input_template.format(prompt)

    def _shorten(self, token_ids: list[int], name: str) -> list[int]:
        limit, policy = self._max_prompt_tokens, self._data.overlong_prompts
        if policy == "truncate":
            return token_ids[-limit:]
        problem = f"has {len(token_ids)} tokens, but model.max_length less the new tokens leaves {limit} for a prompt"
        if policy == "drop":
            raise OverlongPromptError(name, problem, "it is left out")
        fix = f"raise model.max_length, or set {self._place}.overlong_prompts to drop or truncate"
        raise UnusablePromptError(name, problem, fix)


def _parse(prompt_json: str, name: str) -> str | list[dict[str, Any]]:
    try:
        prompt = json.loads(prompt_json)
    except ValueError as error:
        raise UnusablePromptError(name, f"is not JSON ({error})", "correct the row") from error
    is_chat = isinstance(prompt, list) and bool(prompt) and all(isinstance(message, dict) for message in prompt)
    if not isinstance(prompt, str) and not is_chat:
        problem = f"is {kind_of(prompt)}, neither text nor a list of chat messages"
        raise UnusablePromptError(name, problem, "correct the row")
    return cast("str | list[dict[str, Any]]", prompt)


def _check_template(template: str, place: str) -> None:
    """Raise ConfigError unless ``template`` is a format string with one plain field."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        if fields in ([""], ["0"]):
            template.format("")
    except (IndexError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(place, f"{template!r} is no format string ({error})", "double literal braces") from error
    if fields not in ([""], ["0"]):
        raise ConfigError(
            place, f"{template!r} has {len(fields)} fields", "write exactly one {} and double other braces"
        )


def load_tokenizer(model_path: Path, trust_remote_code: bool = False) -> Tokenizer:
    """Return the tokenizer in a Hugging Face model folder.

    Raises:
        ConfigError: there is no such folder, or the folder has no tokenizer that can be loaded.
    """
    if not model_path.is_dir():
        raise ConfigError("model.path", f"{str(model_path)!r} is not a folder", "name a Hugging Face model folder")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_path), trust_remote_code=trust_remote_code, local_files_only=True
        )
    # A damaged file makes the libraries raise anything, and a tokenizer may have Python code of its own.
    except Exception as error:
        raise ConfigError(
            "model.path",
            f"{str(model_path)!r} has no tokenizer that can be loaded ({first_line(error)})",
            "save the model's tokenizer into the same folder",
        ) from error
    return cast(Tokenizer, tokenizer)
