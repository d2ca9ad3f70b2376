"""The OpenAPI schema, and a reference page made from it. Neither loads anything from another server.

Handlers read their bodies and queries themselves (`runtime.api.http.body`), so Litestar sees only the answers; the rest
is put into its schema here, from what the handlers name in `opt`.
"""

import contextlib
import html
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple, cast

import msgspec
from litestar import Litestar, Request, Router
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.openapi.spec import Server

from runtime.api.http.errors import JSON, ErrorBody
from runtime.api.http.form import MULTIPART
from runtime.api.reference import ENDPOINTS, FieldRow, rows
from runtime.support.threads import call_in_fresh_thread
from runtime.support.version import version

BODY = "body"
"""Key of a handler's `opt`: the struct that it decodes its body into, or several, one of which it is."""

FORM = "form"
"""Key of a handler's `opt`: the JSON schema of the multipart form that it reads."""

QUERY = "query"
"""Key of a handler's `opt`: query parameters → their JSON schemas."""

ANSWERS = "answers"
"""Key of a handler's `opt`: statuses of success → the structs that each may have, where there is more than one."""

ALSO = "also"
"""Key of a handler's `opt`: the media type of text that a 200 may be besides JSON, as the Accept header asks."""

YAML = "application/yaml"

BINARY = {"type": "string", "format": "binary"}
"""JSON schema of a form's file."""

FLAG = {"anyOf": [{"type": "boolean"}, {"enum": ["0", "1"]}]}
"""JSON schema of a query parameter that `http.query.flag` reads."""

_REF = "#/components/schemas/{name}"


