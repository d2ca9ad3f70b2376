"""Query parameters, and pages of lists: the same names, bounds and errors at every endpoint.

A bad parameter is a 400 that names it; one that the endpoint does not have is never ignored in silence.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from msgspec import Struct

from runtime.api.handle import AnyRequest
from runtime.errors import InvalidRequest

_YES = frozenset({"1", "true", "yes"})
_NO = frozenset({"0", "false", "no"})
_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_NUMBER = re.compile(r"[0-9]{1,16}")
"""At most 16 digits: SQLite stores such a number, and `int` parses it at once."""


def check_names(request: AnyRequest, known: Iterable[str]) -> None:
    """Raise for a parameter that the endpoint does not have: none is silently ignored."""
    for name in request.query_params:
        if name not in known:
            has = ", ".join(sorted(known)) or "none"
            raise InvalidRequest(f"There is no parameter `{name[:100]}`; this endpoint has: {has}.", param=name[:100])


def integer(request: AnyRequest, name: str, *, default: int, least: int, most: int) -> int:
    """A parameter as a whole number in a range. Raises `InvalidRequest`."""
    text = single(request, name)
    return default if text is None else number(text, name, least=least, most=most)


def number(text: str, name: str, *, least: int, most: int) -> int:
    """`text`, all of it, as a whole number in a range. Raises `InvalidRequest` that names `name`."""
    if _NUMBER.fullmatch(text) is None or not least <= int(text) <= most:
        raise InvalidRequest(f"{name}: expected a whole number from {least} to {most}, got `{text[:50]}`.", param=name)
    return int(text)


def single(request: AnyRequest, name: str) -> str | None:
    """A parameter's value; None if it is absent. Raises `InvalidRequest` if it is given twice."""
    given = request.query_params.getall(name, [])
    if len(given) > 1:
        raise InvalidRequest(f"{name}: expected one value, got {len(given)}.", param=name)
    return given[0] if given else None


def flag(request: AnyRequest, name: str, *, empty: bool | None = None) -> bool:
    """A boolean parameter: False if it is absent; `empty` if it has no value (None: refused)."""
    given = single(request, name)
    if given == "" and empty is not None:
        return empty
    text = "0" if given is None else given.lower()
    if text not in _YES | _NO:
        raise InvalidRequest(f"{name}: expected 1 or 0, got `{text[:50]}`.", param=name)
    return text in _YES


def choices(request: AnyRequest, name: str, allowed: Iterable[str]) -> tuple[str, ...]:
    """Values given once or several times, or with commas in between."""
    given = [part for text in request.query_params.getall(name, []) for part in text.split(",")]
    for value in given:
        if value not in allowed:
            raise InvalidRequest(
                f"{name}: expected one of {', '.join(allowed)}, got `{value[:50]}`.",
                param=name,
            )
    return tuple(given)


def metadata_filter(request: AnyRequest) -> tuple[dict[str, str], tuple[str, ...]]:
    """The metadata that listed objects must have, given as parameters `metadata[key]`, and the names of these
    parameters. Raises `InvalidRequest` if one is given twice."""
    keys = {name: found[1] for name in request.query_params if (found := _METADATA.fullmatch(name))}
    return {key: single(request, name) or "" for name, key in keys.items()}, tuple(keys)


# -- pages -----------------------------------------------------------------------------------------

MAX_PAGE = 100
"""Most objects of a page, OpenAI's, unless the endpoint says otherwise."""

DEFAULT_PAGE = 20

PAGE_PARAMETERS = ("after", "limit", "order")


class PageRequest(NamedTuple):
    """The page of a list that a request asks for."""

    after: str | None
    """Id of the object before the page; None for the first page."""
    limit: int
    newest_first: bool


class Listed(Protocol):
    """An object that is listed by its id."""

    id: str


T = TypeVar("T")
L = TypeVar("L", bound=Listed)


class Page(Struct, Generic[T], kw_only=True):
    """Rows that have no ids, such as metrics."""

    object: str = "list"
    data: list[T]
    has_more: bool = False


class ObjectPage(Struct, Generic[T], kw_only=True):
    """A page of a list of objects, in OpenAI's form. `last_id` is the `after` of the next page."""

    object: str = "list"
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page_request(
    request: AnyRequest,
    *,
    default: int = DEFAULT_PAGE,
    most: int = MAX_PAGE,
    further: Iterable[str] = (),
    newest_first: bool = True,
) -> PageRequest:
    """The parameters `after`, `limit` and `order` (`desc` or `asc`; by default, `desc` if `newest_first`). `further`:
    other parameters that the endpoint has. Raises `InvalidRequest`."""
    check_names(request, (*PAGE_PARAMETERS, *further))
    order = single(request, "order")
    if order is None:
        order = "desc" if newest_first else "asc"
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order: expected asc or desc, got `{order[:50]}`.", param="order")
    limit = integer(request, "limit", default=default, least=1, most=most)
    return PageRequest(single(request, "after"), limit, order == "desc")


def object_page(data: Sequence[L], has_more: bool) -> ObjectPage[L]:
    """A page of objects, with the ids of its first and its last."""
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return ObjectPage(data=list(data), first_id=first, last_id=last, has_more=has_more)
