"""Generating with a model in stages (export.json): ONNX Runtime and numpy, tokenizers for text. No torch, no GenAI."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..formats.manifest import MANIFEST, check_files, check_graph, read_manifest
from ..formats.settings import read_settings
from ..formats.stages import read_stages
from ..genai.names import is_cache
from ..ops.library import is_built
from .chat import render
from .generation_session import Prompt
from .scores import Rules, choose
from .session import OwnProcess, create_session, quiet_options
from .sound import Samples, Spectrogram, read_wave
from .speech import Speech
from .text import TOKENIZER, read_tokenizer

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Running", "StagedSession"]

Given: TypeAlias = "Prompt | Samples"
"""A text, or what is said: its samples, at the rate that the model hears."""

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
"""What config.json calls the most tokens that a decoder's position embeddings hold."""
_FEATURES = "input_features"


class StagedSession:
    """text = model(prompt): one token after the other, each the likeliest or drawn, by a decoder with a cache.

    Opens the folder of a model that `loratrf-export` wrote in stages, a decoder and maybe an encoder. What
    generation_config.json says of a greedy search holds (`Rules`); beams it doesn't search. A model of sound, Whisper,
    is given samples for a prompt, and answers with what is said (`transcribe`). The files are held against the hashes
    in loratrf.json, weights by samples of their bytes. `library` says whether the loratrf operators run as fused
    kernels; None takes them where they are built. `threads` are ONNX Runtime's, 0 as many as the CPU has cores. Raises
    UserError where the folder is no such model, or not as it was exported.
    """

    takes_adapters = False
    """As of a `GenerationSession` whose adapter is fixed: there are none to load."""
    adapters: Mapping[str, Any] = {}
    spectrogram: Spectrogram | None
    """What a model of sound hears, and at which sampling_rate; None of a model of texts."""

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
        own, general = (read_settings(folder / name) for name in ("generation_config.json", "config.json"))
        self.spectrogram, self._speech = self._hearing(), None
        try:
            self._rules = Rules.of(own)
            starts = (own.get("decoder_start_token_id"), general.get("decoder_start_token_id"), own.get("bos_token_id"))
            start = next((int(token) for token in starts if token is not None), 0)
            self._start = None if self._encoder is None else start
            general = general.get("text_config") or general  # of a vision-language model
            self._vocabulary = int(general["vocab_size"])
            self._longest = next((int(general[name]) for name in _LENGTHS if general.get(name)), None)
            if self.spectrogram is not None:
                self._speech = Speech.of(start, own, general)
                if foreign := [token for token in self._speech.known if not 0 <= token < self._vocabulary]:
                    raise ValueError(f"token {foreign[0]} of {self._vocabulary}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{folder} has a config.json or generation_config.json that generation can't use ({error!r}). Export "
                "the model again with loratrf-export."
            ) from error
        self._tokenizer: tokenizers.Tokenizer | None = None

    def _hearing(self) -> Spectrogram | None:
        """What makes of sound what the encoder takes, where it takes that."""
        inputs = {} if self._encoder is None else {value.name: value.shape for value in self._encoder.get_inputs()}
        if _FEATURES not in inputs:
            return None
        spectrogram = Spectrogram.read(self._folder)
        if (shape := tuple(inputs[_FEATURES][1:])) != spectrogram.shape:
            raise UserError(
                f"The feature extractor in {self._folder} makes {spectrogram.shape} (mels, frames), and the model "
                f"takes {shape}: it is another model's. Export the model again, with its own beside the base."
            )
        return spectrogram

    @property
    def hears(self) -> bool:
        """Whether prompts are sound."""
        return self.spectrogram is not None

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

    def transcribe(self, sound: str | Path | Samples, *, max_new_tokens: int | None = None, **search: Any) -> str:
        """What is said in `sound`, a WAV file or its samples; `search` as in `generate_tokens`."""
        given = self.hear(sound) if isinstance(sound, str | Path) else sound
        return "".join(self.stream(given, max_new_tokens=max_new_tokens, **search))

    def hear(self, path: str | Path) -> Samples:
        """The samples of a WAV file (16-bit PCM), its channels mixed, at the model's rate. Raises UserError for other
        files, sound that is too long, and models of texts."""
        if self.spectrogram is None:
            raise UserError(f"{self._folder} is a model of texts, and {path} is to be sound for it. Give it a text.")
        return read_wave(path, self.spectrogram)

    def generate(self, prompts: Sequence[Given], *, max_new_tokens: int | None = 128, **search: Any) -> list[str]:
        """What the model makes of each of `prompts`, as text; `search` as in `generate_tokens`."""
        if isinstance(prompts, str):
            raise TypeError("generate() takes a list of prompts: generate([prompt], ...)")
        rows = self.generate_rows([self.encode(prompt) for prompt in prompts], max_new_tokens=max_new_tokens, **search)
        return ["".join(self._pieces(row)) for row in rows]

    def generate_rows(
        self, prompts: Sequence[Sequence[int] | Samples], *, max_new_tokens: int | None = 128, **search: Any
    ) -> list[list[int]]:
        """What `generate_tokens` makes of each of `prompts`, many of them at once; `search` as there.

        An encoder's prompts are one batch, shorter ones masked where they end. A decoder that goes on from its prompts
        counts positions from where its cache begins, so that those of one length are a batch.
        """
        batches: dict[int, list[int]] = {}
        for at, prompt in enumerate(prompts):
            batches.setdefault(len(prompt) if self.continues else 0, []).append(at)
        made: list[list[int]] = [[] for _ in prompts]
        for batch in batches.values():
            for tokens in self._rows([prompts[at] for at in batch], max_new_tokens, **search):
                for at, token in zip(batch, tokens, strict=True):
                    made[at] += [] if token is None else [token]
        return made

    def stream(self, prompt: Given, *, max_new_tokens: int | None = 128, **search: Any) -> Iterator[str]:
        """Yields the text that the model makes of `prompt` as it is made; `search` as in `generate_tokens`."""
        yield from self._pieces(self.generate_tokens(self.encode(prompt), max_new_tokens=max_new_tokens, **search))

    def _pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of `tokens`, as they come."""
        tokenizer = self._text()
        from tokenizers.decoders import DecodeStream

        text = DecodeStream(skip_special_tokens=True)
        for token in tokens:
            if token not in self._rules.stops and not (self._speech and self._speech.is_time(token)):
                # A token that is part of a character waits for the rest of it.
                yield text.step(tokenizer, token) or ""

    def generate_tokens(
        self,
        prompt: Sequence[int] | Samples,
        *,
        max_new_tokens: int | None = 128,
        stop: bool = True,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        random_seed: int | None = None,
        language: str | None = None,
        task: str | None = None,
    ) -> Iterator[int]:
        """Yields up to `max_new_tokens` tokens that the model makes of the tokens `prompt`; the last may be one that
        stops it. Without `stop` none does: as many as asked for. None are as many as the model has positions for.

        A model of sound is given samples, and maybe their `language` ("de") and a `task` ("transcribe" or "translate",
        into English); else generation_config.json says both, or the language is detected. With `do_sample` tokens are
        drawn, see `choose`. Raises UserError for an empty prompt, tokens that the model doesn't know, or more than it
        has positions for.
        """
        rows = self._rows(
            [prompt],
            max_new_tokens,
            stop=stop,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            random_seed=random_seed,
            language=language,
            task=task,
        )
        for tokens in rows:
            yield from (token for token in tokens if token is not None)

    def _rows(
        self,
        prompts: Sequence[Sequence[int] | Samples],
        max_new_tokens: int | None,
        *,
        stop: bool = True,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        random_seed: int | None = None,
        language: str | None = None,
        task: str | None = None,
    ) -> Iterator[list[int | None]]:
        """Yields a token for each of `prompts` (of one length where there is no encoder), None behind its last one."""
        firsts = [self._first(prompt, language, task) for prompt in prompts]
        count = self._room(max(map(len, prompts)), len(firsts[0]), max_new_tokens)
        running = self.begin(self._inputs(prompts))
        rows, ids = self._detected(running, firsts)
        rules = self._rules if stop else replace(self._rules, min_new_tokens=count)
        begin, goes_on = len(rows[0]), [True] * len(rows)
        rngs = [np.random.default_rng(random_seed) if do_sample else None for _ in rows]
        for made in range(count):
            scores, last = running.step(ids)[:, -1].astype(np.float32), made == count - 1
            tokens: list[int | None] = [
                choose(rules.apply(own, row, begin, last=last), rng, temperature, top_p) if going else None
                for own, row, rng, going in zip(scores, rows, rngs, goes_on, strict=True)
            ]
            yield tokens
            goes_on = [token is not None and token not in rules.stops for token in tokens]
            if not any(goes_on):
                return
            # Behind its end a row is padded; nobody looks at what follows.
            ids = np.array([[token or 0] for token in tokens], np.int64)
            for row, (token,) in zip(rows, ids.tolist(), strict=True):
                row.append(token)

    def _inputs(self, prompts: Sequence[Sequence[int] | Samples]) -> dict[str, NDArray[Any]]:
        """What the first graph takes of `prompts`."""
        if self.spectrogram is not None:
            return {_FEATURES: np.stack([self.spectrogram(np.asarray(prompt)) for prompt in prompts])}
        ids = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
        return {"input_ids": ids, "attention_mask": mask}

    def begin(self, inputs: Mapping[str, NDArray[Any]]) -> Running:
        """A decoder with an empty cache, and what the encoder makes of `inputs` where there is one."""
        self._process.check()
        return Running(self._decoder, self._encoder, inputs)

    def encode(self, prompt: Given) -> Any:
        """The tokens of a text, or of a chat through the tokenizer's template; sound as it is. Raises UserError for a
        chat without a template, and a text for a model of sound."""
        if self.hears:
            if isinstance(prompt, np.ndarray):
                return prompt
            raise UserError(
                f"{self._folder} is a model of sound, which doesn't go on from texts. Give a WAV file to transcribe: "
                "StagedSession.transcribe(file), or loratrf-generate --audio FILE."
            )
        if isinstance(prompt, np.ndarray):
            raise UserError(f"{self._folder} is a model of texts, and the prompt is sound. Give it a text.")
        if not isinstance(prompt, str):
            # The template has the special tokens in it.
            return list(self._text().encode(render(self._folder, prompt), add_special_tokens=False).ids)
        return list(self._text().encode(prompt).ids)

    def _text(self) -> tokenizers.Tokenizer:
        if self._tokenizer is None:
            if not (self._folder / TOKENIZER).is_file():
                raise UserError(
                    f"{self._folder} has no tokenizer.json, which text goes through here: the base's tokenizer, such "
                    "as Marian's own of sentencepiece, makes none. Give and take tokens: StagedSession.generate_tokens "
                    "with transformers beside it, AutoTokenizer.from_pretrained(base), and sentencepiece."
                )
            self._tokenizer = read_tokenizer(self._folder)
        return self._tokenizer

    def _first(self, prompt: Sequence[int] | Samples, language: str | None, task: str | None) -> list[int | None]:
        """The tokens that what is made comes behind, None for a language that is to be detected."""
        if self._speech is not None:
            return self._speech.tokens(language, task)
        if asked := language or task:
            raise UserError(f"{self._folder} is a model of texts, and {asked!r} is asked of sound. Leave it out.")
        if not len(prompt):
            raise UserError("The prompt is empty: the model needs at least one token.")
        if foreign := [token for token in prompt if not 0 <= token < self._vocabulary]:
            raise UserError(f"The prompt has token {foreign[0]}, the model knows 0 to {self._vocabulary - 1}.")
        return list(map(int, prompt)) if self._start is None else [self._start]

    def _detected(
        self, running: Running, firsts: Sequence[Sequence[int | None]]
    ) -> tuple[list[list[int]], NDArray[np.int64]]:
        """`firsts` with the likeliest language where one is to be detected, and what of them `running` hasn't seen."""
        rows = [[token for token in first if token is not None] for first in firsts]
        if self._speech is None or None not in firsts[0]:
            return rows, np.array(rows, np.int64)
        scores = running.step(np.array(rows, np.int64)[:, :1])[:, -1]
        languages = list(self._speech.languages.values())
        for row, own in zip(rows, scores[:, languages].argmax(axis=-1), strict=True):
            row.insert(1, languages[int(own)])
        return rows, np.array(rows, np.int64)[:, 1:]

    def _room(self, given: int, first: int, count: int | None) -> int:
        """How many tokens are made behind `first` ones of a prompt of `given`: `count`, or None for all there is room
        for."""
        room = None if self._longest is None else self._longest - first
        count = (128 if room is None else room) if count is None else count
        long = self._longest is not None and not self.hears and given > self._longest
        if count < 1 or long or (room is not None and count > room):
            what = f"{first} tokens come first" if self.hears else f"The prompt has {given} tokens"
            raise UserError(
                f"{what} and max_new_tokens is {count}; the model has positions for {self._longest}. "
                f"{'Ask' if self.hears else 'Shorten the prompt, or ask'} for fewer new tokens."
            )
        return count


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
            feeds = {value.name: self._value(_as_taken(inputs[value.name], value)) for value in encoder.get_inputs()}
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


def _as_taken(array: NDArray[Any], value: Any) -> NDArray[Any]:
    """`array` of the type of the graph's input `value`."""
    return array.astype(np.float16) if value.type == "tensor(float16)" else array
