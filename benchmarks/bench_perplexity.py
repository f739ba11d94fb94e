"""What each deployment of a language model costs in quality: perplexity of a small LLaMA that is trained here.

    python benchmarks/bench_perplexity.py [--steps 300]

Base: 4 layers, 256 wide, 1024 byte-level tokens, trained on modules of Python's standard library; then LoRATRF and LoRA
adapters (R = F = 8, all linear layers) on the prose of its help(). Perplexity is on
20000 characters of that prose that no training sees.
"""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import common
import peft
import torch
import transformers

from loratrf_deploy.export import ExportOptions, export_adapter
from loratrf_deploy.parity.perplexity import perplexities
from loratrf_deploy.pytorch.quiet import quiet

DEPLOYMENTS = [("separate", "none"), ("merged", "none"), ("separate", "int8"), ("merged", "int8")]
DEPLOYMENTS += [("separate", "int4"), ("merged", "int4")]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of training the base; the adapters take half")
    args = parser.parse_args()
    torch.manual_seed(0)
    code, prose = texts()
    cut = len(prose) * 9 // 10
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, text = folder / "base", folder / "text.txt"
        text.write_text(prose[cut : cut + 20000])
        tokenizer = make_tokenizer(code)
        model = make_model(len(tokenizer))
        train(model, torch.tensor(tokenizer(code)["input_ids"]), args.steps, 1e-3)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        columns = [
            deployed(folder, base, kind, tokenizer, prose[:cut], text, args.steps) for kind in ("loratrf", "lora")
        ]
    head = ["deployment", "LoRATRF: perplexity", "loss, nats", "LoRA: perplexity", "loss, nats"]
    rows = (
        [a.name, f"{a.perplexity:.4f}", f"{a.loss:+.5f}", f"{b.perplexity:.4f}", f"{b.loss:+.5f}"]
        for a, b in zip(*columns, strict=True)
    )
    print(common.table(head, rows))


def deployed(folder: Path, base: Path, kind: str, tokenizer: Any, prose: str, text: Path, steps: int) -> list[Any]:
    """Trains an adapter; its perplexity in PyTorch, with and without it, and in every deployment."""
    config = common.adapter_config(kind, 8, "CAUSAL_LM")
    with quiet():
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
        train(model, torch.tensor(tokenizer(prose)["input_ids"]), steps // 2, 2e-3)
        model.save_pretrained(str(folder / kind))
        models = []
        for mode, quantize in DEPLOYMENTS:
            models.append(folder / f"{kind}-{mode}-{quantize}" / "model.onnx")
            export_adapter(folder / kind, models[-1], ExportOptions(base_model=base, mode=mode, quantize=quantize))
        rows = perplexities(text, folder / kind, models, base)
    labels = ["PyTorch", "PyTorch without the adapter"]
    labels += [f"{mode}, {quantize if quantize != 'none' else 'float32'}" for mode, quantize in DEPLOYMENTS]
    return [type(row)(label, row.perplexity, row.loss) for row, label in zip(rows, labels, strict=True)]


def texts() -> tuple[str, str]:
    """Modules of Python's standard library, and the prose of its help()."""
    library = Path(sysconfig.get_paths()["stdlib"])
    code = "\n".join(path.read_text() for path in sorted(library.glob("*.py"))[:60])
    return code, "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def train(model: Any, tokens: torch.Tensor, steps: int, rate: float) -> None:
    """AdamW on batches of 8 x 128 of `tokens`, drawn from torch's generator; one cycle of rates, `rate` at the peak."""
    model.train()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - 128, (8,)).tolist()
        batch = torch.stack([tokens[start : start + 128] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def make_model(vocabulary: int) -> Any:
    return common.llama(
        vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )


def make_tokenizer(text: str) -> Any:
    return common.byte_tokenizer(text[:1000000], 1024)


if __name__ == "__main__":
    main()
