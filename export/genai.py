"""Causal language models: onnxruntime-genai's model builder makes the graph, our pass puts the loratrf operators in.

The builder brings what makes generation fast (KV cache in a shared buffer, GroupQueryAttention, int4 and int8 weights);
it knows nothing of task-aware filters, and quantises the low-rank matrices that it does know.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..errors import UserError
from ..formats.fit import fit
from ..formats.manifest import LayerRow
from ..formats.swappable import RuntimeWeight, layer_weights, neutral
from ..genai.generate import CONFIG_FILE
from ..genai.names import genai_name, linear_nodes
from ..ops.library import library_path
from ..pytorch.base import tokenizer_of
from ..pytorch.shapes import text_config
from .adapted import fold, layer_rows
from .behind import insert
from .builder_config import in_builders_words, mend, rotations, write_rotations
from .options import ExportOptions
from .proven import no_tokenizer
from .swappable import weights_to_inputs

if TYPE_CHECKING:
    from ..pytorch.base import BaseModel

__all__ = ["PRECISIONS", "build", "build_graph", "check_precision", "knows", "save", "write_genai"]

PRECISIONS = {
    ("cpu", "none", "float32"): "fp32",
    ("cpu", "int4", "float32"): "int4",
    ("cpu", "int8", "float32"): "int8",
    ("cuda", "none", "float32"): "fp32",
    ("cuda", "none", "float16"): "fp16",
    ("cuda", "none", "bfloat16"): "bf16",
    ("cuda", "int4", "float16"): "int4",
    ("cuda", "int4", "bfloat16"): "int4",
    ("cuda", "int8", "float16"): "int8",
}
"""(--device, --quantize, --dtype) -> the builder's name for it; what is missing here, GenAI has no kernels for."""

_MISREAD = (LookupError, AttributeError, TypeError, ArithmeticError, AssertionError)
"""What the builder dies of where a configuration holds other fields, or values, than it takes for granted."""

_PACKED = {"q_proj", "k_proj", "v_proj"}


def check_precision(device: str, quantize: str, dtype: str) -> str:
    """The builder's precision for a combination of options. Raises UserError where there is none."""
    if precision := PRECISIONS.get((device, quantize, dtype)):
        return precision
    known = [f"--quantize {q} --dtype {t}" for d, q, t in PRECISIONS if d == device]
    raise UserError(
        f"--device {device} has no --quantize {quantize} with --dtype {dtype} in ONNX Runtime GenAI. Expected one of: "
        f"{'; '.join(known) or 'another device (cpu, cuda)'}."
    )


def write_genai(
    adapter: Adapter,
    base: BaseModel,
    out: Path,
    options: ExportOptions,
    *,
    merge_with_peft: Callable[[], list[LayerRow]],
    step: Callable[[str], None],
) -> tuple[list[LayerRow], list[RuntimeWeight]]:
    """Writes the folder of `out` as onnxruntime_genai loads it; returns what became of each adapted layer, and what
    the graph takes at run time where it is swappable.

    The folder gets what `build_graph` and `save` say. `base` is used up. Raises UserError for what GenAI can't take.
    """
    from .images import exports_images, name_images, write_images

    check_precision(options.device, options.quantize, options.dtype)
    step("adapting")
    biases = {}
    if adapter.not_separable is None:
        biases = _biases_without_place(adapter, base)
        rest = fold(base.model, adapter, merge=options.merges)
        rows = layer_rows(adapter, rest)
        biased = any(layer.lora_bias is not None for layer in adapter.layers.values())
        changed = bool(options.merges or adapter.modules_to_save or adapter.biases or biased)
    else:
        rest, rows, changed = {}, merge_with_peft(), True
    if images := exports_images(base, options):
        write_images(base, out.parent, step)
    model = build_graph(adapter, base, out, options, {*rest, *biases}, changed=changed, step=step, images=images)
    if images:
        name_images(out.parent, base.model.config)
    tables = [path for path in rest if adapter.layers[path].embedding]
    insert(model, rest, adapter.filter_input, options.dtype, biases, tables)
    weights = _swap(model.graph, adapter, rest, options)
    save(model, out, options)
    return rows, weights


def knows(adapter: Adapter, base: BaseModel, out: Path) -> bool:
    """Whether the builder knows the model, before anything is merged or written.

    The builder has no list to ask, so it is given a checkpoint without weights: what it doesn't know it refuses before
    it looks for them, with NotImplementedError. Whatever else it says means that it went on.
    """
    with tempfile.TemporaryDirectory(prefix=".base-", dir=out.parent) as name:
        stage = Path(name)
        _stage_config(adapter, base, stage)
        extra = _builder_options((), ExportOptions(), trust_remote_code=base.trust_remote_code)
        try:
            build(stage, stage / "built" / out.name, "fp32", "cpu", extra)
        except UserError as error:
            return not isinstance(error.__cause__, NotImplementedError)
    return True


