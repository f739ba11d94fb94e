"""What the benchmarks share: their options, models to measure, rounds that are fair, ratios, tables, records.

What is compared runs in turns, in a random order in every round, and a figure is the median of the rounds' own ratios:
a machine whose speed drifts is then unfair to none. This module comes before any library of Hugging Face's in a
script's imports: they read when they are imported that they may not reach for the network.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from loratrf_deploy.bench.rounds import WARM_UP as WARM_UP
from loratrf_deploy.bench.rounds import cpu_name as cpu_name
from loratrf_deploy.bench.rounds import interleaved as interleaved
from loratrf_deploy.bench.rounds import ratio

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))  # minilm, glue and train_glue

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""All linear layers of a LLaMA's decoder layer."""
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""LLaMA-3.2-1B's dimensions, but for the number of layers and of tokens."""
OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"choices": ("bert-base", "minilm")},
    "kind": {"choices": ("lora", "loratrf")},
    "layers": {"type": int, "help": "of 16"},
    "vocabulary": {"type": int, "help": "tokens; LLaMA-3.2 has 128256"},
    "rank": {"type": int, "help": "R = F"},
    "rounds": {"type": int},
    "threads": {"type": int},
    "clock": {"choices": CLOCKS, "help": "cpu, on a busy machine: with --threads 1"},
    "device": {"choices": ("cpu", "cuda")},
    "processes": {"type": int},
    "keep": {"type": Path, "help": "folder for what is made, used again where it is there already"},
    "out": {"type": Path, "help": "also write the figures there, as JSON"},
}


# Options and results.


def parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with those of OPTIONS that `defaults` names; what only one script has, it adds."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        made.add_argument(f"--{name}", default=default, **OPTIONS[name])
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, refused where --clock cpu is to count more than the one thread that it sees."""
    args = made.parse_args()
    if getattr(args, "clock", "wall") == "cpu" and args.threads != 1:
        made.error("--clock cpu counts one thread's time: add --threads 1")
    return args


def save(out: Path | None, result: Any) -> None:
    if out:
        out.write_text(json.dumps(result, default=str, indent=2) + "\n")


def head(columns: Sequence[str]) -> str:
    """The head of a Markdown table, whose first column alone stands left."""
    return f"{line(columns)}\n| --- |{' ---: |' * (len(columns) - 1)}"


def line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    return "\n".join([head(columns), *map(line, rows)])


# Time.


def timed(call: Callable[[], Any], repeats: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, the mean of `repeats`."""
    begin = clock()
    for _ in range(repeats):
        call()
    return (clock() - begin) / repeats


def shuffled(names: Iterable[str], seed: object) -> list[str]:
    order = list(names)
    random.Random(str(seed)).shuffle(order)
    return order


def ratios(times: dict[str, list[float]], reference: str) -> dict[str, float]:
    return {name: ratio(values, times[reference]) for name, values in times.items()}


def parts(times: dict[str, dict[str, list[float]]], reference: str) -> dict[str, dict[str, float]]:
    """{name: {part: seconds by round}} -> by name, each part's median milliseconds and ratio to the reference's."""
    rows: dict[str, dict[str, float]] = {name: {} for name in times}
    for name, row in rows.items():
        for part, values in times[name].items():
            row[f"{part}_ms"] = 1e3 * statistics.median(values)
            if part in times[reference]:
                row[f"{part}_ratio"] = ratio(values, times[reference][part])
    return rows


def session_options(threads: int, pinned: bool = False) -> Any:
    """ONNX Runtime's, quiet; `pinned` as pin_threads() says."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if pinned and threads > 1:  # the workers' cores, counted from 1; core 0 is the caller's
        cores = ";".join(str(thread + 1) for thread in range(1, threads))
        options.add_session_config_entry("session.intra_op_thread_affinities", cores)
    return options


def pin_threads(threads: int) -> None:
    """Thread i to core i: this thread, and PyTorch's once it is imported; ONNX Runtime's are set where they start.

    Left alone, the scheduler puts both threads of one contestant on one core for whole stretches.
    """
    os.environ["GOMP_CPU_AFFINITY"] = f"0-{threads - 1}"
    os.sched_setaffinity(0, {0})


# Processes of their own.


def measured(code: str, *arguments: object) -> tuple[float, float]:
    """(seconds, peak resident MB) of a Python process that runs `code`."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed with {process.returncode}: {error}")
    return seconds, usage.ru_maxrss / 1e3


