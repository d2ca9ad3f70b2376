"""The tenant of a request, for scheduling and logs: a label from which the API key cannot be recovered."""

import hashlib
from collections.abc import Iterable

LABEL_DIGITS = 12


def tenant_of(key: bytes) -> str:
    """The label of an API key: the first digits of its SHA-256, in hexadecimal."""
    return hashlib.sha256(key).hexdigest()[:LABEL_DIGITS]


def tenant_weights(items: Iterable[str]) -> dict[str, float]:
    """`scheduler.fair_weights` as tenant → weight. Their form was checked with the settings."""
    return {tenant: float(weight) for tenant, _, weight in (item.partition("=") for item in items)}