def _biases_without_place(adapter: Adapter, base: BaseModel) -> dict[str, NDArray[np.float32]]:
    """What the adapter adds to outputs of layers that have no bias (lora_bias): none is in the builder's model."""
    return {
        path: (layer.lora_bias * layer.scale).astype(np.float32)
        for path, layer in adapter.layers.items()
        if layer.lora_bias is not None and base.model.get_submodule(path).bias is None
    }


def build_graph(
    adapter: Adapter,
    base: BaseModel,
    out: Path,
    options: ExportOptions,
    adapted: Collection[str],
    *,
    changed: bool,
    step: Callable[[str], None],
    images: bool = False,
) -> ir.Model:
    """The builder's graph of `base` in memory, with a linear layer of its own for each of the modules `adapted`.

    The folder of `out` gets the weights in `out`.data, genai_config.json, config.json and the tokenizer, which is
    `adapter`'s where it has one. `changed` says whether `base` has other weights than its checkpoint. `base` is used
    up: its weights are gone afterwards, so that the builder, which loads its own, doesn't need memory for two models.
    With `images` the graph takes embeddings in the place of tokens, which `write_images` made a graph for. Raises
    UserError for options that the builder doesn't take, and models that it doesn't know.
    """
    if options.opset is not None:
        raise UserError("--opset isn't for causal language models: onnxruntime-genai's builder sets it. Leave it out.")
    precision = check_precision(options.device, options.quantize, options.dtype)
    with tempfile.TemporaryDirectory(prefix=".base-", dir=out.parent) as name:
        stage = Path(name)
        _stage_checkpoint(adapter, base, stage, changed)
        rotated = rotations(base.model)
        base.model.to("meta")
        gc.collect()
        step("building the graph with onnxruntime-genai")
        extra = _builder_options(adapted, options, trust_remote_code=base.trust_remote_code)
        if images:
            extra["exclude_embeds"] = "true"
        build(stage, out, precision, options.device, extra)
        shutil.copy(stage / "config.json", out.parent)
    step("inserting operators")
    model = ir.load(out)
    write_rotations(model.graph, out.parent, rotated)
    mend(model.graph, text_config(base.model.config))
    _name_modules(model, base.model, adapted)
    _fix_cache_width(model, out.parent)
    return model


def _stage_checkpoint(adapter: Adapter, base: BaseModel, stage: Path, changed: bool) -> None:
    """A folder for the builder to read: the base (links to its files where nothing changed) and the tokenizer."""
    model, folder = base.model, Path(base.path)
    if folder.is_dir() and not changed:
        for file in folder.iterdir():
            if file.name.endswith((".safetensors", ".safetensors.index.json")) or file.name == "generation_config.json":
                (stage / file.name).symlink_to(file.resolve())
    else:
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.config.tie_word_embeddings = tied
        model.float()
        # Shards bound how much is in memory twice while it is written.
        model.save_pretrained(stage, max_shard_size="500MB")
    tokens, source = _stage_config(adapter, base, stage)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise UserError(
            f"The tokenizer in {source} has {tokens} tokens, but the base model {base.path} embeds {rows}: the adapter "
            "was trained on another vocabulary. Pass the base that it was trained on (--base-model), saved after "
            "resize_token_embeddings."
        )


def _stage_config(adapter: Adapter, base: BaseModel, stage: Path) -> tuple[int, Path | str]:
    """What the builder reads before weights: the configuration and the tokenizer. Its tokens, and where it was."""
    tokenizer, source = tokenizer_of(adapter, base)
    if tokenizer is None:
        raise no_tokenizer(source)
    base.model.config.architectures = [type(base.model).__name__]
    base.model.config.save_pretrained(stage)
    tokenizer.save_pretrained(stage)
    return len(tokenizer), source


def _builder_options(
    adapted: Collection[str], options: ExportOptions, *, trust_remote_code: bool = False
) -> dict[str, str]:
    """The builder's extra_options: projections that carry operators stay as they are in the torch model.

    q, k and v apart where one of them does; Phi-3's gate_up_proj, which the builder would cut in two, whole.
    """
    names = {path.rpartition(".")[2] for path in adapted}
    # A cache as wide as the window takes only rows of one length, and only runs that outgrow it.
    extra = {"hf_remote": str(trust_remote_code).lower(), "windowed_kv_cache": "false"}
    if names & _PACKED:
        extra["fuse_qkv"] = "false"
    if "gate_up_proj" in names:
        extra["fuse_mlp_gate_up"] = "true"
    if options.dtype == "bfloat16" and options.quantize != "none":
        extra["use_cuda_bf16"] = "true"
    return extra


