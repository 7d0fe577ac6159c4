"""A Hugging Face folder of the trained policy: new weights and config.json, the rest as the policy's folder has it.

Tokenizer, chat template, generation settings and Python code are no part of the training. They are copied byte for
byte: what loads from the policy's folder loads from the export, and what transformers would not write itself (a
tokenizer with code of its own, generation settings that its own check of consistency refuses) is exported too.
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
"""transformers writes the first; the second describes weights in Mistral's own layout, which are not exported."""
_TEMPLATES = "additional_chat_templates"
_GENERATION = "generation_config.json"


class Exporter:
    """Writes folders of one model.

    Args:
        model: of transformers; its configuration and class are exported.
        source: the folder that it was loaded from.

    Raises:
        ConfigError: a folder of this model cannot be written. That is tried, without weights, so that it is known
            before anything is trained.
    """

    def __init__(self, model: Any, source: Path) -> None:
        from transformers import GenerationConfig

        self._model = model
        self._source = source
        if getattr(model.config, "transformers_weights", None):
            model.config.transformers_weights = None  # the export's weights have the usual name
        if (source / _GENERATION).is_file():
            model.generation_config = GenerationConfig()  # nothing is generated here, and the file is copied
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
        """Write a folder.

        Args:
            folder: created where it is not there.
            tensors: the model's weights, whole, by their names in it.
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
