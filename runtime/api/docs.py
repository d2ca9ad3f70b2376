"""The OpenAPI schema, and a reference page made from it. Neither loads anything from anywhere else.

Handlers read their bodies themselves (`runtime.api.body`), so Litestar knows only the answers; the bodies are
put into its schema here, from the structs that the handlers name in `opt={"body": …}`.
"""

import html
from typing import Any

import msgspec
from litestar import Request
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin

from runtime.api.errors import JSON, ErrorBody
from runtime.version import version

BODY = "body"
"""Key of a handler's `opt`: the struct that it decodes its body into."""

_REF = "#/components/schemas/{name}"


def openapi_config() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="Eft",
        version=version(),
        description="A language model behind OpenAI's HTTP API.",
        path="/docs",
        use_handler_docstrings=True,
        render_plugins=[_Page(path="/"), _Schema(path="/openapi.json")],
    )


class _Schema(OpenAPIRenderPlugin):
    """The schema as JSON."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return msgspec.json.encode(_with_bodies(request, openapi_schema))


class _Page(OpenAPIRenderPlugin):
    """The schema as one page of HTML: no script, no font, nothing to fetch."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        schema = _with_bodies(request, openapi_schema)
        schemas = schema["components"]["schemas"]
        sections = [
            _section(method, path, operation, schemas)
            for path, operations in schema["paths"].items()
            for method, operation in operations.items()
        ]
        return _PAGE.format(version=html.escape(version()), sections="\n".join(sections)).encode()


def _with_bodies(request: Request[Any, Any, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` with request bodies, and the error that every operation may answer."""
    bodies = {
        route.path_format: handler.opt[BODY]
        for route in request.app.routes
        for handler in getattr(route, "route_handlers", ())
        if BODY in handler.opt
    }
    structs = [*bodies.values(), ErrorBody]
    references, components = msgspec.json.schema_components(structs, ref_template=_REF)
    reference_of = dict(zip(structs, references, strict=True))
    schemas = {**schema.get("components", {}).get("schemas", {}), **components}
    paths = {
        path: {
            method: _operation(operation, reference_of[ErrorBody], bodies.get(path), reference_of)
            for method, operation in operations.items()
        }
        for path, operations in schema["paths"].items()
    }
    return {**schema, "paths": paths, "components": {"schemas": schemas}}


def _operation(
    operation: dict[str, Any], error: Any, body: type[msgspec.Struct] | None, reference_of: dict[Any, Any]
) -> dict[str, Any]:
    answers = {status: answer for status, answer in operation["responses"].items() if status.startswith("2")}
    answers["default"] = {"description": "What went wrong", "content": {JSON: {"schema": error}}}
    if body is None:
        return {**operation, "responses": answers}
    if "stream" in body.__struct_fields__:
        events = {"text/event-stream": {"schema": {"type": "string"}}}
        answers["200"] = {**answers["200"], "content": {**answers["200"]["content"], **events}}
    request_body = {"required": True, "content": {JSON: {"schema": reference_of[body]}}}
    return {**operation, "responses": answers, "requestBody": request_body}


def _section(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    title = f"<h2><code>{method.upper()}</code> {html.escape(path)}</h2>"
    about = f"<p>{html.escape(operation.get('description', ''))}</p>"
    body = operation.get("requestBody", {}).get("content", {}).get(JSON, {}).get("schema", {})
    struct = schemas.get(body.get("$ref", "").rpartition("/")[2], {})
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(_type(field))}</td></tr>"
        for name, field in struct.get("properties", {}).items()
    )
    return title + about + (f"<table>{rows}</table>" if rows else "")


def _type(field: dict[str, Any]) -> str:
    """A field's type in a few words."""
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"] if option.get("type") != "null")
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "any"))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Eft API</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ font-size: 1.1rem; margin-top: 2rem }}
table {{ border-collapse: collapse }}
td {{ border-bottom: 1px solid #ccc; padding: .2rem 1rem .2rem 0; vertical-align: top }}
@media (prefers-color-scheme: dark) {{ body {{ background: #111; color: #ddd }} a {{ color: #9cf }} }}
</style></head><body>
<h1>Eft {version}</h1>
<p>OpenAI's API, with vLLM's additions. The same as a schema: <a href="/docs/openapi.json">openapi.json</a>.</p>
{sections}
</body></html>
"""
