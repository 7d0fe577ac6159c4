"""What the policy sees of a dataset row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rollmesh.config import DataSection
from rollmesh.data.render import OverlongPromptError, PromptRenderer, UnusablePromptError, load_tokenizer
from rollmesh.errors import ConfigError, InvalidArgumentError


class CharacterTokenizer:
    """One token a character; its chat template writes ``<role>content``."""

    def __init__(self, chat_template: str | None = "yes") -> None:
        self.chat_template = chat_template

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return "".join(chr(token) for token in token_ids)

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        if conversation[0]["role"] == "assistant":
            raise RuntimeError("roles must alternate")
        return "".join(f"<{message['role']}>{message['content']}" for message in conversation) + "<assistant>"


def renderer(limit: int = 100, tokenizer: CharacterTokenizer | None = None, **settings: Any) -> PromptRenderer:
    return PromptRenderer(tokenizer or CharacterTokenizer(), DataSection(path=Path("x"), **settings), limit)


def test_a_plain_prompt_is_taken_as_it_is() -> None:
    rendered = renderer().render('"2 ? 3"')
    assert rendered.text == "2 ? 3"
    assert rendered.token_ids == [ord(c) for c in "2 ? 3"]


def test_the_input_template_is_filled_with_the_prompt() -> None:
    assert renderer(input_template="Q: {}\nA:").render('"why"').text == "Q: why\nA:"


def test_a_string_becomes_one_user_message_of_the_chat_template() -> None:
    assert renderer(apply_chat_template=True).render('"hi"').text == "<user>hi<assistant>"


def test_a_list_of_messages_goes_to_the_chat_template_as_it_is() -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    rendered = renderer(apply_chat_template=True).render(json.dumps(messages))
    assert rendered.text == "<system>be brief<user>hi<assistant>"


def test_the_chat_template_has_precedence_over_the_input_template() -> None:
    assert renderer(apply_chat_template=True, input_template="Q {}").render('"hi"').text == "<user>hi<assistant>"


def test_a_prompt_that_exactly_fits_is_whole() -> None:
    assert len(renderer(limit=5).render('"12345"').token_ids) == 5


def test_truncation_keeps_the_end_of_the_prompt_and_the_whole_text() -> None:
    rendered = renderer(limit=3, overlong_prompts="truncate").render('"abcdef"')
    assert rendered.token_ids == [ord(c) for c in "def"]
    assert rendered.text == "abcdef"


def test_an_overlong_prompt_is_an_error_naming_prompt_count_limit_and_fix() -> None:
    with pytest.raises(UnusablePromptError) as caught:
        renderer(limit=3).render('"abcdef"', "train:0:17")
    assert not isinstance(caught.value, OverlongPromptError)
    for part in ("train:0:17", "6 tokens", "leaves 3", "drop or truncate"):
        assert part in str(caught.value)


def test_an_overlong_prompt_to_be_dropped_has_an_error_of_its_own() -> None:
    with pytest.raises(OverlongPromptError, match="has 6 tokens, but"):
        renderer(limit=3, overlong_prompts="drop").render('"abcdef"')


def test_messages_without_a_chat_template_name_the_setting() -> None:
    with pytest.raises(UnusablePromptError, match=r"eval:0:1 is a list .*; turn data\.apply_chat_template on"):
        renderer().render('[{"role": "user", "content": "hi"}]', "eval:0:1")


def test_a_tokenizer_without_chat_template_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        renderer(tokenizer=CharacterTokenizer(chat_template=None), apply_chat_template=True)


@pytest.mark.parametrize("template", ["{} and {}", "{name}", "{", "{0.a}", "no field", "{:d}"])
def test_a_template_that_cannot_be_filled_is_refused_at_once(template: str) -> None:
    with pytest.raises(ConfigError, match="input_template"):
        renderer(input_template=template)


@pytest.mark.parametrize("cell", ["3", "null", "[]", '["text"]', "{}", "not json"])
def test_a_cell_that_is_no_prompt_is_invalid(cell: str) -> None:
    with pytest.raises(InvalidArgumentError):
        renderer(apply_chat_template=True).render(cell)


def test_a_prompt_without_tokens_is_invalid() -> None:
    with pytest.raises(InvalidArgumentError, match="no tokens"):
        renderer().render('""')


def test_what_the_chat_template_raises_is_told_with_the_prompt() -> None:
    with pytest.raises(InvalidArgumentError, match=r"prompt train:0:3 is refused .*roles must alternate"):
        renderer(apply_chat_template=True).render('[{"role": "assistant", "content": "x"}]', "train:0:3")


def test_a_missing_model_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: .* is not a folder"):
        load_tokenizer(tmp_path / "none")


def test_a_folder_without_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer that can be loaded"):
        load_tokenizer(tmp_path)
