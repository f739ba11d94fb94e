"""Models that generate, of any architecture that transformers traces: a decoder with its cache, an encoder before it.

For what onnxruntime-genai's builder doesn't know. The folder is what transformers' ExportedModel loads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.modeling_outputs import BaseModelOutput

from ..adapters.adapter import Adapter
from ..errors import UserError
from ..formats.stages import CROSS, DECODER, ENCODER, ENCODER_FILE, STAGES_FILE
from ..pytorch.base import BaseModel
from ..pytorch.processors import processor_files
from ..runtime.sound import Spectrogram
from .graph import finish

if TYPE_CHECKING:
    from transformers.exporters.base import ExportedComponent

__all__ = ["calling", "check_hears", "save_stages", "trace_stages"]

_BATCH, _PAST, _NEW, _LONG = 2, 3, 4, 5
"""Sizes that are traced with, each its own: torch takes sizes that are equal for one and the same."""
_BOTH_WAYS = ("paligemma",)
"""Models whose tokens of a prompt see those behind them."""
_SMALL = 256
"""Bytes below which a constant stays in its graph: ONNX Runtime infers shapes from some."""


def check_hears(adapter: Adapter, base: BaseModel) -> None:
    """UserError where what is beside `adapter`, or `base`, makes of sound something else than the model takes."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    files = {name: text.encode() for name, text in processor_files(adapter, base).items()}
    if (shape := Spectrogram.find(files, base.path).shape) != base.row_shape:
        raise UserError(
            f"The feature extractor of {base.path} makes {shape} (mels, frames), and the model takes {base.row_shape}. "
            "Save its own beside it: WhisperFeatureExtractor.from_pretrained(...).save_pretrained(folder)."
        )
    # generate() knows languages by their English names too; who runs the model knows those of lang_to_id.
    config = base.model.generation_config
    language = getattr(config, "language", None)
    if isinstance(language, str):
        config.language = TO_LANGUAGE_CODE.get(language.lower(), language)


def trace_stages(base: BaseModel, opset: int) -> dict[str, ExportedComponent]:
    """The graphs of `base`, finished: its decoder, and its encoder where it has one.

    The decoder takes any number of tokens behind a cache of any length, an empty one at first, and gives logits and the
    cache that is longer by them. The encoder gives the keys and values of the decoder's attention to the input: they
    are computed once, not with each token. Raises UserError where torch can't trace the model or ONNX can't express it.
    """
    model = base.model
    if model.config.model_type in _BOTH_WAYS:
        raise UserError(
            f"The base model {base.path} ({type(model).__name__}) reads a prompt in both directions, and a decoder "
            "with a cache reads from the front: its answers would be others. This version can't export it; "
            "docs/vision-language.md names models that it can."
        )
    whole = model.forward
    ids = torch.ones((_BATCH, _LONG), dtype=torch.int64)
    if not model.config.is_encoder_decoder:

        def decode(input_ids: Any, attention_mask: Any, past_key_values: Any) -> dict[str, Any]:
            given = whole(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=True
            )
            return {"logits": given.logits, "past_key_values": given.past_key_values}

        with torch.no_grad():
            past = whole(input_ids=ids[:, :_PAST], past_key_values=DynamicCache(), use_cache=True).past_key_values
        mask = torch.ones((_BATCH, _PAST + _NEW), dtype=torch.int64)
        inputs = {"input_ids": ids[:, :_NEW], "attention_mask": mask, "past_key_values": past}
        return {DECODER: _trace(base, decode, inputs, opset)}

    def encode(**inputs: Any) -> dict[str, Any]:
        hidden = model.get_encoder()(**inputs, return_dict=True).last_hidden_state
        start = torch.zeros((hidden.shape[0], 1), dtype=torch.int64)
        caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # Of this pass only the keys and values are given: the rest of the decoder isn't in the graph.
        given = whole(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=inputs.get("attention_mask"),
            decoder_input_ids=start,
            past_key_values=caches,
            use_cache=True,
        )
        return {CROSS[:-1]: given.past_key_values.cross_attention_cache}

    def decode_behind(
        decoder_input_ids: Any, past_key_values: Any, cross_key_values: Any, attention_mask: Any = None
    ) -> dict[str, Any]:
        keys = cross_key_values.layers[0].keys
        # Read for its sizes alone: the keys and values that are made of it are there.
        hidden = keys.new_zeros((keys.shape[0], keys.shape[2], model.config.hidden_size))
        given = whole(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            past_key_values=EncoderDecoderCache(past_key_values, cross_key_values),
            use_cache=True,
        )
        return {"logits": given.logits, "past_key_values": given.past_key_values.self_attention_cache}

    entered = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.row_shape:  # sound, whose every row is as long, so that there is no mask
        entered = {base.main_input: torch.zeros((_BATCH, *base.row_shape), dtype=model.dtype)}
    with torch.no_grad():
        caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
        past = whole(**entered, decoder_input_ids=ids[:, :_PAST], past_key_values=caches, use_cache=True)
    caches = past.past_key_values
    inputs = {
        "decoder_input_ids": ids[:, :_NEW],
        "past_key_values": caches.self_attention_cache,
        "cross_key_values": caches.cross_attention_cache,
        **{name: value for name, value in entered.items() if name == "attention_mask"},
    }
    return {DECODER: _trace(base, decode_behind, inputs, opset), ENCODER: _trace(base, encode, entered, opset)}