def measured_export(adapter: Path, base: Path, out: Path, *more: str) -> tuple[float, float]:
    """The same of loratrf-export."""
    code = "import sys; from loratrf_deploy.cli.export import main; sys.exit(main(sys.argv[1:]))"
    return measured(code, "--adapter", adapter, "--base-model", base, "--out", out, *more)


def read_records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (file.read_text().splitlines() if file.exists() else [])]


def append_records(train: Callable[[Any], dict[str, Any]], wanted: list[Any], file: Path, processes: int) -> None:
    """Appends train(run) to `file` for every wanted run, each in a process of one thread, as they end."""
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a plain kill ends the trainings too, as Ctrl-C does
    with get_context("spawn").Pool(processes) as pool:
        for record in pool.imap_unordered(train, wanted):
            text = json.dumps(record, ensure_ascii=False)
            with file.open("a") as lines:
                lines.write(text + "\n")
            print(text, flush=True)


# Bases and adapters.


def make_base(path: Path, model: str) -> Path:
    """BERT-base's shape with random weights, or MiniLM with a random head."""
    import torch
    import transformers

    torch.manual_seed(0)
    if model == "minilm":
        from minilm import base_path

        network = transformers.AutoModelForSequenceClassification.from_pretrained(str(base_path()))
    else:
        network = transformers.BertForSequenceClassification(transformers.BertConfig())
    network.save_pretrained(path)
    return path


def llama(tokens: int, **sizes: Any) -> Any:
    """A LLaMA with random weights of torch's generator, for a tokenizer of byte_tokenizer()."""
    import transformers

    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=tokens, **special, **sizes))


def make_llama(path: Path, layers: int, tokens: int, dtype: str = "bfloat16") -> Path:
    """LLaMA-3.2-1B's dimensions with random weights, `layers` layers, and a tokenizer of single bytes."""
    import torch

    torch.manual_seed(0)
    llama(tokens, num_hidden_layers=layers, **LLAMA_1B).to(getattr(torch, dtype)).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def byte_tokenizer(text: str = "", tokens: int = 259) -> Any:
    """Byte-level BPE: all bytes and three special tokens, and as many pairs of `text` as make up `tokens`."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def adapter_config(kind: str, rank: int, task_type: str) -> Any:
    """PEFT's, alpha = 2R: R = F on an encoder's query and value, or on all linear layers of a language model."""
    import peft

    from loratrf_deploy.peft import LoraTrfConfig

    targets = LINEAR if task_type == "CAUSAL_LM" else ["query", "value"]
    options: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "task_type": task_type}
    return (
        LoraTrfConfig(filter_rank=rank, filter_gamma=1, **options) if kind == "loratrf" else peft.LoraConfig(**options)
    )


def make_adapter(base: Path, path: Path, kind: str, rank: int = 8) -> Path:
    """A random adapter of adapter_config() for the base that make_base() or make_llama() made."""
    import peft
    import torch
    import transformers

    (name,) = transformers.AutoConfig.from_pretrained(base).architectures
    task_type = "CAUSAL_LM" if name.endswith("CausalLM") else "SEQ_CLS"
    adapted = peft.get_peft_model(
        getattr(transformers, name).from_pretrained(base), adapter_config(kind, rank, task_type)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name or "trf_" in name:
                value.copy_(0.02 * torch.randn(value.shape, generator=generator))
    adapted.save_pretrained(str(path))
    return path


def vary_adapter(adapter: Path, path: Path, seed: int) -> Path:
    """Another random adapter like the one that make_adapter() made."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    shutil.copytree(adapter, path)
    file, draw = path / "adapter_model.safetensors", np.random.default_rng(seed)
    noise = {name: 0.02 * draw.standard_normal(value.shape, np.float32) for name, value in load_file(file).items()}
    save_file(noise, file, {"format": "pt"})
    return path
