"""The OpenAPI document: FastAPI's, with the errors that the routes really answer in place of FastAPI's own."""

from typing import Any

from fastapi import FastAPI

from server.api.envelopes import Family, family_of
from server.schemas.answers import AnthropicError, OpenAIError, TgiError, error_schemas

__all__ = ["STREAM", "install_openapi"]

# Beside a JSON answer: what `"stream": true` gives, one `data: {…}` and a blank line per event.
STREAM: dict[str, Any] = {"text/event-stream": {}}
MODELS = {Family.TGI: TgiError, Family.ANTHROPIC: AnthropicError}
UNUSED_SCHEMAS = ("HTTPValidationError", "ValidationError")


def install_openapi(app: FastAPI) -> None:
    """Make `/openapi.json` tell the truth about errors."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _with_errors(make())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _with_errors(document: dict[str, Any]) -> dict[str, Any]:
    schemas = document["components"]["schemas"]
    for name in UNUSED_SCHEMAS:
        schemas.pop(name, None)
    schemas.update(error_schemas())
    for path, operations in document["paths"].items():
        model = MODELS.get(family_of(path), OpenAIError)
        schema = {"$ref": f"#/components/schemas/{model.__name__}"}
        for operation in operations.values():
            responses = operation["responses"]
            responses.pop("422", None)
            for status, description in (("4XX", "The request is at fault."), ("5XX", "The server is at fault.")):
                responses[status] = {"description": description, "content": {"application/json": {"schema": schema}}}
    return document
