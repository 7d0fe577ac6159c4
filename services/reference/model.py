"""The frozen policy: a Hugging Face causal language model that computes the log-probabilities of given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from rollmesh.data.model_folder import ModelFolder
from rollmesh.errors import ConfigError, UnavailableError
from rollmesh.models.attention import AUTO, name_of, settle_attention
from rollmesh.models.loading import ModelSource, load_causal_lm
from rollmesh.models.logprobs import target_logprobs
from rollmesh.models.probe import ModelProbe, choose_batching, ways_of_batching
from rollmesh.models.rows import AcceptedInputs, Batching, Rectangle, lay_out
from rollmesh.models.wanted import WantedLogits
from rollmesh.types import Float32Array, Int32Array

ATTENTION_PLACE = "reference.attention"


@dataclass(frozen=True, slots=True)
class LogProbJob:
    """A prompt and its response.

    Attributes:
        token_ids: int32 [P + R], the prompt and the response.
        num_prompt_tokens: P, at least 1.
        temperature: the divisor of the logits; greater than 0.
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

    def __init__(self, model: Any, device: torch.device, attention: str) -> None:
        self._model = model
        self._device = device
        self._logits = WantedLogits(model)
        self._accepted = AcceptedInputs(model)
        probe = settle_attention(model, self._probe, attention, ATTENTION_PLACE)
        self._batching = choose_batching([probe], ways_of_batching([attention], may_pack=False))

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: str,
        device: str,
        place: str,
        attention: str = AUTO,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load the model from a Hugging Face folder, without a download.

        Args:
            path: the folder.
            dtype: "auto" (the type of the checkpoint), "float32", "bfloat16" or "float16".
            device: "auto" (CUDA where torch finds a CUDA device), "cpu" or "cuda".
            place: the configuration path that named the folder, for errors.
            attention: transformers' attn_implementation, or "auto".
            trust_remote_code: whether to run Python code of the folder.

        Raises:
            ConfigError: the folder holds no complete causal language model, the device does not exist, or the attention
                is wrong for the model.
        """
        target = choose_device(device)
        folder = ModelFolder.read(place, path)
        folder.check_causal_lm()
        folder.check_known(trust_remote_code)
        disable_progress_bar()
        source = ModelSource(path, dtype, attention, target, trust_remote_code, place, ATTENTION_PLACE)
        return cls(load_causal_lm(source).to(target).eval().requires_grad_(False), target, attention)

    @property
    def vocab_size(self) -> int:
        return int(self._model.get_input_embeddings().num_embeddings)

    @property
    def max_length(self) -> int | None:
        """The number of positions that the model knows; None where the model's configuration does not say."""
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    @torch.inference_mode()
    def compute_logprobs(self, jobs: Sequence[LogProbJob]) -> list[Float32Array]:
        """Return float32 [R] for each job: log softmax(logits / temperature) of the response tokens.

        Logits of [2, 0] at temperature 2 become [1, 0]; the log-probability of the first token is -log(1 + 1/e) =
        -0.313.

        One padded pass takes all jobs. Where padding changes the model's outputs, each job has a pass of its own. The
        caller makes sure that the token ids are in the vocabulary, and that each job has a response token.

        Raises:
            UnavailableError: the device has too little free memory now.
        """
        try:
            if self._batching is Batching.SINGLE:
                return [logprobs for job in jobs for logprobs in self._forward([job])]
            return self._forward(jobs)
        except torch.OutOfMemoryError as error:
            raise UnavailableError("the device is out of memory; lower reference.tokens_per_batch") from error

    def _forward(self, jobs: Sequence[LogProbJob]) -> list[Float32Array]:
        layout = tuple((number,) for number in range(len(jobs)))
        rectangle = lay_out([job.token_ids for job in jobs], layout, self._batching)
        counts = [job.num_response_tokens for job in jobs]
        # Position t predicts token t + 1.
        firsts = [start + job.num_prompt_tokens - 1 for start, job in zip(rectangle.starts, jobs, strict=True)]
        predictors = np.concatenate(
            [np.arange(first, first + count) for first, count in zip(firsts, counts, strict=True)]
        )
        temperatures = np.repeat(np.array([job.temperature for job in jobs], np.float32), counts)
        logprobs = self._logprobs(rectangle, torch.from_numpy(predictors), torch.from_numpy(temperatures))
        return np.split(logprobs.numpy(), np.cumsum(counts)[:-1])

    def _logprobs(self, rectangle: Rectangle, predictors: Tensor, temperatures: Tensor) -> Tensor:
        """Return the log-probabilities of the predicted tokens: float32 [N], on the CPU."""
        input_ids, position_ids = rectangle.input_ids.to(self._device), rectangle.position_ids.to(self._device)
        wanted = predictors.to(self._device)
        more = self._accepted(position_ids, rectangle.boundaries)
        logits = self._logits(wanted, input_ids=input_ids, **more).logits[0]
        targets = input_ids.flatten()[wanted + 1]
        return target_logprobs(logits, targets, temperatures.to(self._device)).cpu()

    def _probe(self) -> ModelProbe:
        @torch.inference_mode()
        def forward(rectangle: Rectangle, predictors: Tensor, _targets: Tensor) -> Tensor:
            return self._logprobs(rectangle, predictors, torch.ones(len(predictors)))

        dtype = str(self._model.dtype).removeprefix("torch.")
        return ModelProbe(name_of(self._model), forward, self.vocab_size, dtype, list)


def choose_device(name: str) -> torch.device:
    """Return the device of a name. Raises ConfigError for "cuda" where torch finds no CUDA device."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("reference.device", "is 'cuda' but torch finds no CUDA device", "set it to auto or cpu")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")
