"""Bodies of requests and answers: OpenAI's where it has one, vLLM's where it has not."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = [
    *("ChatCompletion", "ChatRequest", "Classification", "ClassifyRequest", "Completion", "CompletionRequest"),
    *("Done", "EmbeddingRequest", "Embeddings", "Failure", "Health", "LoadRequest", "Models", "UnloadRequest"),
]

_MOST_INPUTS = 2048


class _Body(BaseModel):
    """A request's: a number is a number and no text of one; fields that we don't know are passed over."""

    model_config = ConfigDict(strict=True)


def _whole(text: str) -> str:
    """JSON has half surrogates, which are no text; tokenizers refuse them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair, which is no text") from error
    return text


Str = Annotated[str, AfterValidator(_whole)]
Text = Annotated[Str, Field(description="a text")]
Ids = Annotated[list[int], Field(min_length=1, description="a text as tokens")]
Texts = Annotated[list[Str], Field(min_length=1, max_length=_MOST_INPUTS)]
IdRows = Annotated[list[Ids], Field(min_length=1, max_length=_MOST_INPUTS)]
Name = Annotated[str, Field(description="the base or an adapter, as /v1/models lists them")]


class EmbeddingRequest(_Body):
    """What is to be embedded."""

    model: Name
    input: Text | Texts | Ids | IdRows
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, description="keep the first so many (Matryoshka)")] | None = None


class ClassifyRequest(_Body):
    """What is to be classified."""

    model: Name
    input: Text | Texts | Ids | IdRows


class _Sampling(_Body):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: (
        Annotated[float, Field(ge=0, le=2, allow_inf_nan=False, description="0, the default: greedy")] | None
    ) = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop: Str | Annotated[list[Str], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def search(self) -> dict[str, Any]:
        """onnxruntime-genai's search options; none: greedy."""
        if not self.temperature:
            return {}
        found: dict[str, Any] = {"do_sample": True, "temperature": self.temperature}
        if self.top_p is not None:
            found["top_p"] = self.top_p
        if self.seed is not None:
            found["random_seed"] = self.seed
        return found


class CompletionRequest(_Sampling):
    """What is to be gone on from."""

    model: Name
    prompt: Text | Texts | Ids | IdRows
    echo: bool | None = None
    logprobs: None = Field(default=None, description="not given here")


class Part(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: Str


class Message(_Body):
    """A turn of a chat."""

    role: Str
    content: Str | list[Part]

    @property
    def text(self) -> str:
        """Its parts as one."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Sampling):
    """What is to be answered."""

    model: Name
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class LoadRequest(_Body):
    """A file to be an adapter."""

    lora_name: str
    lora_path: Annotated[str, Field(description="of an .onnx_adapter, from --adapters-dir")]
    load_inplace: Annotated[bool, Field(description="in the place of one of that name")] = False


class UnloadRequest(_Body):
    """An adapter to be forgotten."""

    lora_name: str


class Done(BaseModel):
    """What was done."""

    message: str


class Health(BaseModel):
    """That the server answers."""

    status: Literal["ok"]


class Model(BaseModel):
    """The base, or an adapter, whose `parent` is the base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None


class Models(BaseModel):
    """All that a request may name."""

    object: Literal["list"]
    data: list[Model]


class Usage(BaseModel):
    """Tokens that were read, made, and both."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class EmbeddingItem(BaseModel):
    """Of one text; base64 is of float32, little-endian."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """Of all texts, in their order."""

    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: Usage


class ClassItem(BaseModel):
    """Of one text: the likeliest label, and every label's probability."""

    index: int
    label: str
    probs: list[float]
    num_classes: int
    labels: list[str]


class Classification(BaseModel):
    """Of all texts, in their order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassItem]
    usage: Usage


class Choice(BaseModel):
    """What follows a prompt."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Completion(BaseModel):
    """Of all prompts, in their order."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Said(BaseModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """The one answer."""

    index: int
    message: Said
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    """Of a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Fault(BaseModel):
    """In OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    """Why there is no answer."""

    error: Fault
