"""Query parameters of the admin endpoints. What is wrong with one is a 400 that names it."""

from collections.abc import Iterable

from runtime.api.handle import AnyRequest
from runtime.errors import InvalidRequest

_YES = frozenset({"1", "true", "yes"})
_NO = frozenset({"0", "false", "no"})


def check_names(request: AnyRequest, known: Iterable[str]) -> None:
    """Raise for a parameter that the endpoint does not have: none is ignored in silence."""
    for name in request.query_params:
        if name not in known:
            has = ", ".join(sorted(known)) or "none"
            raise InvalidRequest(f"There is no parameter `{name[:100]}`; this endpoint has: {has}.", param=name[:100])


def integer(request: AnyRequest, name: str, *, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and least <= int(text[:12]) <= most):
        raise InvalidRequest(f"{name}: expected a whole number from {least} to {most}, got `{text[:50]}`.", param=name)
    return int(text)


def flag(request: AnyRequest, name: str) -> bool:
    text = request.query_params.get(name, "0").lower()
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
