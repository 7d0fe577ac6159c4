"""The choice of the attention implementation that is right for a model.

The engine computes attention as the model defines it. An implementation of transformers may leave a part out without an
error: `sdpa` ignores the soft cap of Gemma 2, `flex_attention` needs a compiler, and attention sinks are an extra term
of the softmax. So an implementation is chosen only if its function takes the model's soft cap. Once the model is
loaded, its outputs on a short sequence are compared with those of its own `eager` attention (`probe`). A short sequence
does not reach a sliding window; all implementations get the windows from the same masks of transformers.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rollmesh.errors import ConfigError
from rollmesh.models.probe import ModelProbe

_logger = logging.getLogger(__name__)

AUTO = "auto"
EAGER = "eager"


def choose_attention(config: Any, wanted: str, dtype: str, device: torch.device, place: str) -> str | None:
    """Return the implementation to load a model with.

    Args:
        config: transformers' configuration of the model.
        wanted: the user's choice, or "auto".
        dtype: the name of the parameters' dtype.
        device: the device that the model computes on.
        place: the configuration path of the user's choice, for errors.

    Returns:
        transformers' attn_implementation; None leaves the choice to transformers, which takes `sdpa` where the
        architecture supports `sdpa`, and else `eager`.

    Raises:
        ConfigError: the user's choice ignores the model's soft cap.
    """
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if wanted != AUTO:
        if cap and not _takes_soft_cap(wanted):
            problem = f"{wanted!r} ignores the soft cap of {config.model_type} (attn_logit_softcapping is {cap})"
            raise ConfigError(place, problem, "remove it, or set it to eager")
        return wanted
    if not cap:
        return None
    is_for_flash = device.type == "cuda" and dtype in ("bfloat16", "float16") and _flash_attention_takes_soft_cap()
    return "flash_attention_2" if is_for_flash else EAGER


def _takes_soft_cap(implementation: str) -> bool:
    """Return whether an implementation takes a soft cap.

    Names that transformers does not know are kernels for its flash attention, which takes a soft cap.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation == EAGER or implementation not in ALL_ATTENTION_FUNCTIONS:
        return True
    return "softcap" in inspect.signature(ALL_ATTENTION_FUNCTIONS[implementation]).parameters


def _flash_attention_takes_soft_cap() -> bool:
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return False
    from flash_attn import flash_attn_varlen_func

    return "softcap" in inspect.signature(flash_attn_varlen_func).parameters


def implementation_of(model: Any) -> str:
    """Return the implementation that a loaded model computes with."""
    return str(getattr(model.config.get_text_config(), "_attn_implementation", None) or EAGER)


@contextlib.contextmanager
def eager_attention(model: Any) -> Iterator[bool]:
    """Let a model compute with its own `eager` attention while the context lasts.

    Yields:
        Whether the model computes with `eager`. Architectures of the older kind fix their attention when they are
        built.
    """
    from transformers.utils import logging

    before, verbosity = implementation_of(model), logging.get_verbosity()
    logging.set_verbosity_error()  # transformers warns of architectures of the older kind
    try:
        model.set_attn_implementation(EAGER)
        yield implementation_of(model) == EAGER
    finally:
        model.set_attn_implementation(before)
        logging.set_verbosity(verbosity)


def name_of(model: Any) -> str:
    """Return the name of a loaded model for the log: "gemma2 with eager attention"."""
    return f"{model.config.model_type} with {implementation_of(model)} attention"


def settle_attention(
    model: Any, make_probe: Callable[[], ModelProbe], wanted: str, place: str, should_log: bool = True
) -> ModelProbe:
    """Compare a loaded model's attention with `eager`, and switch to `eager` where the two differ. Collective.

    Args:
        model: the model, loaded with the choice of `choose_attention`.
        make_probe: makes a probe of the model as it is at that moment.
        wanted: the user's choice, or "auto".
        place: the configuration path of the user's choice, for errors.
        should_log: log a switch to `eager`; on one rank only.

    Returns:
        The probe of the model as it computes from now on.

    Raises:
        ConfigError: the user's choice changes the model's outputs.
    """
    probe, used = make_probe(), implementation_of(model)
    if used == EAGER:
        return probe
    with eager_attention(model) as is_eager:
        difference = probe.change_since() if is_eager else 0.0
    if difference <= probe.tolerance:
        return probe
    figures = f"by up to {difference:.1e} (rounding is below {probe.tolerance:.1e})"
    if wanted != AUTO:
        problem = f"{wanted!r} changes the outputs of {model.config.model_type} {figures}"
        raise ConfigError(place, problem, "set it to auto or eager")
    if should_log:
        _logger.warning("%s: its outputs differ from those of eager attention %s; eager is used", probe.name, figures)
    model.set_attn_implementation(EAGER)
    return make_probe()
