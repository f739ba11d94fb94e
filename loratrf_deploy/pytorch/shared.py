"""One base for several tasks: a trunk that runs once, and each task's head behind it, as the task's class has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError, some
from ..formats.embedding import SENTENCE_EMBEDDING
from ..formats.tasks import TaskPart
from .base import BaseModel, Outputs

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FAMILIES", "SEVERAL", "named_as", "share_trunk"]

FAMILIES = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert")
"""The model types whose heads read nothing but what the trunk gives, and the model's own inputs."""
SEVERAL = " + "
"""Between the tasks of a model of several."""

_PARTS = {
    "text-classification": ("sequence", {"logits": "logits"}),
    "token-classification": ("token", {"logits": "token_logits"}),
    "question-answering": ("answer", {"start_logits": "start_logits", "end_logits": "end_logits"}),
    "feature-extraction": ("", {"last_hidden_state": "last_hidden_state"}),
}
"""Task -> what its head is called in the model, and its outputs by their names in the task's own class."""


def share_trunk(bases: Mapping[str, BaseModel]) -> tuple[BaseModel, dict[str, TaskPart], str]:
    """The models of several tasks, by task, as one; each task's part of it, and what its trunk is called.

    The trunk is the one with the most parameters: a pooler is used by some heads alone. Parameters, those that are
    untrained too, go by their names in the one model. Requires models of one checkpoint, which are changed. Raises
    UserError where a task, or the family, has no such heads.
    """
    _check_shares(bases)
    trunks = {task: base.model.base_model for task, base in bases.items()}
    widest = max(trunks, key=lambda task: len(trunks[task].state_dict()))
    heads = {task: base.model for task, base in bases.items() if base.model is not trunks[task]}
    name = next((f"{head.base_model_prefix}." for head in heads.values()), "trunk.")
    given = set(trunks[widest].state_dict())
    parts, parameters, untrained = {}, dict[str, tuple[int, ...]](), set[str]()
    for task, base in sorted(bases.items(), key=lambda item: item[0] != widest):
        head, outputs = _PARTS[task]
        outputs = outputs | ({SENTENCE_EMBEDDING: SENTENCE_EMBEDDING} if base.embedding is not None else {})
        own = name if task in heads else ""
        lacks = tuple(own + key for key in sorted(given - set(trunks[task].state_dict())))
        parts[task] = TaskPart(outputs, own, f"{head}." if task in heads else "", lacks)
        parameters |= {parts[task].path(key, name): shape for key, shape in base.parameters.items()}
        # A pooler that one class found no weights for is another's own.
        untrained |= {parts[task].path(key, name) for key in base.untrained}
    parts = {task: parts[task] for task in bases}
    first = next(iter(bases.values()))
    embedding = next((base.embedding for base in bases.values() if base.embedding is not None), None)
    model = _with_heads(name.rstrip("."), trunks[widest], heads, parts)
    chosen = tuple(output for part in parts.values() for output in part.outputs.values())
    one = replace(
        first,
        model=model,
        task=SEVERAL.join(bases),
        untrained=frozenset(untrained),
        parameters=parameters,
        embedding=embedding,
        chosen=chosen,
    )
    return one, parts, name


def _check_shares(bases: Mapping[str, BaseModel]) -> None:
    kinds = {base.model.config.model_type for base in bases.values()}
    foreign = [task for task in bases if task not in _PARTS]
    if not foreign and kinds <= set(FAMILIES):
        return
    what = f"a base of model_type {some(sorted(kinds))}" if not foreign else f"adapters for {some(foreign)}"
    raise UserError(
        f"The adapters are for {' and '.join(bases)}: a model of several tasks can't be made of {what}. Expected "
        f"{', '.join(_PARTS)} on one base of {', '.join(FAMILIES)}. Export the adapters of each task apart."
    )


def named_as(outputs: Outputs, part: TaskPart | None) -> Outputs:
    """What a model of one task gave, by the names that a model of several, of which it is a `part`, has for it."""
    if part is None:
        return outputs
    return {name: outputs[own] for own, name in part.outputs.items() if own in outputs}


def _with_heads(name: str, trunk: Any, heads: Mapping[str, Any], parts: Mapping[str, TaskPart]) -> nn.Module:
    """outputs = each head(trunk(inputs)): `heads` are whole models by task, which get a trunk that was run already.

    So their own forward computes what is behind it, whatever the family does there.
    """
    from torch import nn

    class Given(nn.Module):
        """Stands where a head's model has its trunk, and gives what the shared one gave."""

        def __init__(self) -> None:
            super().__init__()
            self.outputs: list[Any] = []

        def forward(self, *inputs: Any, **options: Any) -> Any:
            return self.outputs[-1]

    class SharedTrunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = trunk.config
            self.given = Given()
            self.add_module(name, trunk)
            for task, head in heads.items():
                setattr(head, head.base_model_prefix, self.given)
                self.add_module(parts[task].head.rstrip("."), head)

        def forward(self, **inputs: Any) -> dict[str, Any]:
            outputs = self.get_submodule(name)(**inputs)
            found = {"last_hidden_state": outputs.last_hidden_state}
            self.given.outputs.append(outputs)
            try:
                for task in heads:
                    part = parts[task]
                    found |= named_as(dict(self.get_submodule(part.head.rstrip("."))(**inputs)), part)
            finally:
                self.given.outputs.pop()
            return found

        def get_input_embeddings(self) -> Any:
            return trunk.get_input_embeddings()

    return SharedTrunk().eval()
