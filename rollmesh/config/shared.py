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
"""Numbers of things cross the wire as uint32 and reach libraries in C."""
PositiveInt = Annotated[int, Field(gt=0, le=MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INT)]
NumBytes = Annotated[int, Field(gt=0, le=2**53)]
NumSamples = Annotated[int, Field(gt=0, le=2**14)]
"""As many as a group may have on the wire."""
NumTokens = Annotated[int, Field(gt=0, le=2**20)]
"""As many as a sample may have on the wire."""
PositiveFloat = Annotated[float, Field(gt=0)]

_ATTENTION = re.compile(r"auto|(paged\|)?(eager|sdpa|flex_attention|flash_attention_\d+)")


def _check_attention(name: str) -> str:
    """Implementations have a few names in transformers, and ``owner/name`` where they come from elsewhere."""
    if "/" not in name and not _ATTENTION.fullmatch(name):
        raise ValueError("use auto, eager, sdpa, flex_attention or flash_attention_2")
    return name


Attention = Annotated[str, AfterValidator(_check_attention)]
"""transformers' attn_implementation, or "auto"."""


def _as_name(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class RunSection(Section):
    """Who this run is and where it leaves its files."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80), BeforeValidator(_as_name)]
    """Names the run folder and the prefix of every key, metric and log line. A whole number is a name as well."""
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")] | None = None
    """Tells this run from others of its name. `rollmesh up` and a coordinator that is started by itself choose a new
    one; it stands in the run folder's mesh.yaml, for the processes of the run."""
    directory: Path = Path("runs")
    """Parent of the run folder; relative to the working directory."""
    seed: NonNegativeInt = 1
    """Seeds data order, sampling and the learner."""

    @property
    def folder(self) -> Path:
        return self.directory / self.name


class ModelSection(Section):
    """The policy that is trained, and the frozen reference unless that names its own."""

    path: Path
    """A Hugging Face model folder: configuration, weights and tokenizer."""
    max_length: NumTokens
    """Prompt and response together, in tokens."""
    trust_remote_code: bool = False
    """Run Python code that lies in the model folder."""


class DataSection(Section):
    """The prompts to train on."""

    path: Path
    """A JSONL or Parquet file, or a folder written by `datasets.save_to_disk`."""
    split: str = "train"
    """Which split, where the folder holds several."""
    input_key: str = "input"
    """The column with the prompt: text, or a list of chat messages."""
    label_key: str | None = None
    """The column that reward functions get as `labels`; none gives them empty strings."""
    datasource_key: str = "datasource"
    """The optional column with the name that metrics are grouped by; "default" where it is absent."""
    apply_chat_template: bool = False
    """Render the prompt with the tokenizer's chat template."""
    input_template: str | None = None
    """A Python format string with one {}, used where the chat template is off."""
    shuffle: bool = True
    """A new order for each epoch, derived from run.seed; off keeps the file's."""
    max_samples: PositiveInt | None = None
    """Use only the first rows of the file."""
    overlong_prompts: Literal["error", "drop", "truncate"] = "error"
    """What to do with prompts that leave no room for sampling.max_new_tokens: refuse to start, leave them out, or cut
    them from the left."""


class TrainingSection(Section):
    """How much to train, and how far the mesh may run ahead of the learner."""

    steps: PositiveInt
    """Optimiser batches in the run; fewer if the epochs end before."""
    epochs: PositiveInt = 1
    """Passes over the dataset that the run may use. With algorithm.filter a step uses up more than it trains."""
    prompts_per_step: PositiveInt
    """Groups in an optimiser batch (B)."""
    samples_per_prompt: NumSamples
    """Samples in a group (n)."""
    max_staleness: NonNegativeInt = 1
    """How many versions behind the learner a group may be when it is leased (η). 0 is synchronous training."""
    slots: PositiveInt | None = None
    """Groups that may be open at the same time (A). Default: (max_staleness + 1) × prompts_per_step."""

    @property
    def num_slots(self) -> int:
        return self.slots or (self.max_staleness + 1) * self.prompts_per_step

    def shortfall(self, num_rows: int) -> str:
        """One sentence if a dataset of ``num_rows`` rows is used up before the last step; else empty.

        3,000 rows in one epoch are 94 steps of 32 prompts, the last one smaller.
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
    """How training samples are drawn. Learner and reference use the same temperature."""

    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0
    """0 is off."""
    max_new_tokens: NumTokens
    """Generated tokens of a sample at most."""
    is_seeded: bool = False
    """Give every sample its own seed, derived from run.seed and its prompt; slower."""

    @property
    def is_whole(self) -> bool:
        """Whether no token is cut from the distribution that is sampled from."""
        return self.top_p == 1 and self.top_k == 0

    def check_room(self, model: ModelSection) -> None:
        """Raises ConfigError if the response leaves no room for a prompt."""
        if self.max_new_tokens >= model.max_length:
            raise ConfigError(
                "sampling.max_new_tokens",
                f"{self.max_new_tokens} leaves no room for a prompt in model.max_length {model.max_length}",
                "lower the one or raise the other",
            )


class EvaluationSection(Section):
    """Held-out prompts, sampled by the serving policy while training goes on."""

    data: DataSection
    every_steps: PositiveInt = 10
    """Evaluate whenever a version with a multiple of this number is committed; the first and the last always are."""
    samples_per_prompt: NumSamples = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy."""
    max_new_tokens: NumTokens | None = None
    """Defaults to sampling.max_new_tokens."""
    should_pin_version: bool = True
    """Hold the next version back until the evaluation is complete, so that its number belongs to one policy."""


class ReplaySection(Section):
    """The ledger and queue in Redis."""

    url: str | None = None
    """redis://, rediss:// or unix:// address of a Redis 6.2 or newer; none starts a server in the run folder."""
    payload_limit_bytes: NumBytes = 512 * 1024 * 1024
    """Groups larger than this are refused (Redis itself ends at 512 MiB)."""
    timeout_s: PositiveFloat = 5.0
    """How long one command may take."""
    memory_limit_bytes: Annotated[int, Field(ge=64 * 1024 * 1024, lt=2**63)] | None = None
    """Memory that the server in the run folder may use; none is half of this machine's. No group is opened while 85 %
    of it are in use. A server that `url` names has its own `maxmemory`, which is looked at in the same way."""
    outage_timeout_s: PositiveFloat = 30.0
    """The run fails, saying so, after Redis could not be reached for so long."""


class WeightsSection(Section):
    """How new weights reach the engines."""

    bucket_bytes: NumBytes = 256 * 1024 * 1024
    """Size of a broadcast; a larger tensor has a bucket of its own."""
    floor_bandwidth_bytes_per_s: PositiveFloat = 20e6
    """A transfer that is slower is given up."""
    prepare_timeout_s: PositiveFloat = 60.0
    """How long members may take to answer PREPARE, including joining the process group."""
    transfer_timeout_s: PositiveFloat = 30.0
    """Fixed part of a transfer's deadline; the rest is bytes over floor bandwidth."""
    commit_timeout_s: PositiveFloat = 60.0
    """How long an engine may take to load a version."""
    host: str = "127.0.0.1"
    """Address of the learner's machine that the engines can reach. The rendezvous store, Gloo and NCCL listen there and
    on no other interface; whoever can reach it can interfere with the transfer, so let it be a private network."""
    store_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the rendezvous store; 0 takes a free one."""