def build(stage: Path, out: Path, precision: str, device: str, options: Mapping[str, str]) -> None:
    """Runs onnxruntime-genai's model builder on the checkpoint in the folder `stage`, writing `out` and its folder.

    `options` are the builder's extra_options. Raises UserError where the builder refuses the model.
    """
    try:
        from onnxruntime_genai.models.builder import create_model, parse_extra_options
    except ModuleNotFoundError as error:
        raise UserError(
            f"Causal language models are built with onnxruntime-genai, and {error.name} is not installed here. Install "
            "it: `pip install 'loratrf-deploy[export,genai]'`."
        ) from error
    cache = str(stage / "cache")
    pairs = [f"{name}={value}" for name, value in {**options, "filename": out.name}.items()]
    try:
        extra = parse_extra_options("", str(stage), str(out.parent), precision, device, cache, pairs)
        in_builders_words(text_config(extra["hf_details"]["hf_config"]))
        create_model("", str(stage), str(out.parent), precision, device, cache, **extra)
    except Exception as error:  # the builder raises plain exceptions of many classes
        architecture = json.loads((stage / "config.json").read_text())["architectures"][0]
        if isinstance(error, NotImplementedError) and str(stage) in str(error):
            raise UserError(
                f"onnxruntime-genai's builder doesn't know the architecture {architecture}. Expected one that it "
                "builds, such as LLaMA, Mistral, Qwen, Gemma or Phi."
            ) from error
        detail = str(error).replace(str(stage), "the base model") or type(error).__name__
        if isinstance(error, _MISREAD):  # such as KeyError, whose text is 'type' and no more
            release = metadata.version("onnxruntime-genai")
            detail = (
                f"{type(error).__name__}: {detail}. Release {release} stumbles over the base model's config.json or "
                "weights, whatever the adapter. No option of loratrf-export gets around that; another release of "
                "onnxruntime-genai may."
            )
        raise UserError(
            f"onnxruntime-genai's builder can't build {architecture} for {precision} on {device}: {detail}"
        ) from error


def _swap(graph: ir.Graph, adapter: Adapter, rest: Mapping[str, Any], options: ExportOptions) -> list[RuntimeWeight]:
    """Makes the operators' weights inputs of the graph with defaults, where `options` say so; returns them."""
    if options.swappable is None:
        return []
    weights = [
        weight
        for path, own in rest.items()
        for weight in layer_weights(adapter.layers[path], own, options.dtype, options.swappable)
    ]
    values = fit(adapter, weights, adapter.filter_input)
    defaults = {weight.name: neutral(weight) for weight in weights} if options.swappable == "base" else values
    weights_to_inputs(graph, {weight.name: weight.shape for weight in weights}, defaults)
    return weights


def _name_modules(model: ir.Model, base: Any, adapted: Collection[str]) -> None:
    """Each linear layer's last node says in metadata "module" which torch module it computes, as in other exports."""
    import torch

    nodes = linear_nodes(model.graph)
    for path, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and (place := nodes.get(genai_name(path) or "")):
            place[1].metadata_props["module"] = f"{path}.base_layer" if path in adapted else path


def _fix_cache_width(model: ir.Model, folder: Path) -> None:
    """Writes the head width into the cache's shape, so that whoever runs the graph by itself knows it.

    The builder leaves it open for quantised caches, which we don't export.
    """
    width = json.loads((folder / CONFIG_FILE).read_text())["model"]["decoder"]["head_size"]
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None and str(value.shape[-1]) == "kv_cache_dim":
            value.shape = ir.Shape([*value.shape[:-1], width])


def save(model: ir.Model, out: Path, options: ExportOptions) -> None:
    """Writes the graph anew; the builder's weights stay where they are, the operators' go to `out`.adapter.

    With `options.bundle_library` the custom-op library goes into the folder too, registered by a path relative to it.
    """
    new = [value for value in model.graph.initializers.values() if not isinstance(value.const_value, ir.ExternalTensor)]
    tensors = [value.const_value for value in new if value.const_value is not None]
    if tensors:
        external = ir.external_data.convert_tensors_to_external(tensors, out.parent, f"{out.name}.adapter")
        for value, tensor in zip(new, external, strict=True):
            value.const_value = tensor
    ir.save(model, out)
    if options.bundle_library:
        _bundle_library(out.parent)


def _bundle_library(folder: Path) -> None:
    library = library_path()
    shutil.copy(library, folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = library.name
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=4) + "\n")
