"""What clients send: OpenAI's fields, and vLLM's names for what goes beyond; what is not known is refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

#: Most sequences of one request, texts of one embedding request, stop texts, and alternatives of a token.
MOST_SEQUENCES, MOST_INPUTS, MOST_STOPS, MOST_ALTERNATIVES = 256, 2048, 16, 20
_NO_JSON = "the body holds text that is no valid Unicode, or is nested too deeply"

Number = FiniteFloat
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)]
ManyTokens = Annotated[list[Tokens], Field(min_length=1, max_length=MOST_INPUTS)]


class Part(BaseModel):
    """A JSON object whose fields are all known."""

    model_config = ConfigDict(extra="forbid")


class Body(Part):
    """The body of a request."""

    model: str | None = Field(None, max_length=2000)
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        """Refuse what no encoder takes: lone surrogates, and objects that are nested without end."""
        if not isinstance(value, dict):
            return value  # which is refused for that
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except (UnicodeEncodeError, RecursionError, ValueError):
            raise ValueError(_NO_JSON) from None
        return value

    @staticmethod
    def fields_by_name() -> list[str]:
        """Return the names of all fields that some request has."""
        found: dict[str, None] = {}
        waiting: list[type[BaseModel]] = [Body]
        while waiting:
            cls = waiting.pop()
            found |= dict.fromkeys(cls.model_fields)
            waiting += cls.__subclasses__()
        return list(found)


class StreamOptions(Part):
    """Whether a stream ends with the tokens that it used; `include_obfuscation` is taken and means nothing here."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(Part):
    """A schema that the answer must keep to."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Part):
    """What the answer must keep to, under vLLM's newer names."""

    json_: dict[str, Any] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Generating(Body):
    """What chats and completions have in common."""

    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    temperature: Number | None = Field(None, ge=0, le=1000)
    top_p: Number | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, gt=0, le=1000)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[FiniteFloat, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, lt=2**31)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=MOST_SEQUENCES)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    return_token_ids: bool | None = None
    deadline: Number | None = Field(None, gt=0, description="Seconds within which the first token is of use.")
    # taken since clients send them, without effect on an answer
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionBody(Generating):
    """A text or tokens to continue; several make several choices."""

    prompt: str | Tokens | Texts | ManyTokens
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    best_of: int | None = Field(None, ge=1, le=MOST_SEQUENCES)
    suffix: None = None
    add_special_tokens: bool = True


class TextPart(Part):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Part):
    """A function with its arguments as JSON."""

    name: str
    arguments: str = "{}"


class ToolCall(Part):
    """A call that the assistant made in an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Part):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # fields of an answer, which clients send back as they got it
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    reasoning_content: str | None = None


class Function(Part):
    """A function that the assistant may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    """A tool; only functions are known."""

    type: Literal["function"] = "function"
    function: Function


class FunctionName(Part):
    """The name of a function."""

    name: str


class NamedTool(Part):
    """The one tool that must be called."""

    type: Literal["function"] = "function"
    function: FunctionName


class ChatBody(Generating):
    """A conversation to continue."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(None, ge=0, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    tools: Annotated[list[Tool], Field(max_length=256)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class EmbeddingBody(Body):
    """Texts or tokens whose meaning is wanted as vectors."""

    input: str | Tokens | Texts | ManyTokens
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, ge=1)
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    return_multivector: bool = Field(False, description="A vector for each token, where the model is a retriever.")
    add_special_tokens: bool = True


class Document(Part):
    """A text, as an object."""

    text: str


class RerankBody(Body):
    """Documents to order by how well they answer a query."""

    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=MOST_INPUTS)]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool | None = None
    max_tokens_per_doc: int | None = Field(None, ge=1)


class SessionBody(Body):
    """Roles with their adapters, and what they share of the cache of the text that they write."""

    roles: Annotated[
        dict[Annotated[str, Field(min_length=1, max_length=100)], Annotated[str, Field(max_length=2000)] | None],
        Field(min_length=1, max_length=64),
    ]
    policy: str = Field("base-lr-shared", max_length=100)


class AppendBody(Body):
    """What a user or a tool adds to a session."""

    input: str | Tokens
    add_special_tokens: bool = False


class TurnBody(Generating):
    """Whose turn it is in a session, and how the role goes on."""

    role: str = Field(max_length=100)


class TokenizeBody(Body):
    """A text, or a conversation, to turn into tokens."""

    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False


class DetokenizeBody(Body):
    """Tokens to turn into text."""

    tokens: list[Token]


class LoadBody(Body):
    """An adapter to load; `load_inplace` exchanges the one that has the name."""

    lora_name: str = Field(min_length=1, max_length=100)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    pinned: bool = False


class UnloadBody(Body):
    """An adapter to unload; the number is taken for vLLM's clients and means nothing here."""

    lora_name: str = Field(min_length=1, max_length=100)
    lora_int_id: int | None = None
