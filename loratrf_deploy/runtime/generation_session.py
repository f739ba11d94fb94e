"""One language model and many resident adapters: each call names its own, or one per row. Needs GenAI alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..formats.images import IMAGE_SIZES, PIXELS, takes_images
from ..formats.manifest import MANIFEST, Swappable, check_files, check_graph, read_manifest, read_swappable
from ..formats.swappable import Default
from ..genai.folder import cache_window, takes_uneven_rows
from ..genai.generate import CONFIG_FILE, decode_rows, load_model_and_tokenizer, read_config
from .genai_adapters import GenaiAdapters, Placed
from .residents import AdapterInfo, Choice, Residents, check_scale
from .session import OwnProcess
from .slots import SlotBank

if TYPE_CHECKING:
    pass

__all__ = ["GenerationSession", "Prompt"]

Prompt: TypeAlias = "str | Sequence[Mapping[str, str]]"
"""A text, or a chat: messages of {"role": "user", "content": ...}, put through the tokenizer's template."""


class GenerationSession:
    """text = model(prompt; weights of one adapter), the adapter named in each call, or for each row of a batch.

    Opens the folder of a language model of `loratrf-export --swappable` (one adapter per call) or `--adapters` (one per
    row); one with a fixed adapter too, which takes no others. No adapter is loaded at first. Every method may be called
    from any number of threads; a call that has begun keeps its adapters, whatever is unloaded or replaced meanwhile.
    `max_bytes` limits the memory of resident adapters: those that were used least recently are put aside, and read
    again from their files when a call names them. The folder is held against the hashes in loratrf.json first, weights
    by samples of their bytes. A custom-op library that the folder brings is native code of whoever made it: unless it
    is ours byte by byte, ours takes its place; `trust_library` loads the folder's own. `threads` are ONNX Runtime's, 0
    as many as the CPU has cores. Raises UserError where the folder is no exported language model, or not as it was
    exported.
    """

    def __init__(
        self, folder: str | Path, *, max_bytes: int | None = None, trust_library: bool = False, threads: int = 0
    ):
        self._process = OwnProcess(type(self).__name__)
        folder = Path(folder)
        folder = folder.parent if folder.suffix == ".onnx" else folder
        manifest = read_manifest(folder / MANIFEST) if os.path.isfile(folder / MANIFEST) else None
        if manifest is not None:
            check_files(folder, manifest)
        self._model, self._tokenizer = load_model_and_tokenizer(folder, trust_library=trust_library, threads=threads)
        config = read_config(folder)["model"]
        self._uneven, self._least = takes_uneven_rows(config), cache_window(config)
        try:
            self._pad, self._context, self._vocabulary = (
                int(config[name]) for name in ("pad_token_id", "context_length", "vocab_size")
            )
            stops = config.get("eos_token_id")
            self._stops = set() if stops is None else {stops} if isinstance(stops, int) else set(stops)
            graph = folder / config["decoder"]["filename"]
            self._edge: int | None = None  # pixels of a token of an image
            if takes_images({"model": config}):
                self._edge = int(config["vision"]["patch_size"]) * int(config["vision"]["spatial_merge_size"])
                self._image_token = int(config["image_token_id"])
                if self._edge < 1:
                    raise ValueError(f"its images have tokens of {self._edge} pixels")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder} has no {CONFIG_FILE} that generation can use ({error}). Export the model again with "
                "loratrf-export."
            ) from error
        self._swappable: Swappable | None = None
        if manifest is not None and manifest.swappable is not None:
            manifest, self._swappable = read_swappable(graph)
            self._adapters = GenaiAdapters(self._model)
            self._slots = SlotBank(self._swappable, self._adapters.place) if self._swappable.slots else None
            place: Any = self._slots.place if self._slots else self._adapters.place
            self._residents: Residents[Any] = Residents(graph, manifest, self._swappable, place, max_bytes)
        elif manifest is not None:
            check_graph(graph, manifest)

    @property
    def default(self) -> Default:
        """What adapter None stands for: "base" or "adapter", as the model was exported; always the base in rows."""
        return "adapter" if self._swappable is None else "base" if self._slots else self._swappable.default

    continues = True
    """What is made goes on from the prompt, where a `StagedSession` may answer it."""

    @property
    def takes_adapters(self) -> bool:
        """Whether adapters can be loaded: the model was exported with --swappable or --adapters."""
        return self._swappable is not None

    @property
    def evictions(self) -> int:
        """How often an adapter was put aside so far, for another to stay within `max_bytes`."""
        return 0 if self._swappable is None else self._residents.evictions

    @property
    def context(self) -> int:
        """How many tokens a prompt and what follows it have together at most."""
        return self._context

    @property
    def vocabulary(self) -> int:
        """How many tokens there are, from 0 on."""
        return self._vocabulary

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name, the one that was used least recently first."""
        self._process.check()
        return {} if self._swappable is None else self._residents.infos()

    def load(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Reads the .onnx_adapter file `path` and keeps it as `name`; as `AdapterSession.load`."""
        self._loaded().load(name, path, replace=replace)

    def unload(self, name: str) -> None:
        """Forgets the adapter `name`; freed when the last call that uses it ends. UserError if unknown."""
        self._loaded().unload(name)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        adapter: Choice | EllipsisType | None = ...,
        adapters: Sequence[Choice | None] | None = None,
        scale: float = 1.0,
        max_new_tokens: int = 128,
        **search: Any,
    ) -> list[str]:
        """What follows each of `prompts`, as text; arguments as in `generate_tokens`."""
        if isinstance(prompts, str):
            raise TypeError("generate() takes a list of prompts: generate([prompt], ...)")
        rows = [self.encode(prompt) for prompt in prompts]
        made = self.generate_tokens(
            rows, adapter=adapter, adapters=adapters, scale=scale, max_new_tokens=max_new_tokens, **search
        )
        return [self._tokenizer.decode(row) for row in made]

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        adapter: Choice | EllipsisType | None = ...,
        adapters: Sequence[Choice | None] | None = None,
        scale: float = 1.0,
        max_new_tokens: int = 128,
        stop: bool = True,
        images: Mapping[str, NDArray[Any]] | None = None,
        **search: Any,
    ) -> list[list[int]]:
        """Each row's new tokens, at most `max_new_tokens`, without the end-of-sequence token that stopped it.

        Without `stop` none is made: as many tokens as asked for.

        `adapter` is one loaded name for all rows, or a blend {name: weight}; `adapters` names one per row instead, for
        a model of --adapters. None asks for the model's default (see `default`): where the model takes adapters, one of
        the two must be given. `scale` multiplies alpha/R and gamma, as in `AdapterSession.run`. `search` are
        onnxruntime-genai's search options (do_sample, temperature, top_k, top_p, ...); without any it is greedy. An
        aLoRA is active from the last occurrence of its invocation tokens in a prompt on; in one that has none it is
        not. `images` are what a single prompt sees, where the model sees: pixel_values (images, channels, H, W) and
        image_sizes (images, 2), as the base's processor gives them beside the tokens. Raises UserError for an unknown
        adapter, an empty prompt, or one that leaves no room in the context.
        """
        self._check(prompts, max_new_tokens)
        if not prompts:
            return []
        seen = None if images is None else self._seen(images, prompts)
        choices = self._choices(len(prompts), adapter, adapters, scale)
        made: list[list[int]] = [[] for _ in prompts]
        # onnxruntime-genai takes a pad token at a row's end for padding wherever there are several rows, and activates
        # an adapter for all of them at once.
        alone = [
            at for at, row in enumerate(prompts) if row[-1] == self._pad or self._invocation(choices[at]) is not None
        ]
        together: dict[int, list[int]] = {}
        for at in range(len(prompts)):
            if at not in alone:
                together.setdefault(0 if self._uneven else len(prompts[at]), []).append(at)
        for batch in [*together.values(), *([at] for at in alone)]:
            own = [choices[at] for at in batch]
            rows = [prompts[at] for at in batch]
            for tokens in self._decode(rows, own, scale, max_new_tokens, search, stop=stop, images=seen):
                for at, token in zip(batch, tokens, strict=True):
                    made[at].append(int(token))
        return [self._until_end(row) for row in made] if stop else made

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: Choice | EllipsisType | None = ...,
        activate_after: str = "",
        scale: float = 1.0,
        max_new_tokens: int = 128,
        **search: Any,
    ) -> Iterator[str]:
        """Yields the text that follows `prompt` as it is made; arguments as in `generate_tokens`.

        `activate_after` is a text before `prompt` that runs without the adapter: its part of the key/value cache stays
        the default's, what follows is the adapter's.
        """
        self._process.check()
        text = self._tokenizer.create_stream()
        tokens = self.stream_tokens(
            self.encode(prompt),
            adapter=adapter,
            activate_after=self.encode(activate_after) if activate_after else (),
            scale=scale,
            max_new_tokens=max_new_tokens,
            **search,
        )
        for token in tokens:
            yield text.decode(token)

    def stream_tokens(
        self,
        row: Sequence[int],
        *,
        adapter: Choice | EllipsisType | None = ...,
        activate_after: Sequence[int] = (),
        scale: float = 1.0,
        max_new_tokens: int = 128,
        **search: Any,
    ) -> Iterator[int]:
        """`stream` of tokens and as tokens, without the end-of-sequence token that stops it."""
        prefix = activate_after
        self._check([[*prefix, *row]], max_new_tokens)
        choices = self._choices(1, adapter, None, scale)
        if prefix and (self._swappable is None or self._slots):
            raise UserError("activate_after is for a model of --swappable: this one's adapters are not activated.")
        for tokens in self._decode([row], choices, scale, max_new_tokens, search, prefix):
            if int(tokens[0]) in self._stops:
                return
            yield int(tokens[0])

    def _decode(
        self,
        rows: Sequence[Sequence[int]],
        choices: Sequence[Choice | None],
        scale: float,
        count: int,
        search: Mapping[str, Any],
        prefix: Sequence[int] = (),
        *,
        stop: bool = True,
        images: Mapping[str, NDArray[Any]] | None = None,
    ) -> Iterator[Any]:
        placed: Placed | None = None
        ids, held = None, []
        if self._swappable is not None and self._slots:
            if late := [choice for choice in choices if self._invocation(choice) is not None]:
                raise UserError(
                    f"{late[0]} is an aLoRA, which begins within a prompt, and rows of a mixed model are under their "
                    "adapter from the start. Use it in a model of --swappable."
                )
            # Held until the rows are done: a slot is free for others when nobody has it any more.
            held = [None if choice is None else self._residents.resident(choice, scale) for choice in choices]
            ids = [-1 if slot is None else slot.number for slot in held]
            placed = self._slots.bound()
        elif choices[0] is not None:
            placed = self._residents.resident(choices[0], scale)
            if (invocation := self._invocation(choices[0])) is not None:
                begin = _last(rows[0], invocation)
                if prefix:
                    raise UserError("activate_after is not for an aLoRA, which begins at its own invocation tokens.")
                if begin is None:  # PEFT's rule: without its invocation the adapter is not active
                    placed = None
                else:
                    prefix, rows = rows[0][:begin], [rows[0][begin:]]
        yield from decode_rows(
            self._model,
            rows,
            count,
            pad=self._pad,
            stop=stop,
            active=None if placed is None else placed.active,
            adapter_ids=ids,
            prefix=prefix,
            least=min(self._least, self._context),
            images=images,
            search=search,
        )

    def _seen(self, images: Mapping[str, NDArray[Any]], prompts: Sequence[Sequence[int]]) -> dict[str, NDArray[Any]]:
        """What `decode_rows` takes of `images`. Raises UserError where they don't go with the model or the prompt."""
        if self._edge is None:
            raise UserError(
                "This model reads texts alone, and images are given. Which models see, and how they are exported: "
                "docs/vision-language.md."
            )
        if len(prompts) != 1:
            raise UserError(f"images are of one prompt, and {len(prompts)} are given. Call it once for each.")
        try:
            pixels = np.asarray(images[PIXELS], np.float32)
            sizes = np.asarray(images.get(IMAGE_SIZES, [pixels.shape[2:]] * len(pixels)), np.int64)
            whole = pixels.ndim == 4 and sizes.shape == (len(pixels), 2) and bool(len(pixels))
            if not whole or (sizes % self._edge).any() or (sizes < 1).any() or (sizes > pixels.shape[2:]).any():
                raise ValueError(f"they are of shape {pixels.shape}, with image_sizes {sizes.tolist()}"[:300])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"The images can't be read ({error}). Expected {PIXELS} (images, channels, height, width) and "
                f"{IMAGE_SIZES} (images, 2), heights and widths in multiples of {self._edge}, as the base's processor "
                "gives them."
            ) from error
        counts = (sizes // self._edge).prod(axis=1)
        found = sum(token == self._image_token for token in prompts[0])
        if found != counts.sum():
            raise UserError(
                f"The prompt has {found} tokens of images (token {self._image_token}), and the images have "
                f"{counts.sum()}. Encode text and images together, with the base's processor."
            )
        return {PIXELS: pixels, IMAGE_SIZES: sizes, "num_image_tokens": counts}

    def _invocation(self, choice: Choice | None) -> tuple[int, ...] | None:
        """The invocation tokens of an aLoRA, None for others. UserError for a blend that one is in."""
        if self._swappable is None or choice is None:
            return None
        if isinstance(choice, str):
            return self._residents.origin(choice).invocation_tokens
        if late := [name for name in choice if self._residents.origin(name).invocation_tokens]:
            raise UserError(f"{late[0]} is an aLoRA, which begins within a prompt: it can't be blended. Name it alone.")
        return None

    def _choices(
        self, rows: int, adapter: Choice | EllipsisType | None, adapters: Sequence[Choice | None] | None, scale: float
    ) -> list[Choice | None]:
        """The adapter of each row. Raises UserError for a combination that this model doesn't have."""
        check_scale(scale)
        if self._swappable is None:
            if (adapter is not ... and adapter is not None) or adapters is not None:
                self._loaded()
            return [None] * rows
        if (adapter is ...) == (adapters is None):
            raise TypeError("this model takes adapters: either adapter=NAME or adapters=[NAME, ...], one per row")
        if adapters is None:
            if adapter is None and scale != 1:
                raise UserError(f"scale is {scale} but no adapter is named: there is nothing to scale.")
            return [adapter] * rows  # type: ignore[list-item]  # not ..., as checked above
        if not self._slots:
            raise UserError(
                "This model runs one adapter per call: name it with adapter=. For one per row, export a model with "
                "loratrf-export --adapters NAME=PATH ..."
            )
        if len(adapters) != rows:
            raise UserError(f"adapters names {len(adapters)} adapters for {rows} prompts: expected one per prompt.")
        return list(adapters)

    def _check(self, prompts: Sequence[Sequence[int]], count: int) -> None:
        self._process.check()
        if foreign := [token for row in prompts for token in row if not 0 <= token < self._vocabulary]:
            raise UserError(f"A prompt has token {foreign[0]}, the model knows 0 to {self._vocabulary - 1}.")
        if empty := [at for at, row in enumerate(prompts) if not len(row)]:
            raise UserError(f"Prompt {empty[0]} is empty: the model needs at least one token to go on from.")
        longest = max(map(len, prompts), default=0)
        if count < 1 or longest + count > self._context:
            raise UserError(
                f"The longest prompt has {longest} tokens and max_new_tokens is {count}; the model's context holds "
                f"{self._context} tokens in all. Shorten the prompt, or ask for fewer new tokens."
            )

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a text, or of a chat through the tokenizer's template. Raises UserError for a bad chat."""
        self._process.check()
        if not isinstance(prompt, str):
            try:
                prompt = self._tokenizer.apply_chat_template(json.dumps(list(prompt)), add_generation_prompt=True)
            except Exception as error:  # plain RuntimeErrors
                raise UserError(
                    f"The chat can't be put through the tokenizer's template: {error}. Expected messages of "
                    '{"role": ..., "content": ...}, and a tokenizer that was saved with a chat template.'
                ) from error
        return list(map(int, self._tokenizer.encode(prompt)))

    def _until_end(self, row: list[int]) -> list[int]:
        end = next((at for at, token in enumerate(row) if token in self._stops), len(row))
        return row[:end]

    def _loaded(self) -> Residents:
        self._process.check()
        if self._swappable is None:
            raise UserError(
                "This model has a fixed adapter, or none, and takes no others. Export it with --swappable base, or "
                "--adapters NAME=PATH ..."
            )
        return self._residents


def _last(row: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Where `tokens` begin in `row` for the last time, None where they don't occur."""
    starts = range(len(row) - len(tokens), -1, -1)
    return next((at for at in starts if list(row[at : at + len(tokens)]) == list(tokens)), None)