def page_query(most: int, **others: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Query parameters of a list with at most `most` entries a page, as `http.query.page_request` takes them."""
    order = {"enum": ["asc", "desc"]}
    return {"after": {"type": "string"}, "limit": whole(1, most), "order": order, **others}


def whole(least: int, most: int) -> dict[str, Any]:
    """JSON schema of a whole number in a range."""
    return {"type": "integer", "minimum": least, "maximum": most}


def openapi_config(root_path: str = "") -> OpenAPIConfig:
    """`root_path`: prefix of the paths that clients use."""
    return OpenAPIConfig(
        title="Eft",
        version=version(),
        description="A language model behind OpenAI's HTTP API.",
        path="/docs",
        servers=[Server(url=root_path or "/")],
        use_handler_docstrings=True,
        openapi_router=Router("/docs", route_handlers=[], include_in_schema=False, before_request=_prepare),
        render_plugins=[_Page(path="/"), _Schema(path="/openapi.json")],
    )


class _Documents(NamedTuple):
    """Both forms of the schema."""

    schema: bytes
    page: bytes


@contextlib.asynccontextmanager
async def prepared(app: Litestar) -> AsyncIterator[None]:
    """Make the documents before the first request."""
    if app.openapi_config is not None:
        await _documents_of(app)
    yield


async def _prepare(request: Request[Any, Any, Any]) -> None:
    await _documents_of(request.app)


async def _documents_of(app: Litestar) -> None:
    """Make the app's documents, once, on a thread: it takes 0.3 s."""
    if not hasattr(app.state, "documents"):
        app.state.documents = await call_in_fresh_thread(lambda: _make_documents(app))


def _make_documents(app: Litestar) -> _Documents:
    schema = _with_bodies(app, cast(Any, app.plugins.get("OpenAPIPlugin")).provide_openapi_schema())
    return _Documents(msgspec.json.encode(schema), _page_of(schema))


class _Schema(OpenAPIRenderPlugin):
    """The schema as JSON."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return cast(bytes, request.app.state.documents.schema)


class _Page(OpenAPIRenderPlugin):
    """The schema as one page of HTML: no script, no font, no external resource."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return cast(bytes, request.app.state.documents.page)


def _page_of(schema: dict[str, Any]) -> bytes:
    schemas = schema["components"]["schemas"]
    sections = [
        _section(method, path, operation, schemas)
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    ]
    root = html.escape(schema["servers"][0]["url"].rstrip("/"))
    return _PAGE.format(version=html.escape(version()), root=root, sections="\n".join(sections)).encode()


def _with_bodies(app: Litestar, schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` with request bodies and queries, and the error that every operation may answer."""
    bodies: dict[tuple[str, str], tuple[type[msgspec.Struct], ...]] = {}
    opts: dict[tuple[str, str], Mapping[str, Any]] = {}
    for route in app.routes:
        for handler in getattr(route, "route_handlers", ()):
            if BODY in handler.opt:
                body = handler.opt[BODY]
                some = body if isinstance(body, tuple) else (body,)
                bodies |= {(route.path_format, method.lower()): some for method in handler.http_methods}
            opts |= {
                (route.path_format, method.lower()): handler.opt for method in getattr(handler, "http_methods", ())
            }
    described = {body: None for some in bodies.values() for body in some}
    answered = {struct: None for opt in opts.values() for some in opt.get(ANSWERS, {}).values() for struct in some}
    structs = [*(described | answered), ErrorBody]
    references, components = msgspec.json.schema_components(structs, ref_template=_REF)
    for body in described:
        components[body.__name__] = _nullable(components[body.__name__])
    reference_of = dict(zip(structs, references, strict=True))
    schemas = {**schema.get("components", {}).get("schemas", {}), **components}
    paths = {
        path: {
            method: _with_form_and_query(
                _operation(
                    _with_answers(operation, opts.get((path, method), {}), reference_of),
                    reference_of[ErrorBody],
                    bodies.get((path, method), ()),
                    reference_of,
                ),
                opts.get((path, method), {}),
            )
            for method, operation in operations.items()
        }
        for path, operations in schema["paths"].items()
    }
    return {**schema, "paths": paths, "components": {"schemas": schemas}}


def _with_answers(operation: dict[str, Any], opt: Mapping[str, Any], reference_of: dict[Any, Any]) -> dict[str, Any]:
    """`operation` with the successes that `opt` names."""
    answers = dict(operation["responses"])
    for status, structs in opt.get(ANSWERS, {}).items():
        schema = _any_of([reference_of[struct] for struct in structs])
        described = {"description": HTTPStatus(status).phrase, **answers.get(str(status), {})}
        answers[str(status)] = {**described, "content": {JSON: {"schema": schema}}}
    for answer in answers.values():
        if YAML in answer.get("content", {}):
            answer["content"] = {YAML: {"schema": {}}}  # a client's reader sees what it says, not its text
    if ALSO in opt:
        text = {opt[ALSO]: {"schema": {"type": "string"}}}
        answers["200"] = {**answers["200"], "content": {**answers["200"]["content"], **text}}
    return {**operation, "responses": answers}


def _with_form_and_query(operation: dict[str, Any], opt: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(operation)
    if FORM in opt:
        found["requestBody"] = {"required": True, "content": {MULTIPART: {"schema": opt[FORM]}}}
    query = [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in opt.get(QUERY, {}).items()
    ]
    if query:
        found["parameters"] = [*operation.get("parameters", ()), *query]
    return found


def _nullable(body: dict[str, Any]) -> dict[str, Any]:
    """The schema of a body, in which a field that has a default may be null: it counts as absent."""
    required = body.get("required", [])
    properties = {
        name: schema if name in required or _takes_null(schema) else {"anyOf": [schema, {"type": "null"}]}
        for name, schema in body["properties"].items()
    }
    return {**body, "properties": properties}


def _takes_null(schema: dict[str, Any]) -> bool:
    return any(option.get("type") == "null" for option in schema.get("anyOf", ()))


def _operation(
    operation: dict[str, Any], error: Any, bodies: tuple[type[msgspec.Struct], ...], reference_of: dict[Any, Any]
) -> dict[str, Any]:
    answers = {status: answer for status, answer in operation["responses"].items() if status.startswith("2")}
    answers["default"] = {"description": "What went wrong", "content": {JSON: {"schema": error}}}
    if not bodies:
        return {**operation, "responses": answers}
    if any("stream" in body.__struct_fields__ for body in bodies):
        # An event is its data, or where it has a name, an object of both.
        events = {"text/event-stream": {"schema": {"type": ["string", "object"]}}}
        answers["200"] = {**answers["200"], "content": {**answers["200"]["content"], **events}}
    schema = _any_of([reference_of[body] for body in bodies])
    request_body = {"required": True, "content": {JSON: {"schema": schema}}}
    return {**operation, "responses": answers, "requestBody": request_body}


def _any_of(schemas: list[Any]) -> Any:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _section(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    title = f'<h2 id="{html.escape(f"{method}-{path}")}"><code>{method.upper()}</code> {html.escape(path)}</h2>'
    about = f"<p>{html.escape(operation.get('description', ''))}</p>"
    body = operation.get("requestBody", {}).get("content", {}).get(JSON, {}).get("schema", {})
    struct = schemas.get(body.get("$ref", "").rpartition("/")[2], {})
    known = {row.name: row for endpoint in ENDPOINTS if endpoint.path == path for row in rows(endpoint)}
    fields = {name: _type(field) for name, field in struct.get("properties", {}).items()}
    fields |= {name: "" for name in known if name not in fields}
    table = "".join(_field(name, kind, known.get(name)) for name, kind in fields.items())
    return title + about + (f"<table>{table}</table>" if table else "")


def _field(name: str, kind: str, row: FieldRow | None) -> str:
    effect = "" if row is None or row.effect == "supported" else row.effect
    note = "" if row is None else row.note
    cells = (kind or effect, f"{effect}: {note}" if kind and effect else note)
    return (
        f"<tr><td><code>{html.escape(name)}</code></td>"
        + "".join(f"<td>{html.escape(cell.replace('`', ''))}</td>" for cell in cells)
        + "</tr>"
    )


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
<p>OpenAI's API, with vLLM's additions. The same as a schema: <a href="{root}/docs/openapi.json">openapi.json</a>.</p>
{sections}
</body></html>
"""
