"""What peers.py has other engines load: a LLaMA and its LoRA adapters as GGUF, and as OpenVINO's IR.

Runs under the Python of a peer, which has gguf and safetensors, or optimum-intel.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_tensors(folder: Path, pattern: str = "*.safetensors") -> dict[str, NDArray[np.float32]]:
    """All tensors of a folder's safetensors files, in float32."""
    import safetensors

    tensors = {}
    for file in sorted(folder.glob(pattern)):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            if entry["dtype"] == "BF16":  # the upper half of a float32
                value = (np.frombuffer(entry["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                value = np.frombuffer(entry["data"], {"F32": np.float32, "F16": np.float16}[entry["dtype"]])
            tensors[name] = value.reshape(entry["shape"]).astype(np.float32)
    return tensors


def neighbouring(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection for rotary embeddings that turn neighbours, not the halves of a head."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def read_llama(base: Path) -> dict[str, Any]:
    """config.json. RuntimeError where it is no model that write_gguf writes."""
    config = json.loads((base / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config["model_type"] != "llama" or rope.get("rope_type", "default") != "default":
        raise RuntimeError(
            f"{base} is a {config['model_type']} with {rope}, expected a llama with plain rotary embeddings"
        )
    config["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config


def gguf_names(config: dict[str, Any]) -> Callable[[str], str]:
    import gguf

    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])

    def name(tensor: str) -> str:
        found = known.get_name(tensor, (".weight",))
        if found is None:
            raise RuntimeError(f"GGUF has no name for {tensor}")
        return found

    return name


def gguf_rows(config: dict[str, Any], name: str, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """`weight`, or an adapter's B, as GGUF has the layer `name`."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    count = next((count for part, count in heads.items() if part in name), 0)
    return np.ascontiguousarray(neighbouring(weight, count)) if count else weight


def write_gguf(base: Path, file: Path, weights: str) -> None:
    """A LLaMA without its tokenizer, its matrices in Q4_0 or float32."""
    import gguf

    config = read_llama(base)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    name_of = gguf_names(config)
    kind = {"int4": gguf.GGMLQuantizationType.Q4_0, "float32": gguf.GGMLQuantizationType.F32}[weights]
    for name, tensor in read_tensors(base).items():
        value = gguf_rows(config, name, tensor)
        own = kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name_of(name), gguf.quants.quantize(value, own), raw_dtype=own)
    finish(writer)


def write_gguf_adapter(base: Path, adapter: Path, file: Path) -> None:
    """PEFT's LoRA in float32, as llama.cpp's own converter writes it by default."""
    import gguf

    config, own = read_llama(base), json.loads((adapter / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(own["lora_alpha"]))
    name_of = gguf_names(config)
    for name, tensor in read_tensors(adapter, "adapter_model.safetensors").items():
        layer, _, half = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        value = gguf_rows(config, layer, tensor) if half == "lora_B" else tensor
        writer.add_tensor(f"{name_of(f'{layer}.weight')}.{half.lower()}", value)
    finish(writer)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_openvino(base: Path, folder: Path, weights: str) -> None:
    quantise = ["--sym", "--group-size", "32", "--ratio", "1.0", "--all-layers"] if weights == "int4" else []
    command = [Path(sys.executable).with_name("optimum-cli"), "export", "openvino", "-m", base]
    command += ["--task", "text-generation-with-past", "--weight-format", {"float32": "fp32"}.get(weights, weights)]
    subprocess.run([*map(str, command), *quantise, str(folder)], check=True)
