"""The ways in which clients describe the form of an output, and the one grammar that is meant."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from server.errors import InvalidRequestError
from server.schemas.body import Body
from server.structured import Grammar, GrammarKind

__all__ = ["JsonSchemaFormat", "ResponseFormat", "StructuredOutputs"]

MAX_CHOICES = 1_024
Choices = list[Annotated[str, Field(min_length=1, max_length=4_096)]]
ANY_OBJECT = {"type": "object"}


class JsonSchemaFormat(Body):
    """OpenAI's `json_schema`: the schema with a name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`response_format`, and TGI's `grammar`, in the spellings of OpenAI, LoRAX, TGI, vLLM and huggingface_hub.

    A JSON schema is read from whichever of `json_schema.schema`, `schema` and `value` is there.
    """

    type: Literal["text", "json_object", "json_schema", "json", "regex", "grammar"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    value: Any = None
    grammar: str | None = None

    def as_grammar(self, param: str) -> Grammar | None:
        """The grammar that is meant; None for free text.

        Args:
            param: the request field that it came from.

        Raises:
            InvalidRequestError: a part is missing.
        """
        if self.type == "text":
            return None
        if self.type == "regex":
            return Grammar(GrammarKind.REGEX, _text(self.value, param), param)
        if self.type == "grammar":
            return Grammar(GrammarKind.LARK, _text(self.grammar or self.value, param), param)
        schema = self._schema()
        if schema is None:
            if self.type != "json_object":
                raise InvalidRequestError(f"`{param}` needs a schema", code="missing_field", param=param)
            schema = ANY_OBJECT
        return Grammar(GrammarKind.JSON_SCHEMA, schema, param)

    def _schema(self) -> Any:
        if self.json_schema is not None and self.json_schema.schema_ is not None:
            return self.json_schema.schema_
        if self.schema_ is not None:
            return self.schema_
        value = self.value
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return value  # refused when it is compiled
        if self.type == "json_schema" and isinstance(value, dict) and "schema" in value:
            return value["schema"]
        return value


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = Field(None, min_length=1, max_length=MAX_CHOICES)
    grammar: str | None = None
    json_object: bool | None = None

    def as_grammar(self, param: str) -> Grammar | None:
        """The grammar that is meant; None if there is none.

        Raises:
            InvalidRequestError: more than one is given.
        """
        given: list[tuple[GrammarKind, Any]] = []
        if self.json_ is not None:
            schema = ResponseFormat(type="json", value=self.json_)._schema()
            given.append((GrammarKind.JSON_SCHEMA, schema))
        if self.regex is not None:
            given.append((GrammarKind.REGEX, self.regex))
        if self.choice is not None:
            given.append((GrammarKind.CHOICE, self.choice))
        if self.grammar is not None:
            given.append((GrammarKind.LARK, self.grammar))
        if self.json_object:
            given.append((GrammarKind.JSON_SCHEMA, ANY_OBJECT))
        if len(given) > 1:
            raise InvalidRequestError("give only one form of structured output", param=param)
        return Grammar(*given[0], param) if given else None


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(f"`{param}` needs a text as its `value`", code="missing_field", param=param)
    return value
