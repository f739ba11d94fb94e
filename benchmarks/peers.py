"""A deployment of a language model in a process of its own, timed when asked: ours, llama.cpp's, OpenVINO GenAI's.

    python benchmarks/peers.py ENGINE MODEL [ADAPTER ...] [--folder FOLDER] [--weights int4|float32] [--threads 1]
                               [--clock cpu|wall]

bench_llm.py starts it, with the Python of the engine's own environment, which `--peers` names. They are made so:

    python3 -m venv llama && llama/bin/pip install llama-cpp-python gguf safetensors ml_dtypes regex rich

    python3 -m venv openvino && openvino/bin/pip install torch==2.13.0 'optimum-intel[openvino]' openvino-genai \
        ml_dtypes regex rich
    openvino/bin/pip uninstall --yes torchvision    # of another torch, and not needed

| ENGINE | MODEL | ADAPTER |
| --- | --- | --- |
| genai | folder that loratrf-export wrote | its .onnx_adapter files, of which a run activates one |
| genai-rows | folder of a model of several adapters | none: they are in its slots, and each row has its own |
| llama.cpp, openvino | the base, a folder of Hugging Face's | PEFT's folders, LoRA |

What a peer loads is made in FOLDER, where it isn't there: GGUF with all weights in Q4_0; what optimum-cli makes with
int4 weights, symmetric, in groups of 32, the head and the embeddings too. Both are what int4 is in our exports.

It prints a line of JSON, {"version": ...}, and then answers each such line {"prompt": [[token, ...], ...], "tokens": N,
"adapters": [number of an adapter or -1, one a row]} with {"prefill": seconds, "decode": seconds of a step of all rows,
"swap": seconds of the call that makes another adapter active, which the prefill includes; null where there is no such
call, "tokens": [[N + 1 tokens], ...]}, or with {"error": ...}.
Rows under several adapters run as one batch, where the engine can; else one adapter's rows after the other's, and the
seconds add up, unless "together": true insists.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import common
import numpy as np
from numpy.typing import NDArray
from peer_models import write_gguf, write_gguf_adapter, write_openvino

CLOCKS = common.CLOCKS | {"cpu": time.process_time}
"""An engine may work in threads of its own: the whole process counts."""


@dataclass(frozen=True)
class Options:
    folder: Path
    weights: str
    threads: int
    clock: Callable[[], float]


def once(path: Path, write: Callable[[Path], None]) -> None:
    """Has `path` written where it isn't there: aside, and then moved, so that what is there is whole."""
    if not path.exists():
        aside = path.with_name(f"{path.name}.part")
        write(aside)
        aside.rename(path)


@dataclass
class Run:
    """Seconds, and what came out: tokens (rows, N + 1)."""

    prefill: float
    decode: float
    tokens: list[list[int]]
    swap: float | None = None


class Engine(Protocol):
    version: str
    mixes: bool
    """Whether each row of a batch may have an adapter of its own."""

    def __init__(self, model: Path, adapters: list[Path], options: Options) -> None: ...

    def run(self, prompt: NDArray[np.int32], tokens: int, adapters: list[int]) -> Run: ...


class Genai:
    """ONNX Runtime GenAI with a folder of ours. Threads stand in its genai_config.json."""

    mixes = False

    def __init__(self, model: Path, adapters: list[Path], options: Options) -> None:
        import onnxruntime_genai as og

        self._og, self._clock = og, options.clock
        self.version = f"onnxruntime-genai {og.__version__}"
        self._model = og.Model(str(model))
        self._adapters = og.Adapters(self._model) if adapters else None
        for number, path in enumerate(adapters):
            self._adapters.load(str(path), str(number))

    def run(self, prompt: NDArray[np.int32], tokens: int, adapters: list[int]) -> Run:
        rows, length = prompt.shape
        params = self._og.GeneratorParams(self._model)
        end = length + tokens + 1
        params.set_search_options(max_length=end, min_length=end, do_sample=False, batch_size=rows)
        generator = self._og.Generator(self._model, params)
        ids = np.array(adapters, np.int64)  # read in place: must outlive the generator
        if self.mixes:
            generator.set_model_input("adapter_ids", ids)
        swap = None
        if self._adapters is not None and adapters[0] >= 0:
            active = self._adapters, str(adapters[0])
            swap = common.timed(lambda: generator.set_active_adapter(*active), clock=self._clock)
        prefill = common.timed(lambda: generator.append_tokens(prompt), clock=self._clock)
        generator.generate_next_token()  # takes the token that the prefill's logits say
        decode = common.timed(generator.generate_next_token, tokens, self._clock)
        made = [generator.get_sequence(row)[length:].tolist() for row in range(rows)]
        return Run(prefill + (swap or 0), decode, made, swap)


class GenaiRows(Genai):
    mixes = True


