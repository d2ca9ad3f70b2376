"""Names that a server is addressed by, and signs that a request did not come straight from this machine.

A browser lets any page send requests to 127.0.0.1, and a name that a page's author controls can be pointed there
(DNS rebinding). A reverse proxy or a sidecar connects from 127.0.0.1 on behalf of the whole network. So an address
is no identity, and what is accepted without a key depends on the `Host` header, on `Origin` and the fetch metadata,
and on headers that proxies add.
"""

import ipaddress
import re
from collections.abc import Iterable
from typing import NamedTuple

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(0|[1-9][0-9]{0,4}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}

_PROXY_HEADERS = frozenset(
    {
        "forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip", "fastly-client-ip",
        "fly-client-ip", "x-proxyuser-ip", "x-host", "x-arr-log-id", "proxy-connection", "client-ip", "remote-addr",
        "wl-proxy-client-ip", "x-coming-from", "ali-cdn-real-ip", "incap-client-ip", "cdn-loop", "x-varnish",
        "surrogate-capability", "max-forwards", "x-request-start", "x-rewrite-url",
    }
)  # fmt: skip
_PROXY_PREFIXES = (
    "x-forward", "x-original-", "x-envoy-", "cf-", "x-azure-", "x-ms-", "x-amzn-", "x-goog-", "x-appengine-",
    "x-vercel-", "x-akamai-", "akamai-", "x-sucuri-", "x-nginx-", "ngrok-", "tailscale-", "x-tailscale-",
)  # fmt: skip


class Authority(NamedTuple):
    """The value of a `Host` header, or what follows the scheme of an origin."""

    host: str
    """In lower case; an IPv6 address without its brackets, in its shortest form."""
    port: int | None


class Origin(NamedTuple):
    """The value of an `Origin` header: scheme and authority, its port always given."""

    scheme: str
    host: str
    port: int


def parse_authority(text: str) -> Authority | None:
    """`text` as host and port; None for anything that is not exactly that."""
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        return None
    port = int(match[2]) if match[2] else None
    if port is not None and port > 65535:
        return None
    host = match[1].lower()
    if host.startswith("["):
        try:
            return Authority(str(ipaddress.IPv6Address(host[1:-1])), port)
        except ValueError:
            return None
    host = host.removesuffix(".")
    return Authority(host, port) if host else None


def parse_origin(text: str) -> Origin | None:
    """`text` as an origin of http or https; None for others, `null` among them."""
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    authority = parse_authority(rest) if separator and scheme in _DEFAULT_PORTS else None
    if authority is None:
        return None
    return Origin(scheme, authority.host, authority.port or _DEFAULT_PORTS[scheme])


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that `host` spells, an IPv4 one where it is mapped into IPv6; None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


def is_loopback(host: str) -> bool:
    """True for `localhost` and for every loopback address."""
    address = address_of(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def is_own_machine(peer: str) -> bool:
    """True for exactly 127.0.0.1 and ::1. Sidecars and containers use others of 127.0.0.0/8 (Istio: 127.0.0.6)."""
    return str(address_of(peer)) in ("127.0.0.1", "::1")


class HostRule:
    """The `Host` headers that are accepted where no key is required.

    Loopback names, `allowed`, and the name that the server listens on. On a server that listens beyond loopback also
    any IP address: DNS rebinding needs a name, so an address in `Host` is one that the client meant.
    """

    def __init__(self, listen: str, allowed: Iterable[str]) -> None:
        self._listen = listen.lower().removesuffix(".")
        self._beyond_loopback = not is_loopback(listen)
        self._any = False
        self._exact: set[Authority] = set()
        self._suffixes: list[Authority] = []
        for pattern in allowed:
            if pattern == "*":
                self._any = True
                continue
            authority = parse_authority(pattern.removeprefix("*."))
            assert authority is not None, f"{pattern!r} was not checked with the settings"
            if pattern.startswith("*."):
                self._suffixes.append(authority)
            else:
                self._exact.add(authority)

    def allows(self, header: str) -> bool:
        """True where a request with this `Host` may be answered without a key."""
        if self._any:
            return True
        authority = parse_authority(header)
        if authority is None:
            return False
        host, port = authority
        if is_loopback(host) or host == self._listen:
            return True
        if self._beyond_loopback and address_of(host) is not None:
            return True
        if not self._exact.isdisjoint({authority, Authority(host, None)}):
            return True
        return any(host.endswith(f".{name}") and wanted in (None, port) for name, wanted in self._suffixes)


def proxy_header(names: Iterable[str]) -> str | None:
    """The first of these header names (in lower case) that only proxies, sidecars and gateways add. Some write `_`
    for `-`."""
    for name in names:
        spelled = name.replace("_", "-")
        if spelled in _PROXY_HEADERS or spelled.startswith(_PROXY_PREFIXES):
            return name
    return None


class Arrival(NamedTuple):
    """Headers and addresses of a request that show its origin."""

    peer: str
    port: int | None
    """Port of the server, to which the connection was made."""
    http_version: str
    headers: list[tuple[str, str]]
    """Names in lower case."""

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    def one(self, name: str) -> str | None:
        """The header's value; of several, all of them, which then are no valid value."""
        values = self.all(name)
        return ", ".join(values) if values else None


def not_local(arrival: Arrival, listen: str) -> str | None:
    """Reason why a request does not count as sent by a person on this machine straight to the server; None if it does.

    A proxy that keeps the `Host`, adds no header and speaks HTTP/1.1 is indistinguishable from a local client: behind
    one, set an admin key.
    """
    if not is_own_machine(arrival.peer):
        return "it comes from another address than 127.0.0.1 and ::1"
    if (name := proxy_header(key for key, _ in arrival.headers)) is not None:
        return f"it came through a proxy (it has the header {name})"
    if arrival.http_version == "1.0":
        return "it is HTTP/1.0, which proxies speak"
    host = parse_authority(arrival.one("host") or "")
    if host is None or not (host.host in ("localhost", "127.0.0.1", "::1") or host.host == listen.lower()):
        return "its Host header is not one of this machine's own names"
    if (host.port or _DEFAULT_PORTS["http"]) != (arrival.port or _DEFAULT_PORTS["http"]):
        return "its Host header has another port than the server"
    if arrival.one("sec-fetch-site") not in (None, "same-origin", "none"):
        return "a page of another site sent it (Sec-Fetch-Site)"
    text = arrival.one("origin")
    if text is not None and not (text.lower().startswith("http://") and _is_own_origin(text, host)):
        return "its Origin is not the address that it was sent to"
    return None


def is_cross_origin(arrival: Arrival, allowed: Iterable[str]) -> bool:
    """True where a browser says that a page of another origin sent this, and `allowed` does not have that origin.

    Fetch metadata wins, since a development server in between may change `Host` but not that.
    """
    origin = arrival.one("origin")
    if origin is not None and ("*" in allowed or origin.lower() in allowed):
        return False
    site = arrival.one("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    if origin is None:
        return False
    host = parse_authority(arrival.one("host") or "")
    return host is None or not _is_own_origin(origin, host)


def _is_own_origin(text: str, host: Authority) -> bool:
    origin = parse_origin(text)
    if origin is None:
        return False
    return (origin.host, origin.port) == (host.host, host.port or _DEFAULT_PORTS[origin.scheme])
