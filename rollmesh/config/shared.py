"""The sections of a mesh file that no single service owns."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rollmesh.config.section import Section
from rollmesh.errors import ConfigError

MAX_INT = 2**31 - 1
"""The largest count: counts cross the wire as uint32 and reach libraries in C."""
PositiveInt = Annotated[int, Field(gt=0, le=MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INT)]
NumBytes = Annotated[int, Field(gt=0, le=2**53)]
NumSamples = Annotated[int, Field(gt=0, le=2**14)]
"""A number of samples, up to the most that a group may have on the wire."""
NumTokens = Annotated[int, Field(gt=0, le=2**20)]
"""A number of tokens, up to the most that a sample may have on the wire."""
PositiveFloat = Annotated[float, Field(gt=0)]

_ATTENTION = re.compile(r"auto|(paged\|)?(eager|sdpa|flex_attention|flash_attention_\d+)")


def _check_attention(name: str) -> str:
    """Return the name; raise ValueError unless transformers knows the name, or the name has the form ``owner/name``."""
    if "/" not in name and not _ATTENTION.fullmatch(name):
        raise ValueError("use auto, eager, sdpa, flex_attention or flash_attention_2")
    return name


Attention = Annotated[str, AfterValidator(_check_attention)]
"""The name of an attention implementation (transformers' attn_implementation), or "auto"."""


def _as_name(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class RunSection(Section):
    """The name, the seed and the folder of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80), BeforeValidator(_as_name)]
    """The name of the run. It names the run folder and is part of every key in Redis and of every log record. A whole
    number is a name as well."""
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")] | None = None
    """The id that tells this run from other runs of the same name: hexadecimal digits. With null, `rollmesh up` or a
    coordinator that is started by itself chooses a new id. The run folder's mesh.yaml has the id, where the processes
    of the run read it."""
    directory: Path = Path("runs")
    """The parent of the run folder; a relative path is relative to the working directory."""
    seed: NonNegativeInt = 1
    """The seed of the order of prompts, of the sampling and of the learner."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.directory / self.name


class ModelSection(Section):
    """The model of the policy. The reference policy has the same model, unless reference.model_path names another."""

    path: Path
    """A Hugging Face model folder with the configuration, the weights and the tokenizer."""
    max_length: NumTokens
    """The most tokens of a sample, prompt and response together."""
    trust_remote_code: bool = False
    """Run Python code that lies in the model folder. False refuses a model that brings such code."""


class DataSection(Section):
    """One dataset of prompts."""

    path: Path
    """A JSONL or Parquet file, or a folder written by `datasets.save_to_disk`."""
    split: str = "train"
    """The split to use, where the folder holds several splits."""
    input_key: str = "input"
    """The column with the prompt: text, or a list of chat messages."""
    label_key: str | None = None
    """The column that reward functions get as `labels`; with null they get empty strings."""
    datasource_key: str = "datasource"
    """The column with the name of a prompt's source; metrics are grouped by these names. Where the file has no such
    column, the name is "default"."""
    apply_chat_template: bool = False
    """Render the prompt with the tokenizer's chat template. False takes a prompt of text as it is, or puts it into
    `input_template`."""
    input_template: str | None = None
    """A Python format string with one {}, where the prompt goes. It is used where the chat template is off; null takes
    the prompt as it is."""
    shuffle: bool = True
    """Use the prompts of each epoch in a new order, which follows from run.seed. False keeps the order of the file."""
    max_samples: PositiveInt | None = None
    """The number of rows to use, from the first row on; null uses all rows."""
    overlong_prompts: Literal["error", "drop", "truncate"] = "error"
    """What happens to a prompt that leaves no room for max_new_tokens in model.max_length. error: the run does not
    start. drop: the prompt is left out. truncate: the prompt loses tokens from the left."""


class TrainingSection(Section):
    """The size of a batch, the number of steps, and the permitted staleness."""

    steps: PositiveInt
    """The number of steps of the run; each step trains on one batch. The run ends earlier if the epochs end before."""
    epochs: PositiveInt = 1
    """The most passes over the dataset. With algorithm.filter a step uses more prompts than it trains on."""
    prompts_per_step: PositiveInt
    """The number of groups in a batch (B); each group belongs to one prompt."""
    samples_per_prompt: NumSamples
    """The number of samples in a group (n)."""
    max_staleness: NonNegativeInt = 1
    """The number of versions that generation may run ahead of the learner (η). 0 is synchronous training. Above 0 the
    learner may pass over a slow group, whose samples are then up to one version older."""
    slots: PositiveInt | None = None
    """The most groups that may be open at the same time (A). null is the upper bound, (max_staleness + 1) ×
    prompts_per_step; the lower bound is prompts_per_step."""

    @property
    def num_slots(self) -> int:
        """The number of slots, with null replaced."""
        return self.slots or (self.max_staleness + 1) * self.prompts_per_step

    def shortfall(self, num_rows: int) -> str:
        """Return a sentence if a dataset of ``num_rows`` rows is used up before the last step, else an empty string.

        3,000 rows in one epoch are 94 steps of 32 prompts; the last step has only 24.
        """
        num_prompts, needed = num_rows * self.epochs, self.steps * self.prompts_per_step
        if num_prompts >= needed:
            return ""
        num_steps, num_epochs = math.ceil(num_prompts / self.prompts_per_step), math.ceil(needed / num_rows)
        return (
            f"training.steps {self.steps:,} of training.prompts_per_step {self.prompts_per_step:,} take {needed:,} "
            f"prompts, and training.epochs {self.epochs:,} of {num_rows:,} rows give {num_prompts:,}: the run ends "
            f"after {num_steps:,} steps; set training.epochs to {num_epochs:,}, or training.steps to {num_steps:,}"
        )

    @model_validator(mode="after")
    def _check_slots(self) -> TrainingSection:
        batch, most = self.prompts_per_step, (self.max_staleness + 1) * self.prompts_per_step
        if self.num_slots < batch:
            raise ConfigError(
                "training.slots",
                f"{self.slots} open groups can never fill a batch of training.prompts_per_step = {batch} (deadlock)",
                f"use {batch} to {most}",
            )
        if self.num_slots > most:
            raise ConfigError(
                "training.slots",
                f"{self.slots} breaks the staleness bound: slots ≤ (max_staleness + 1) × prompts_per_step = {most}",
                f"use {batch} to {most} or raise training.max_staleness",
            )
        return self


class SamplingSection(Section):
    """Settings of the sampling of training samples."""

    temperature: PositiveFloat = 1.0
    """The divisor of the logits; 1 samples from the model's own distribution. The learner and the reference compute
    log-probabilities at the same temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample only the likeliest tokens whose probabilities together reach this number. 1 keeps all tokens; below 1 the
    engine samples from another distribution than the learner computes."""
    top_k: NonNegativeInt = 0
    """Sample only this many of the likeliest tokens. 0 keeps all tokens; above 0 the engine samples from another
    distribution than the learner computes."""
    max_new_tokens: NumTokens
    """The most generated tokens of a sample."""
    is_seeded: bool = False
    """Give every sample a seed of its own, which follows from run.seed and the prompt. Sampling is then slower."""

    @property
    def is_whole(self) -> bool:
        """Whether no token is cut from the distribution that is sampled from."""
        return self.top_p == 1 and self.top_k == 0

    def check_room(self, model: ModelSection) -> None:
        """Raise ConfigError if the response leaves no room for a prompt."""
        if self.max_new_tokens >= model.max_length:
            raise ConfigError(
                "sampling.max_new_tokens",
                f"{self.max_new_tokens} leaves no room for a prompt in model.max_length {model.max_length}",
                "lower the one or raise the other",
            )


class EvaluationSection(Section):
    """Settings of the evaluation on held-out prompts. The serving policy samples them while training goes on."""

    data: DataSection
    """The held-out prompts."""
    every_steps: PositiveInt = 10
    """Evaluate the version whose step reaches or passes a multiple of this number. The first version and the last
    version are always evaluated."""
    samples_per_prompt: NumSamples = 1
    """The number of samples of each held-out prompt; the score of a prompt is their mean."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """The divisor of the logits. 0 is greedy: each token is the likeliest token."""
    max_new_tokens: NumTokens | None = None
    """The most generated tokens of a sample; null takes sampling.max_new_tokens."""
    should_pin_version: bool = True
    """Hold the next version back until the evaluation is complete, so that all its samples come from one version. The
    version is held back for coordinator.lease_ttl_s at most."""


class ReplaySection(Section):
    """Settings of Redis, which holds the ledger and the queue of groups."""

    url: str | None = None
    """The address of a Redis server, version 6.2 or newer: redis://, rediss:// or unix://. null starts a server in the
    run folder."""
    payload_limit_bytes: NumBytes = 512 * 1024 * 1024
    """The most bytes of one group in Redis; a larger group is refused. Redis itself takes 512 MiB at most."""
    timeout_s: PositiveFloat = 5.0
    """Seconds that one command of Redis may take."""
    memory_limit_bytes: Annotated[int, Field(ge=64 * 1024 * 1024, lt=2**63)] | None = None
    """The most bytes of memory that the server in the run folder may use. null is half of the memory of the machine or
    of its container. No group is opened while 85 % of this limit or more are in use; the same rule applies to the limit
    of a server that `url` names (`maxmemory`)."""
    outage_timeout_s: PositiveFloat = 30.0
    """Seconds that Redis may be out of reach. After that the run fails, and the error names Redis."""

    def require_url(self) -> str:
        """Return the address of Redis, for a service that cannot start a Redis.

        Raises:
            ConfigError: `replay.url` is not set.
        """
        if self.url is None:
            raise ConfigError("replay.url", "is not set", "start the mesh with `rollmesh up`, or name a Redis")
        return self.url


class WeightsSection(Section):
    """Settings of the broadcast that brings new weights from the learner to the engines."""

    bucket_bytes: NumBytes = 256 * 1024 * 1024
    """The most bytes of one broadcast. A tensor that is larger has a broadcast of its own."""
    floor_bandwidth_bytes_per_s: PositiveFloat = 20e6
    """The least bandwidth of a transfer, in bytes per second. A transfer is given up after transfer_timeout_s plus the
    time that its bytes take at this bandwidth."""
    prepare_timeout_s: PositiveFloat = 60.0
    """Seconds that a member may take to answer PREPARE, which includes joining the process group."""
    transfer_timeout_s: PositiveFloat = 30.0
    """The fixed part of a transfer's deadline, in seconds; floor_bandwidth_bytes_per_s gives the other part."""
    commit_timeout_s: PositiveFloat = 60.0
    """Seconds that an engine may take to load a version."""
    host: str = "127.0.0.1"
    """An address of the learner's machine that the engines can reach. The rendezvous store, Gloo and NCCL listen at
    this address and on no other interface. Use a private network: whoever reaches the address can interfere with the
    transfer."""
    store_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """The port of the rendezvous store; 0 takes a free port."""
