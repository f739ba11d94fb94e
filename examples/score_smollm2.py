"""Is what was trained what is deployed? Dev scores of the demo's int4 export beside PyTorch's on the same rows.

    python examples/demo_llm.py && python examples/score_smollm2.py [--model demo-out/llm-mixed] [--rows 200] [--record]

Every batch holds rows of all adapters. An answer counts when it is the right word and nothing else; PyTorch is PEFT in
float32, by which of the two words is likelier. --record writes the figures beside each adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import demo_llm
import glue
import instructions
import numpy as np
import smollm2
import train_smollm2
import tuning
from numpy.typing import NDArray

from loratrf_deploy import GenerationSession

BATCH = 12


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo-out/llm-mixed"), help="as demo_llm.py exported it")
    parser.add_argument("--rows", type=int, default=200, help="dev rows of each task, from the first on")
    parser.add_argument("--data", type=Path, default=glue.DATA)
    parser.add_argument("--record", action="store_true", help="into results.json and the model cards")
    return parser.parse_args()


def answers(session: GenerationSession, asked: list[tuple[str, Any]]) -> list[str]:
    """What each (adapter, chat) gets from a mixed model, short ones in a batch with short ones."""
    lengths = [len(session.encode(chat)) for _, chat in asked]
    order = np.argsort(lengths, kind="stable")
    given = [""] * len(asked)
    for chunk in np.array_split(order, range(BATCH, len(order), BATCH)):
        names, chats = zip(*(asked[index] for index in chunk), strict=True)
        for index, text in zip(chunk, session.generate(chats, adapters=names, max_new_tokens=3), strict=True):
            given[index] = text
    return given


def guesses(task: str, texts: list[str], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 or 1 for each answer; one that is neither of the task's words is wrong."""
    words = instructions.INSTRUCTIONS[task].words
    known = np.array([words.index(text) if text in words else -1 for text in texts])
    return np.where(known < 0, 1 - labels, known)


def score(options: argparse.Namespace) -> dict[str, Any]:
    import transformers
    from peft import PeftModel

    import loratrf_deploy.peft  # registers LORATRF with PEFT

    assert loratrf_deploy.peft
    results = {name: json.loads((path / "results.json").read_text()) for name, path in smollm2.ADAPTERS.items()}
    rows = {name: glue.read(options.data, found["task"], "dev")[: options.rows] for name, found in results.items()}
    asked = [
        (name, instructions.INSTRUCTIONS[results[name]["task"]].chat(*glue.texts(row)))
        for name, own in rows.items()
        for row in own
    ]
    given = answers(demo_llm.opened(options.model), asked)
    base = smollm2.base_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, padding_side="left")
    figures = {}
    for name, own in rows.items():
        task, labels = results[name]["task"], np.array([row["label"] for row in own])
        texts = [text for (who, _), text in zip(asked, given, strict=True) if who == name]
        shipped = guesses(task, texts, labels)
        model = PeftModel.from_pretrained(train_smollm2.load(base, "float32"), smollm2.ADAPTERS[name]).eval()
        trained = train_smollm2.guesses(model, tokenizer, task, own)
        figures[name] = {
            "export": "int4, rows of all adapters in each batch",
            "rows": len(own),
            **tuning.rounded(glue.scores(shipped, labels)),
            "pytorch": tuning.rounded(glue.scores(trained, labels)),
            "changed": int(np.count_nonzero(shipped != trained)),
            "neither_word": sum(text not in instructions.INSTRUCTIONS[task].words for text in texts),
        }
        if options.record:
            found = results[name] | {"deployed": figures[name]}
            tuning.write(found, train_smollm2.model_card(found), smollm2.ADAPTERS[name])
    return figures


def main() -> int:
    options = arguments()
    return tuning.main(lambda: score(options))


if __name__ == "__main__":
    sys.exit(main())
