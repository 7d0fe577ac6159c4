"""Prompts are rendered before a run as transformers renders them in the workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from rollmesh.config import DataSection, ModelSection
from rollmesh.data.datasets import open_dataset
from rollmesh.data.measure import MeasureCall, Measured, measure, measure_datasets
from rollmesh.data.render import load_tokenizer
from rollmesh.errors import ConfigError

ROWS = [{"input": "one two"}, {"input": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}]
CONTENT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    words = {word: index for index, word in enumerate(["<unk>", "one", "two", "<s>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def call_for(tmp_path: Path, *rows: Any, length: int = 20, vocab_size: int | None = 4, **data: Any) -> MeasureCall:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"apply_chat_template": True, **data}
    return MeasureCall(
        place="data",
        data=DataSection(path=path, **data),
        model=ModelSection(path=tmp_path / "model", max_length=length),
        max_new_tokens=4,
        vocab_size=vocab_size,
        budget_s=60.0,
    )


def measured(call: MeasureCall) -> Measured:
    return measure(open_dataset(call.data, "train"), call, load_tokenizer(call.model.path))


def fault(call: MeasureCall) -> str:
    with pytest.raises(ConfigError) as caught:
        measured(call)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TEMPLATES = [
    CONTENT,
    "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}",
    "{% for m in messages %}{{ loop.index }}{% if m.role == 'user' %}{% continue %}{% endif %}{% endfor %}",
    "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ messages | map(attribute='content') | join('\\n') }}{% if add_generation_prompt %} two{% endif %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }} one",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("settings", [{}, {"bos_token": "<s>"}])
def test_prompts_are_rendered_as_transformers_does(
    tmp_path: Path, model: Path, template: str, settings: dict[str, Any]
) -> None:
    (model / "chat_template.jinja").write_text(template)
    (model / "special_tokens_map.json").write_text(json.dumps(settings))
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(model))
    for row in ROWS:
        messages = [{"role": "user", "content": row["input"]}] if isinstance(row["input"], str) else row["input"]
        call = call_for(tmp_path, row, vocab_size=None, length=200)
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert measured(call).first_text == expected


def test_special_tokens_may_have_a_file_of_their_own(tmp_path: Path, model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ bos_token + ' ' }}" + CONTENT)
    (model / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    call = call_for(tmp_path, *ROWS)
    [found] = measure_datasets([open_dataset(call.data, "train")], [call]) or []
    assert found == measured(call)
    assert (found.first_text, found.longest, found.num_measured) == ("<s> one two ", 3, 2)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "(TemplateError: roles must alternate); correct the row"),
        ("{{ 1 / 0 }}", "line 1: is refused by the chat template (ZeroDivisionError: division by zero)"),
        ("{{ messages[5]['content'] + 'x' }}", "line 1: is refused by the chat template (UndefinedError: "),
        ("{{ 'x' + 1 }}", "line 1: is refused by the chat template (TypeError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "is refused by the chat template (RecursionError: "),
        ("{{ ''.__class__.__mro__ }}", "is refused by the chat template (SecurityError: "),
        ("{{ ' ' }}", "line 1: renders to no tokens; take the row out"),
        ("{% for %}", "model.path: has a chat template that is not valid ("),
        ("{{ 'one ' * 17 }}", "line 1: has 17 tokens, but model.max_length less the new tokens leaves 16 for a prompt"),
    ],
)
def test_whatever_a_template_raises_is_one_sentence(tmp_path: Path, model: Path, template: str, problem: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    assert problem in fault(call_for(tmp_path, *ROWS))


def test_a_fault_comes_whole_out_of_the_process_that_renders(tmp_path: Path, model: Path) -> None:
    call = call_for(tmp_path, *ROWS)
    with pytest.raises(ConfigError) as caught:
        measure_datasets([open_dataset(call.data, "train")], [call])
    assert caught.value.place == "data.apply_chat_template"
    assert str(caught.value) == fault(call)


def test_prompts_that_are_left_out_are_counted_and_the_first_that_stays_is_named(tmp_path: Path, model: Path) -> None:
    rows = [{"input": "one " * 9}, {"input": "two"}, {"input": "one " * 8}, {"input": "one one"}]
    call = call_for(tmp_path, *rows, length=6, apply_chat_template=False, overlong_prompts="drop")
    found = measured(call)
    assert (found.first_index, found.first_text, found.num_dropped, found.longest) == (1, "two", 2, 2)
    none = call_for(tmp_path, rows[0], length=6, apply_chat_template=False, overlong_prompts="drop")
    assert "data.overlong_prompts: each of the first 1 prompts of" in fault(none)


def test_plain_text_takes_no_process(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollmesh.data.measure._measure_elsewhere", None)
    call = call_for(tmp_path, ROWS[0], apply_chat_template=False)
    assert measure_datasets([open_dataset(call.data, "train")], [call]) == [measured(call)]
