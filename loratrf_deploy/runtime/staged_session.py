"""Generating with a model in stages (export.json): ONNX Runtime and numpy, tokenizers for text. No torch, no GenAI."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.json_text import parse_json
from ..errors import UserError
from ..files import read_regular
from ..formats.manifest import MANIFEST, check_files, check_graph, read_manifest
from ..formats.stages import read_stages
from ..genai.names import is_cache
from ..ops.library import is_built
from .generation_session import Prompt
from .scores import Rules, choose
from .session import OwnProcess, create_session, quiet_options

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Running", "StagedSession"]

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""What config.json calls the most tokens that a decoder's position embeddings hold."""


class StagedSession:
    """text = model(prompt): one token after the other, each the likeliest or drawn, by a decoder with a cache.

    Opens the folder of a model that `loratrf-export` wrote in stages, a decoder and maybe an encoder. What
    generation_config.json says of a greedy search holds (`Rules`); beams it doesn't search. The files are held against
    the hashes in loratrf.json, weights by samples of their bytes. `library` says whether the loratrf operators run as
    fused kernels; None takes them where they are built. `threads` are ONNX Runtime's, 0 as many as the CPU has cores.
    Raises UserError where the folder is no such model, or not as it was exported.
    """

    takes_adapters = False
    """As of a `GenerationSession` whose adapter is fixed: there are none to load."""
    adapters: Mapping[str, Any] = {}

    def __init__(self, folder: str | Path, *, library: bool | None = None, threads: int = 0):
        self._process = OwnProcess(type(self).__name__)
        folder = Path(folder)
        self._folder = folder = folder.parent if folder.suffix == ".onnx" else folder
        stages = read_stages(folder)
        if os.path.isfile(folder / MANIFEST):
            manifest = read_manifest(folder / MANIFEST)
            check_graph(stages.decoder, manifest)
            check_files(folder, manifest)
        if library is None:
            library = is_built()
        files = [stages.decoder, *([stages.encoder] if stages.encoder else [])]
        opened = [create_session(file, library=library, options=quiet_options(threads)) for file in files]
        self._decoder, self._encoder = opened[0], opened[1] if stages.encoder else None
        own, general = (_read_json(folder / name) for name in ("generation_config.json", "config.json"))
        try:
            self._rules = Rules.of(own)
            starts = (own.get("decoder_start_token_id"), general.get("decoder_start_token_id"), own.get("bos_token_id"))
            start = next((int(token) for token in starts if token is not None), 0)
            self._start = None if self._encoder is None else start
            general = general.get("text_config") or general  # of a vision-language model
            self._vocabulary = int(general["vocab_size"])
            self._longest = next((int(general[name]) for name in _LENGTHS if general.get(name)), None)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder} has a config.json or generation_config.json that generation can't use ({error!r}). Export "
                "the model again with loratrf-export."
            ) from error
        self._tokenizer: tokenizers.Tokenizer | None = None

    @property
    def continues(self) -> bool:
        """Whether what is made goes on from the prompt; else it answers it, as a translation does."""
        return self._encoder is None

    def load(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """UserError: the adapter of such a model is fixed."""
        raise UserError(
            f"{self._folder} has a fixed adapter, and takes no others: models in stages don't swap. Export each "
            "adapter by itself."
        )

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 128, **search: Any) -> list[str]:
        """What the model makes of each of `prompts`, as text; `search` as in `generate_tokens`."""
        if isinstance(prompts, str):
            raise TypeError("generate() takes a list of prompts: generate([prompt], ...)")
        return ["".join(self.stream(prompt, max_new_tokens=max_new_tokens, **search)) for prompt in prompts]

    def stream(self, prompt: Prompt, *, max_new_tokens: int = 128, **search: Any) -> Iterator[str]:
        """Yields the text that the model makes of `prompt` as it is made; `search` as in `generate_tokens`."""
        from tokenizers.decoders import DecodeStream

        text = DecodeStream(skip_special_tokens=True)
        tokenizer = self._text()
        for token in self.generate_tokens(self.encode(prompt), max_new_tokens=max_new_tokens, **search):
            if token not in self._rules.stops:
                # A token that is part of a character waits for the rest of it.
                yield text.step(tokenizer, token) or ""

    def generate_tokens(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int = 128,
        stop: bool = True,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        random_seed: int | None = None,
    ) -> Iterator[int]:
        """Yields up to `max_new_tokens` tokens that the model makes of the tokens `prompt`; the last may be one that
        stops it. Without `stop` none does: as many as asked for.

        With `do_sample` tokens are drawn, see `choose`. Raises UserError for an empty prompt, tokens that the model
        doesn't know, or more than it has positions for.
        """
        self._check(prompt, max_new_tokens)
        prompt_ids = np.array([prompt], np.int64)
        rules = self._rules if stop else replace(self._rules, min_new_tokens=max_new_tokens)
        running = self.begin({"input_ids": prompt_ids, "attention_mask": np.ones_like(prompt_ids)})
        before = list(prompt) if self._start is None else [self._start]
        begin, rng = len(before), np.random.default_rng(random_seed) if do_sample else None
        ids = np.array([before], np.int64)
        for made in range(max_new_tokens):
            scores = running.step(ids)[0, -1].astype(np.float32)
            scores = rules.apply(scores, before, begin, last=made == max_new_tokens - 1)
            token = choose(scores, rng, temperature, top_p)
            yield token
            if token in rules.stops:
                return
            before.append(token)
            ids = np.array([[token]], np.int64)

    def begin(self, inputs: Mapping[str, NDArray[Any]]) -> Running:
        """A decoder with an empty cache, and what the encoder makes of `inputs` where there is one."""
        self._process.check()
        return Running(self._decoder, self._encoder, inputs)

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a text. Raises UserError for a chat."""
        if not isinstance(prompt, str):
            raise UserError(
                "A chat goes through the tokenizer's template, which models in stages don't have here. Give the text "
                "as the template makes it."
            )
        return list(self._text().encode(prompt).ids)

    def _text(self) -> tokenizers.Tokenizer:
        if self._tokenizer is None:
            try:
                from tokenizers import Tokenizer
            except ModuleNotFoundError as error:
                raise UserError("Text needs tokenizers, not installed here: `pip install tokenizers`.") from error
            if not (self._folder / "tokenizer.json").is_file():
                raise UserError(
                    f"{self._folder} has no tokenizer.json, which text goes through here: the base's tokenizer, such "
                    "as Marian's own of sentencepiece, makes none. Give and take tokens: StagedSession.generate_tokens."
                )
            raw = read_regular(self._folder / "tokenizer.json")
            try:
                tokenizer = Tokenizer.from_str(raw.decode())
            except Exception as error:  # plain exceptions
                raise UserError(f"{self._folder / 'tokenizer.json'} is no tokenizer ({error}).") from error
            tokenizer.no_padding()
            tokenizer.no_truncation()
            self._tokenizer = tokenizer
        return self._tokenizer

    def _check(self, prompt: Sequence[int], count: int) -> None:
        if not len(prompt):
            raise UserError("The prompt is empty: the model needs at least one token.")
        if foreign := [token for token in prompt if not 0 <= token < self._vocabulary]:
            raise UserError(f"The prompt has token {foreign[0]}, the model knows 0 to {self._vocabulary - 1}.")
        sizes = [len(prompt) + count] if self._start is None else [len(prompt), 1 + count]
        if count < 1 or (self._longest is not None and max(sizes) > self._longest):
            raise UserError(
                f"The prompt has {len(prompt)} tokens and max_new_tokens is {count}; the model has positions for "
                f"{self._longest}. Shorten the prompt, or ask for fewer new tokens."
            )


class Running:
    """A decoder behind its cache, which grows with each step."""

    def __init__(self, decoder: Any, encoder: Any, inputs: Mapping[str, NDArray[Any]]):
        from onnxruntime import OrtValue

        self._decoder, self._value = decoder, OrtValue.ortvalue_from_numpy
        self._names = [value.name for value in decoder.get_outputs()]
        rows = len(next(iter(inputs.values())))
        self._kept: dict[str, Any] = {}
        self._grows = encoder is None
        if encoder is not None:
            names = [value.name for value in encoder.get_outputs()]
            feeds = {value.name: self._value(inputs[value.name]) for value in encoder.get_inputs()}
            self._kept = dict(zip(names, encoder.run_with_ort_values(names, feeds), strict=True))
        wanted = {value.name: value for value in decoder.get_inputs()}
        for name, value in wanted.items():
            if is_cache(name):  # (batch, heads, past, width), nothing is past yet
                kind = np.float16 if value.type == "tensor(float16)" else np.float32
                sizes = [size if isinstance(size, int) else 0 for size in value.shape[1:]]
                self._kept[name] = self._value(np.zeros([rows, *sizes], kind))
        self._tokens = "input_ids" if "input_ids" in wanted else "decoder_input_ids"
        self._mask = inputs["attention_mask"] if "attention_mask" in wanted else None
        self._kept = {name: value for name, value in self._kept.items() if name in wanted}
        self._past = 0

    def step(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """The logits (batch, tokens, V) of `ids` (batch, tokens), which join the cache."""
        feeds = self._kept | {self._tokens: self._value(np.ascontiguousarray(ids))}
        self._past += ids.shape[1]
        if self._mask is not None:
            mask = np.ones((len(ids), self._past), np.int64) if self._grows else self._mask
            feeds["attention_mask"] = self._value(mask)
        given = dict(zip(self._names, self._decoder.run_with_ort_values(self._names, feeds), strict=True))
        for name, value in given.items():
            if is_cache(name):
                self._kept[f"past_key_values.{name.removeprefix('present.')}"] = value
        return given["logits"].numpy()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_regular(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Export the model again with loratrf-export.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected an object. Export the model again.")
    return content
