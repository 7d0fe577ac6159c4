"""What cannot work is refused before anything is started."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import yaml

from rollmesh.errors import ConfigError
from rollmesh.replay.connection import connect_blocking
from rollmesh.replay.embedded import EmbeddedRedis
from rollmesh.replay.keys import Keys
from services.config import MeshConfig, load_mesh
from services.launcher import prompt_check
from services.launcher.address_check import reserve_any
from services.launcher.device_check import cuda_obstacle
from services.launcher.main import assign_ports, check_folder, claim_folder, free_name, prepare_folder
from services.launcher.preflight import check

Tree = dict[str, object]


def _load(tree: Tree, tmp_path: Path, *overrides: str) -> MeshConfig:
    path = tmp_path / "mesh.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_mesh(path, overrides)


def _fault(config: MeshConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        list(check(config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _change_model(tmp_path: Path, **settings: object) -> None:
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_mesh_that_can_work_passes(tree: Tree, tmp_path: Path) -> None:
    findings = {finding.what: finding.result for finding in check(_load(tree, tmp_path))}
    assert list(findings) == ["model", "algorithm", "data", "replay", "reward"]
    assert findings["algorithm"] == "group_norm · ppo loss, token mean · ratio against the behaviour policy"
    assert findings["data"] == "1 prompts, the longest 2 tokens"
    assert findings["reward"] == "reward_func found, and answers"


def test_the_reward_function_is_tried_on_the_first_prompt_as_the_model_will_see_it(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def reward_func(q, p, labels):\n    raise ValueError((q, p, labels))\n")
    fault = _fault(_load(tree, tmp_path, "data.input_template='user {}'"))
    assert f"gives no reward for {tmp_path / 'train.jsonl'}, line 1 with an empty answer" in fault
    assert "(['user one two'], ['user one two'], [3])" in fault
    unprobed = _load(tree, tmp_path, "data.input_template='user {}'", "reward.should_probe=false")
    assert [finding.result for finding in check(unprobed)][-1] == "reward_func found"


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("model.path=nowhere", "model.path: nowhere does not exist; name a Hugging Face model folder"),
        ("model.max_length=17", "model.max_length: 17 is more than the 16 positions of the model"),
        ("data.path=nowhere.jsonl", "data.path"),
        ("data.input_key=question", "question"),
        ("data.label_key=answer", "answer"),
        ("reward.function=nowhere.py", "reward.function"),
        ("data.input_template='no field'", "data.input_template: 'no field' has 0 fields; write exactly one {}"),
        ("coordinator.address=here", "coordinator.address: 'here' is not an address"),
        ("learner.address=192.0.2.1:0", "learner.address: 192.0.2.1 is not an address of this machine"),
        ("weights.host=192.0.2.1", "weights.host: 192.0.2.1 is not an address of this machine"),
        ("rollout={num_workers: 2, address: '127.0.0.1:45671'}", "rollout.address: 127.0.0.1:45671 is one port"),
        ("learner.deepspeed.foo=1", "learner.deepspeed.foo: is not a key of DeepSpeed's configuration"),
        ("rollout.engine.extra.model=other", "rollout.engine.extra.model: is set by the mesh itself; remove it"),
        ("replay.url=redis://127.0.0.1:1/0", "replay.url"),
        ("reward={address: '127.0.0.1:1'}", "reward.address: no server answers at 127.0.0.1:1"),
        ("model.max_length=5", "line 1: has 2 tokens, but model.max_length less the new tokens leaves 1"),
    ],
)
def test_a_fault_is_found_and_placed(tree: Tree, tmp_path: Path, override: str, fault: str) -> None:
    assert fault in _fault(_load(tree, tmp_path, override))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, "holds a BertForSequenceClassification; name"),
        ({"architectures": None}, "names no architecture in config.json"),
        ({"model_type": "qwen99"}, "of model_type 'qwen99', which transformers"),
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "set model.trust_remote_code to true if you trust it"),
        ({"hidden_size": 3}, "model.embed_tokens.weight is 4 × 2, but vocab_size × hidden_size is 4 × 3"),
        ({"num_hidden_layers": 3}, "2 layers, but num_hidden_layers is 3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights (config.json: quantization_config"),
    ],
)
def test_a_config_json_that_cannot_be_right_is_refused(
    tree: Tree, tmp_path: Path, settings: dict[str, object], fault: str
) -> None:
    _change_model(tmp_path, **settings)
    message = _fault(_load(tree, tmp_path))
    assert message.startswith("model.path: ")
    assert fault in message


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("model.safetensors", b"", "model.safetensors is empty"),
        ("model.safetensors", b"\xff" * 100, "model.safetensors is damaged"),
        ("model.safetensors", None, "has no weights"),
        ("config.json", b"{", "is not JSON"),
        ("config.json", b"[]", "is not a JSON object"),
        ("config.json", None, "has no config.json"),
        ("tokenizer.json", None, "has no tokenizer"),
        ("tokenizer.json", b"{}", "tokenizer.json cannot be used"),
    ],
)
def test_a_damaged_model_folder_is_refused(
    tree: Tree, tmp_path: Path, file: str, content: bytes | None, fault: str
) -> None:
    path = tmp_path / "model" / file
    path.unlink() if content is None else path.write_bytes(content)
    message = _fault(_load(tree, tmp_path))
    assert message.startswith("model.path: ")
    assert fault in message


def test_weights_that_were_cut_off_are_refused(tree: Tree, tmp_path: Path) -> None:
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert "model.safetensors is damaged" in _fault(_load(tree, tmp_path))


def test_the_names_that_gpt2_gives_its_sizes_are_known(tree: Tree, tmp_path: Path) -> None:
    _change_model(tmp_path, max_position_embeddings=None, n_positions=6)
    assert "model.max_length: 8 is more than the 6 positions of the model" in _fault(_load(tree, tmp_path))
    _change_model(tmp_path, n_positions=16, num_hidden_layers=None, n_layer=3)
    assert "2 layers, but num_hidden_layers is 3" in _fault(_load(tree, tmp_path))


def test_scaled_positions_are_left_to_the_engine(tree: Tree, tmp_path: Path) -> None:
    _change_model(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert list(check(_load(tree, tmp_path, "model.max_length=64")))


def test_a_tokenizer_of_another_model_is_refused(tree: Tree, tmp_path: Path) -> None:
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"two":2', '"two":9').replace('"two": 2', '"two": 9'))
    assert "has token 9, but the model's vocab_size is 4" in _fault(_load(tree, tmp_path))


def test_an_empty_dataset_is_refused(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    assert "data.path" in _fault(_load(tree, tmp_path))


def test_overlong_prompts_may_be_dropped_instead(tree: Tree, tmp_path: Path) -> None:
    config = _load(tree, tmp_path, "model.max_length=5", "data.overlong_prompts=truncate")
    assert list(check(config))


def test_the_row_of_an_overlong_prompt_is_named(tree: Tree, tmp_path: Path) -> None:
    rows = [{"input": "one", "label": 0}] * 300 + [{"input": "one " * 5, "label": 0}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "train.jsonl, line 301: has 5 tokens" in _fault(_load(tree, tmp_path))


def test_measuring_prompts_is_bounded_and_says_how_far_it_went(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_check, "BUDGET_S", 0.0)
    rows = [{"input": "one", "label": 0}] * 1000
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = [finding.result for finding in check(_load(tree, tmp_path)) if finding.what == "data"]
    assert results == ["1,000 prompts, the longest of the first 1 1 tokens"]


def test_a_chat_template_is_tried_on_the_prompts(tree: Tree, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} one one one {% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    fault = _fault(_load(tree, tmp_path, "data.apply_chat_template=true"))
    assert "train.jsonl, line 1: has 6 tokens, but model.max_length less the new tokens leaves 4 for a prompt" in fault


def test_chat_messages_need_the_chat_template(tree: Tree, tmp_path: Path) -> None:
    row = {"input": [{"role": "user", "content": "one"}], "label": 0}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    assert "line 1: is a list of chat messages, and no chat template" in _fault(_load(tree, tmp_path))


def test_more_steps_than_the_prompts_are_enough_for_are_warned_of(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"input": "one", "label": 0}) + "\n")
    overrides = ["training.steps=1000000", "training.prompts_per_step=2"]
    warnings = [finding.warning for finding in check(_load(tree, tmp_path, *overrides)) if finding.warning]
    assert warnings == [
        "training.steps 1,000,000 of training.prompts_per_step 2 take 2,000,000 prompts, and training.epochs 1 of 1 "
        "rows give 1: the run ends after 1 steps; set training.epochs to 2,000,000, or training.steps to 1"
    ]
    enough = _load(tree, tmp_path, *overrides, "training.epochs=2000000")
    assert not any(finding.warning for finding in check(enough))


def test_a_reference_that_lacks_tokens_is_refused(tree: Tree, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    for file in (tmp_path / "model").iterdir():
        (reference / file.name).write_bytes(file.read_bytes())
    _change_model(tmp_path, vocab_size=5, hidden_size=None)
    config = _load(tree, tmp_path, "algorithm.kl.coef=0.1", f"reference.model_path={reference}")
    assert "reference.model_path: knows 4 tokens, but the policy samples from 5" in _fault(config)


def test_cuda_is_refused_where_there_is_none(tree: Tree, tmp_path: Path) -> None:
    obstacle = cuda_obstacle()
    if obstacle is None:
        pytest.skip("this machine may have a CUDA device")
    assert _fault(_load(tree, tmp_path, "learner.device=cuda")).startswith("learner.device: is 'cuda', but ")


def test_an_unknown_engine_argument_is_found_without_importing_vllm(tree: Tree, tmp_path: Path) -> None:
    pytest.importorskip("vllm", exc_type=ImportError)
    fault = _fault(_load(tree, tmp_path, "rollout.engine.extra.block_sise=16"))
    assert fault == (
        "rollout.engine.extra.block_sise: is not an argument of vLLM's AsyncEngineArgs; did you mean 'block_size'?"
    )


def test_a_port_in_use_is_named(tree: Tree, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for place in ("coordinator.address", "rollout.address", "reward.address", "learner.address"):
            fault = _fault(_load(tree, tmp_path, f"{place}=127.0.0.1:{port}"))
            assert fault.startswith(f"{place}: 127.0.0.1:{port} is in use by another process")
        fault = _fault(_load(tree, tmp_path, f"weights.store_port={port}"))
        assert fault.startswith(f"weights.store_port: 127.0.0.1:{port} is in use")


def test_two_services_cannot_share_an_address(tree: Tree, tmp_path: Path) -> None:
    overrides = ["coordinator.address=127.0.0.1:45671", "reward.address=127.0.0.1:45671"]
    assert "is also coordinator.address" in _fault(_load(tree, tmp_path, *overrides))


def test_servers_that_must_be_found_get_ports(tree: Tree, tmp_path: Path) -> None:
    config = assign_ports(_load(tree, tmp_path))
    ports = {int(address.rpartition(":")[2]) for address in (config.coordinator.address, config.reward.address)}
    assert len(ports) == 2
    assert 0 not in ports
    assert config.learner.address.endswith(":0")


def test_an_earlier_run_is_replaced_only_on_request(tree: Tree, tmp_path: Path) -> None:
    config = _load(tree, tmp_path)
    folder = prepare_folder(config, should_overwrite=False)
    (folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="--overwrite"):
        check_folder(config.run.folder, should_overwrite=False)
    assert (folder / "metrics.jsonl").exists()
    prepare_folder(config, should_overwrite=True)
    assert not (folder / "metrics.jsonl").exists()


def test_what_is_no_run_folder_is_never_deleted(tree: Tree, tmp_path: Path) -> None:
    config = _load(tree, tmp_path)
    precious = config.run.folder / "precious"
    precious.parent.mkdir(parents=True)
    precious.write_text("keep me")
    with pytest.raises(ConfigError, match="is not a run folder"):
        prepare_folder(config, should_overwrite=True)
    assert precious.read_text() == "keep me"


def test_a_run_that_goes_on_is_never_replaced(tree: Tree, tmp_path: Path) -> None:
    config = _load(tree, tmp_path)
    folder = prepare_folder(config, should_overwrite=False)
    with claim_folder(folder), pytest.raises(ConfigError, match="belongs to a run that still goes on"):
        prepare_folder(config, should_overwrite=True)
    prepare_folder(config, should_overwrite=True)


def test_a_file_in_place_of_the_run_folder_is_named(tree: Tree, tmp_path: Path) -> None:
    config = _load(tree, tmp_path)
    config.run.folder.parent.mkdir()
    config.run.folder.write_text("keep me")
    with pytest.raises(ConfigError, match="is not a run folder"):
        prepare_folder(config, should_overwrite=True)


def test_a_run_folder_that_cannot_be_made_is_named(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = _load(tree, tmp_path, f"run.directory={tmp_path / 'file'}")
    with pytest.raises(ConfigError, match=r"run\.directory: .*cannot be used for the run folder"):
        prepare_folder(config, should_overwrite=False)


def test_a_port_that_is_chosen_is_none_that_a_connection_may_get() -> None:
    with reserve_any("reward.address", "127.0.0.1") as first, reserve_any("reward.address", "127.0.0.1") as second:
        ports = {first.getsockname()[1], second.getsockname()[1]}
    assert len(ports) == 2
    assert max(ports) < 32768


def test_keys_of_an_earlier_run_of_the_name_are_refused_and_cleared_on_request(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with EmbeddedRedis.start(tmp_path / "redis") as server:
        config = _load(tree, tmp_path, f"replay.url={server.url}")
        free_name(config.run.name, config.replay, should_overwrite=False)
        client = connect_blocking(server.url, 5.0)
        client.hset(Keys("tiny").meta, "opened", "3")
        with pytest.raises(ConfigError, match=r"run\.name: Redis holds keys rollmesh:\{tiny\}:\* .*--overwrite"):
            free_name(config.run.name, config.replay, should_overwrite=False)
        free_name(config.run.name, config.replay, should_overwrite=True)
        assert not client.keys()
        client.close()
    assert "the keys of an earlier run 'tiny' were cleared" in capsys.readouterr().out
