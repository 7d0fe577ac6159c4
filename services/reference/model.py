"""The frozen policy: a Hugging Face causal language model that answers with log-probabilities of given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from rollmesh.errors import ConfigError, UnavailableError
from rollmesh.models.loading import ModelSource, describe, load_causal_lm
from rollmesh.models.logprobs import target_logprobs
from rollmesh.models.wanted import WantedLogits
from rollmesh.types import Float32Array, Int32Array


@dataclass(frozen=True, slots=True)
class LogProbJob:
    """A prompt and its response.

    Attributes:
        token_ids: int32 [P + R].
        num_prompt_tokens: P, at least 1.
        temperature: divides the logits; greater than 0.
    """

    token_ids: Int32Array
    num_prompt_tokens: int
    temperature: float

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_response_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens


class FrozenPolicy:
    """A model in evaluation mode on one device. `compute_logprobs` blocks; call it from one thread at a time."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._logits = WantedLogits(model)

    @classmethod
    def load(cls, path: Path, *, dtype: str, device: str, place: str, trust_remote_code: bool = False) -> Self:
        """Load from a Hugging Face folder; nothing is downloaded.

        Args:
            path: the folder.
            dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
            device: "auto" (CUDA if there is any), "cpu" or "cuda".
            place: the configuration path that named the folder, for errors.
            trust_remote_code: run Python code that lies in the folder.

        Raises:
            ConfigError: the folder holds no complete causal language model, or there is no such device.
        """
        target = choose_device(device)
        _check_folder(path, place, trust_remote_code)
        disable_progress_bar()
        model = load_causal_lm(ModelSource(path, dtype, None, trust_remote_code, place))
        return cls(model.to(target).eval().requires_grad_(False), target)

    @property
    def vocab_size(self) -> int:
        return int(self._model.get_input_embeddings().num_embeddings)

    @property
    def max_length(self) -> int | None:
        """Positions the model knows; None where it does not say."""
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    @torch.inference_mode()
    def compute_logprobs(self, jobs: Sequence[LogProbJob]) -> list[Float32Array]:
        """Float32 [R] for each job, log softmax(logits / temperature) of its response tokens, in one padded pass.

        The caller sees to it that token ids are in the vocabulary and that each job has a response token.

        Raises:
            UnavailableError: the device's memory does not suffice now.
        """
        try:
            return self._forward(jobs)
        except torch.OutOfMemoryError as error:
            raise UnavailableError("the device is out of memory; lower reference.tokens_per_batch") from error

    def _forward(self, jobs: Sequence[LogProbJob]) -> list[Float32Array]:
        shape = len(jobs), max(job.num_tokens for job in jobs)
        ids, wanted = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        for row, job in enumerate(jobs):
            ids[row, : job.num_tokens] = job.token_ids
            wanted[row, job.num_prompt_tokens - 1 : job.num_tokens - 1] = True  # position t predicts token t + 1
        num_tokens = torch.tensor([job.num_tokens for job in jobs], device=self._device)
        positions = torch.arange(shape[1], device=self._device)
        is_token = positions < num_tokens[:, None]
        token_ids = torch.from_numpy(ids).to(self._device)
        predictors = torch.from_numpy(np.flatnonzero(wanted)).to(self._device)
        logits = self._logits(
            predictors,
            input_ids=token_ids,
            attention_mask=is_token.long(),
            position_ids=torch.minimum(positions, num_tokens[:, None] - 1),
        ).logits[0]
        targets = token_ids.flatten()[predictors + 1]
        counts = [job.num_response_tokens for job in jobs]
        temperatures = np.repeat(np.array([job.temperature for job in jobs], np.float32), counts)
        logprobs = target_logprobs(logits, targets, torch.from_numpy(temperatures).to(self._device)).cpu().numpy()
        return np.split(logprobs, np.cumsum(counts)[:-1])


def choose_device(name: str) -> torch.device:
    """Raises ConfigError for "cuda" where there is none."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("reference.device", "is 'cuda' but torch finds no CUDA device", "set it to auto or cpu")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def _check_folder(path: Path, place: str, trust_remote_code: bool) -> None:
    if not path.is_dir():
        raise ConfigError(place, f"{path} is not a folder", "name an existing Hugging Face model folder")
    if not (path / "config.json").is_file():
        raise ConfigError(place, f"{path} holds no config.json", "name a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(place, f"{path}/config.json is not usable ({describe(error)})", "correct it") from error
    architectures = getattr(config, "architectures", None) or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if architectures and not known.intersection(architectures) and not getattr(config, "auto_map", None):
        problem = f"{path} holds a {architectures[0]}, which is not a causal language model"
        raise ConfigError(place, problem, "name the folder of a causal LM")
