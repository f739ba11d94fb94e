"""GLUE's tasks as a language model is asked them: a chat of two messages, answered by one word."""

from __future__ import annotations

from dataclasses import dataclass

TRIED = {"sst2": "a gripping film that never lets go", "mrpc": "He sold the house in May .\nIn May he sold the house ."}
"""A text for each task, of no data set."""


@dataclass(frozen=True)
class Instruction:
    """The system's message, and the answers for label 0 and 1, each of which is one token."""

    system: str
    words: tuple[str, str]

    def chat(self, *texts: str) -> list[dict[str, str]]:
        """The messages to a model. Without a system's message SmolLM2's template puts a longer one of its own in."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": "\n".join(texts)}]


INSTRUCTIONS = {
    "sst2": Instruction("Positive or negative?", ("Negative", "Positive")),
    "mrpc": Instruction("Same meaning? Yes or no.", ("No", "Yes")),
}