class LlamaCpp:
    """llama.cpp through the C API that llama-cpp-python wraps. A context adds its adapters up, for all rows."""

    mixes = False

    def __init__(self, model: Path, adapters: list[Path], options: Options) -> None:
        import llama_cpp

        self._api, self._options = llama_cpp, options
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        file = options.folder / f"{options.weights}.gguf"
        once(file, lambda aside: write_gguf(model, aside, options.weights))
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp doesn't load {file}")
        self._adapters = [self._adapter(model, path) for path in adapters]
        self._tokens = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._contexts: dict[tuple[int, int], Any] = {}

    def _adapter(self, model: Path, adapter: Path) -> Any:
        file = self._options.folder / f"{adapter.name}.gguf"
        once(file, lambda aside: write_gguf_adapter(model, adapter, aside))
        loaded = self._api.llama_adapter_lora_init(self._model, str(file).encode())
        if not loaded:
            raise RuntimeError(f"llama.cpp doesn't load the adapter {file}")
        return loaded

    def _context(self, rows: int, length: int) -> Any:
        length = -(-length // 256) * 256  # one for requests that differ little
        if (rows, length) not in self._contexts:
            params = self._api.llama_context_default_params()
            params.n_ctx, params.n_seq_max = rows * length, rows
            params.n_batch = params.n_ubatch = rows * length
            params.n_threads = params.n_threads_batch = self._options.threads
            context = self._api.llama_init_from_model(self._model, params)
            if not context:
                raise RuntimeError(f"llama.cpp makes no context for {rows} rows of {length} tokens")
            self._contexts[rows, length] = context
        return self._contexts[rows, length]

    def run(self, prompt: NDArray[np.int32], tokens: int, adapters: list[int]) -> Run:
        rows, length = prompt.shape
        context = self._context(rows, length + tokens + 1)
        self._api.llama_memory_clear(self._api.llama_get_memory(context), True)
        clock, batch = self._options.clock, self._api.llama_batch_init(prompt.size, 0, 1)
        swap = common.timed(lambda: self._activate(context, sorted({*adapters} - {-1})), clock=clock)
        made = [prompt]

        def step() -> None:
            made.append(self._decode(context, batch, made[-1], sum(part.shape[1] for part in made[:-1])))

        prefill = common.timed(step, clock=clock)
        decode = common.timed(step, tokens, clock)
        self._api.llama_batch_free(batch)
        return Run(prefill + swap, decode, np.hstack(made[1:]).tolist(), swap if self._adapters else None)

    def _activate(self, context: Any, numbers: list[int]) -> None:
        handles = (self._api.llama_adapter_lora_p_ctypes * len(numbers))(*(self._adapters[at] for at in numbers))
        scales = (ctypes.c_float * len(numbers))(*[1.0] * len(numbers))
        if status := self._api.llama_set_adapters_lora(context, handles, len(numbers), scales):
            raise RuntimeError(f"llama_set_adapters_lora returned {status}")

    def _decode(self, context: Any, batch: Any, ids: NDArray[np.int32], seen: int) -> NDArray[np.int32]:
        """Runs `ids` (rows, T) behind `seen` tokens; returns the token that follows each row, (rows, 1)."""
        rows, length = ids.shape
        batch.n_tokens = ids.size
        for at, token in enumerate(ids.ravel().tolist()):
            row, position = divmod(at, length)
            batch.token[at], batch.pos[at] = token, seen + position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
            batch.logits[at] = position == length - 1
        if status := self._api.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        last = (self._api.llama_get_logits_ith(context, (row + 1) * length - 1) for row in range(rows))
        return np.array([[np.ctypeslib.as_array(logits, (self._tokens,)).argmax()] for logits in last], np.int32)


class OpenVino:
    """OpenVINO GenAI's continuous batching, which its LLMPipeline is made of; the cache is 8 bit wide by default."""

    mixes = False

    def __init__(self, model: Path, adapters: list[Path], options: Options) -> None:
        import openvino
        import openvino_genai

        self._ov, self._genai, self._clock = openvino, openvino_genai, options.clock
        self.version = f"openvino-genai {openvino_genai.__version__}"
        folder = options.folder / f"openvino-{options.weights}"
        once(folder, lambda aside: write_openvino(model, aside, options.weights))
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_batched_tokens = 1, 4096  # GB; a prefill is one step
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": options.threads}
        if options.weights == "float32":
            properties |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self._adapters = []
        for path in adapters:
            config = json.loads((path / "adapter_config.json").read_text())
            file = openvino_genai.Adapter(str(path / "adapter_model.safetensors"))
            self._adapters.append((file, config["lora_alpha"] / config["r"]))
        if adapters:
            properties["adapters"] = self._config(1, *range(len(adapters))).adapters
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(folder), scheduler_config=scheduler, device="CPU", properties=properties
        )
        self._requests = 0

    def _config(self, tokens: int, *adapters: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        if self._adapters:
            config.adapters = self._genai.AdapterConfig()
            for number in adapters:
                if number >= 0:
                    config.adapters.add(*self._adapters[number])
        return config

    def run(self, prompt: NDArray[np.int32], tokens: int, adapters: list[int]) -> Run:
        rows = [self._ov.Tensor(row[None].astype(np.int64)) for row in prompt]
        one, all_ = ([self._config(count, number) for number in adapters] for count in (1, tokens + 1))
        # generate() alone makes adapters active; they stay so for the requests that follow, which run step by step.
        prefill = common.timed(lambda: self._pipeline.generate(rows, one), clock=self._clock)
        handles = []
        for row, config in zip(rows, all_, strict=True):
            handles.append(self._pipeline.add_request(self._requests, row, config))
            self._requests += 1
        self._pipeline.step()
        decode = common.timed(self._pipeline.step, tokens, self._clock)
        return Run(prefill, decode, [list(handle.read_all()[0].generated_ids) for handle in handles])


ENGINES: dict[str, type[Engine]] = {
    "genai": Genai,
    "genai-rows": GenaiRows,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
}
PEERS = ("llama.cpp", "openvino")


# Answers.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapters", type=Path, nargs="*", metavar="adapter")
    parser.add_argument("--folder", type=Path, help="for what is made of the model; default: one that is deleted")
    parser.add_argument("--weights", choices=("int4", "float32"), default="int4", help="of a peer's base")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    args = parser.parse_args()
    # Libraries print as they please: the protocol keeps stdout to itself, and what they print goes to stderr.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        options = Options(folder, args.weights, args.threads, CLOCKS[args.clock])
        engine = ENGINES[args.engine](args.model, args.adapters, options)
        print(json.dumps({"version": engine.version}), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(engine, json.loads(line))), file=out, flush=True)


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """What the engine says to a request as the file's docstring has it."""
    prompt, tokens, adapters = np.array(request["prompt"], np.int32), request["tokens"], request["adapters"]
    try:
        if engine.mixes or request.get("together") or len({*adapters}) == 1:
            return vars(engine.run(prompt, tokens, adapters))
        made: list[list[int]] = [[] for _ in adapters]
        prefill = decode = 0.0
        for adapter in sorted({*adapters}):
            rows = [row for row, own in enumerate(adapters) if own == adapter]
            run = engine.run(prompt[rows], tokens, [adapter] * len(rows))
            prefill, decode = prefill + run.prefill, decode + run.decode
            for row, own in zip(rows, run.tokens, strict=True):
                made[row] = own
        return vars(Run(prefill, decode, made))
    except Exception as error:  # each engine raises its own
        return {"error": " ".join(str(error).split())}


