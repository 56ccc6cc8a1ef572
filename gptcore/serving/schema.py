"""The bodies of requests and responses, as OpenAI names them, with the limits of each field.

A field that is not here is refused: nothing is accepted and ignored. So is a value of another type, such as true or "1"
for a number.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gptcore.serving.limits import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_QUESTION_LENGTH,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TEXT_LENGTH,
    MAX_TEXTS,
    MAX_TOP_LOGPROBS,
)

LARGEST = 2**31 - 1  # of a count; what the model allows is less, and checked when the model is known
TokenId = Annotated[int, Field(ge=0, le=LARGEST)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
Long = Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]  # is read in windows, so the model's positions do not limit it
Longs = Annotated[list[Long], Field(min_length=1, max_length=MAX_TEXTS)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False


class Sampling(Body):
    """What completions and chat completions share. top_k and repetition_penalty are not OpenAI's."""

    model: str = Field(description="the name of the model, or of an adapter: see /v1/models")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="choices for each prompt, each with a seed of its own")
    temperature: float = Field(1.0, ge=0, le=2, description="divides the logits; 0 takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=LARGEST)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="the text ends before the first of these strings"
    )
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_LOGIT_BIAS, description="added to the logits, by token id"
    )
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not re.fullmatch("0|[1-9][0-9]{0,8}", key):
                raise ValueError(f"a key of logit_bias should be a token id, such as '50256', not {ascii(key)[:40]}")
        return value

    @model_validator(mode="after")
    def _stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(Sampling):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="a text, texts, token ids, or lists of token ids; an empty text is the start of a document")
    max_tokens: int | None = Field(16, ge=0, le=LARGEST, description="0 needs echo; null means 16")
    echo: bool = Field(False, description="the prompt is part of the text, and of its logprobs")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="alternatives to each token")

    @model_validator(mode="after")
    def _something(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: should be 1 or more without echo, not 0")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=LARGEST, description="null means as many as there are positions")
    max_completion_tokens: int | None = Field(None, ge=1, le=LARGEST, description="OpenAI's new name of max_tokens")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="alternatives; needs logprobs")

    @model_validator(mode="after")
    def _once(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same; give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class EmbeddingRequest(Body):
    model: str
    input: (
        str
        | Texts
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_TEXTS)]
    )
    encoding_format: Literal["float", "base64"] = "float"


class TokenizeRequest(Body):
    prompt: str
    return_token_strs: bool = Field(False, description="also what each token spells")


class DetokenizeRequest(Body):
    tokens: Annotated[list[TokenId], Field(max_length=1 << 17)]


class ClassifyRequest(Body):
    model: str
    input: Long | Longs
    top_k: int | None = Field(None, ge=1, le=LARGEST, description="labels of each text; null means all")


class EntitiesRequest(Body):
    model: str
    input: Long | Longs


class Question(Body):
    question: str = Field(min_length=1, max_length=MAX_QUESTION_LENGTH)
    context: str = Field(min_length=1, max_length=MAX_TEXT_LENGTH)


class AnswerRequest(Body):
    model: str
    input: Question | Annotated[list[Question], Field(min_length=1, max_length=MAX_TEXTS)]
    top_k: int = Field(1, ge=1, le=20, description="answers to each question")


# ---- responses ---------------------------------------------------------------------------------------------------


class TokenDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Alternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Label(BaseModel):
    label: str
    score: float


class Classified(BaseModel):
    index: int
    labels: list[Label] = Field(description="the likeliest first")


class Classification(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Classified]


class Entity(BaseModel):
    entity_group: str
    score: float
    word: str
    start: int = Field(description="characters, in the text")
    end: int


class Found(BaseModel):
    index: int
    entities: list[Entity]


class EntityList(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Found]


class Answer(BaseModel):
    answer: str = Field(description="part of the context; empty if it has no answer")
    score: float
    start: int = Field(description="characters, in the context")
    end: int


class Answered(BaseModel):
    index: int
    answers: list[Answer] = Field(description="the likeliest first")


class AnswerList(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Answered]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gptcore"
    root: str = Field(description="the name of the base, of an adapter")
    max_model_len: int
    vocab_size: int
    routes: list[str] = Field(description="what the model does here")
    chat_template: str | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(BaseModel):
    prompt: str


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    details: dict[str, Any] = {}
