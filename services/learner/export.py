"""The export of the trained policy as a Hugging Face folder.

transformers writes the new weights and `config.json`. Training does not change tokenizer, chat template, generation
settings and Python code, so these files are copied byte for byte from the policy's folder. The copies load as the
originals do, also where transformers would not write them: a tokenizer with code of its own, or generation settings
that the consistency check of transformers refuses.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rollmesh.errors import ConfigError

_COPIED = frozenset({".json", ".jinja", ".model", ".txt", ".py", ".tiktoken", ".bpe", ".spm"})
_NOT_COPIED = frozenset({"config.json", "params.json"})
"""transformers writes `config.json`. `params.json` describes weights in Mistral's own layout; they are not exported."""
_TEMPLATES = "additional_chat_templates"
_GENERATION = "generation_config.json"


class Exporter:
    """The writer of Hugging Face folders of one model.

    The constructor writes a folder without weights to a temporary place, so that a fault shows before training.

    Args:
        model: the model, from transformers; its class and configuration are exported.
        source: the folder from which the model was loaded.

    Raises:
        ConfigError: a folder of this model cannot be written.
    """

    def __init__(self, model: Any, source: Path) -> None:
        from transformers import GenerationConfig

        self._model = model
        self._source = source
        if getattr(model.config, "transformers_weights", None):
            model.config.transformers_weights = None  # the exported weights have the usual file name
        if (source / _GENERATION).is_file():
            model.generation_config = GenerationConfig()  # the file is copied, and this process generates nothing
        with tempfile.TemporaryDirectory(prefix="rollmesh-export-") as folder:
            try:
                self.write(Path(folder), {})
            except (
                ArithmeticError,
                AttributeError,
                ImportError,
                LookupError,
                OSError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                problem = f"{type(model).__name__} from {source} cannot be exported ({reason:.300})"
                raise ConfigError("model.path", problem, "correct the model folder") from error

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a Hugging Face folder.

        Args:
            folder: the folder; created if missing.
            tensors: the whole weights, by their names in the model.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        self._model.save_pretrained(folder, state_dict=state)
        for file in self._source.iterdir():
            is_index = file.name.endswith(".index.json")
            if file.suffix in _COPIED and file.name not in _NOT_COPIED and not is_index and file.is_file():
                shutil.copyfile(file, folder / file.name)
        if (self._source / _TEMPLATES).is_dir():
            shutil.copytree(self._source / _TEMPLATES, folder / _TEMPLATES, dirs_exist_ok=True)