def _trace(base: BaseModel, forward: Callable[..., Any], inputs: Mapping[str, Any], opset: int) -> ExportedComponent:
    """The finished graph of `forward`, which calls the layers of `base`, on `inputs`."""
    auto = torch.export.Dim.AUTO
    # Rows, and tokens; heads and their width are the model's own.
    shapes: dict[str, Any] = {
        name: {0: auto, 1: auto} if isinstance(value, torch.Tensor) else [{0: auto, 2: auto}] * (2 * len(value.layers))
        for name, value in inputs.items()
    }
    config = OnnxConfig(dynamic_shapes=shapes, ort_fusions="cpu", opset_version=opset)
    try:
        with calling(base.model, forward):
            component = OnnxExporter().export(base.model, dict(inputs), config=config).components["model"]
    except Exception as error:  # torch.export raises many classes
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{type(base.model).__name__} can't be traced to ONNX with its cache: {said}. It may need a newer "
            "transformers or torch; families proven with this version are in docs/generating.md."
        ) from error
    # As in other models' graphs; ExportedModel reads inputs with and without their prefix, outputs in their order.
    for value in component.program.graph.inputs:
        value.name = (value.name or "").removeprefix("input.")
    for value in component.program.graph.outputs:
        value.name = (value.name or "").replace("output.past_key_values.", "present.")
    finish(component.program, opset)
    return component


@contextlib.contextmanager
def calling(model: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling `model` calls `forward`: its layers keep their names, which a module around it would lengthen."""
    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def save_stages(components: Mapping[str, ExportedComponent], out: Path) -> tuple[str, ...]:
    """Writes the decoder to `out`, an encoder beside it and export.json, which names them; returns the encoder's files.

    Each has its weights in a file of its own, named after it, but for those that both use: these lie in the decoder's.
    """
    if out.name == ENCODER_FILE and ENCODER in components:
        raise UserError(f"--out {out} has the name that the encoder's file gets. Choose another, such as model.onnx.")
    files = {DECODER: out.name} | ({ENCODER: ENCODER_FILE} if ENCODER in components else {})
    stored: dict[str, ir.ExternalTensor] = {}
    for stage, name in files.items():
        program, path = components[stage].program, out.with_name(name)
        own: list[tuple[ir.Value, Any, str]] = []
        for value in program.graph.initializers.values():
            tensor = value.const_value
            if tensor.nbytes < _SMALL:
                continue
            digest = _digest(tensor) if len(files) > 1 else ""
            if (known := stored.get(digest)) is not None:
                value.const_value = _at_the_place_of(known, value)
            else:
                own.append((value, tensor, digest))
        tensors = [tensor for _, tensor, _ in own]
        external = ir.external_data.convert_tensors_to_external(tensors, path.parent, f"{name}.data")
        for (value, _, digest), tensor in zip(own, external, strict=True):
            value.const_value = tensor
            if digest:
                stored.setdefault(digest, tensor)
        ir.save(program, path)
    entries = {
        stage: {"file": name, "metadata": dataclasses.asdict(components[stage].metadata)}
        for stage, name in files.items()
    }
    content = {"schema_version": 1, "export_format": "onnx", "components": entries}
    (out.parent / STAGES_FILE).write_text(json.dumps(content, indent=2) + "\n")
    return (ENCODER_FILE, f"{ENCODER_FILE}.data") if ENCODER in files else ()


def _at_the_place_of(known: ir.ExternalTensor, value: ir.Value) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        known.location,
        known.offset,
        known.length,
        known.dtype,
        shape=known.shape,
        name=value.name or "",
        base_dir=known.base_dir,
    )


def _digest(tensor: Any) -> str:
    """What tells a weight from others: its type, its shape and its bytes."""
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.tobytes()).hexdigest()