# Questions.


class Process:
    """peers.py under `python` with `arguments`, until closed."""

    def __init__(self, python: str | Path, arguments: Iterable[object]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._command = [str(python), str(Path(__file__).resolve()), *map(str, arguments)]
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        try:
            self.version: str = self._read()["version"]
        except BaseException:
            self.close()
            raise

    def ask(
        self, prompt: Sequence[Sequence[int]], tokens: int, adapters: Sequence[int], *, together: bool = False
    ) -> dict[str, Any]:
        """The answer. RuntimeError with the engine's own words where it refuses."""
        assert self._process.stdin is not None
        request = {"prompt": prompt, "tokens": tokens, "adapters": adapters, "together": together}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._read()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._errors.seek(0)
        raise SystemExit(f"{' '.join(self._command[:4])} ... ended:\n{self._errors.read()[-2000:]}")

    def close(self) -> None:
        self._process.kill()  # it has nothing to put away
        self._process.communicate()
        self._errors.close()


def mixed_rows(ask: Callable[..., dict[str, Any]], prompt: list[int], pair: tuple[int, int] = (0, 1)) -> str:
    """What becomes of a batch whose two rows, of the same prompt, ask for an adapter each: tried, in words."""
    count = 16

    def tokens(first: int, second: int) -> list[list[int]]:
        return ask([prompt, prompt], count, [first, second], together=True)["tokens"]

    def alike(row: list[int], other: list[int]) -> int:
        return next((at for at, (a, b) in enumerate(zip(row, other, strict=True)) if a != b), len(row))

    # Batches of one size: kernels differ with it, and their rounding may decide a greedy choice.
    alone = [tokens(number, number)[0] for number in pair]
    if alone[0] == alone[1]:
        return "can't be told: both give the same tokens"
    try:
        rows = tokens(*pair)
    except RuntimeError as error:
        return f"refused: {error}"
    if rows[0] == rows[1]:
        whose = dict(zip(map(tuple, alone), ("the first row's", "the second row's"), strict=True))
        return f"no error, and both rows have {whose.get(tuple(rows[0]), 'what neither has alone')}"
    # Rounding differs with the rows beside a row too, and int8 activations make much of it.
    own = [alike(row, alone[at]) for at, row in enumerate(rows)]
    if all(own[at] > alike(row, alone[1 - at]) for at, row in enumerate(rows)):
        return f"each row has its own (first {min(own)} of {count + 1} tokens)"
    return "no error, and rows that are not their own"


if __name__ == "__main__":
    main()
