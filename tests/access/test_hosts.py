"""Host headers that a server without keys answers to. What DNS rebinding needs is a name that its author controls."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.access.hosts import Arrival, HostRule, is_cross_origin, parse_authority, parse_origin

LOOPBACK = [
    "localhost", "localhost:8000", "LocalHost:9", "localhost.", "127.0.0.1", "127.0.0.1:1", "127.1.2.3", "[::1]:8",
]  # fmt: skip
ADDRESSES = ["10.1.2.3:8000", "192.168.1.10", "203.0.113.9:80", "[2001:db8::1]:8000", "[fe80::1]"]
NAMES = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "eft", "eft:8000", "x_y:1"]
NO_HOSTS = [
    "", " ", ":", ":8000", "a b", "a/b", "[::1", "::1", "[]", "[zz]", "localhost:", "localhost:x", "localhost:70000",
    "localhost:8000:1", "localhost:08000", "user@localhost", "localhost, evil", "localhöst", "2130706433", "0x7f000001",
    "127.1", ".",
]  # fmt: skip


@pytest.mark.parametrize("listen", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_a_server_on_loopback(listen: str) -> None:
    rule = HostRule(listen, ())
    assert all(map(rule.allows, LOOPBACK))
    assert not [host for host in (*ADDRESSES, *NAMES, *NO_HOSTS) if rule.allows(host)]


@pytest.mark.parametrize("listen", ["0.0.0.0", "::", "192.168.1.10"])
def test_a_server_on_the_network_answers_to_addresses_too(listen: str) -> None:
    """So `docker run -p 8000:8000` works by address, from here and from other machines."""
    rule = HostRule(listen, ())
    assert all(map(rule.allows, [*LOOPBACK, *ADDRESSES]))
    assert not [host for host in (*NAMES, *NO_HOSTS) if rule.allows(host)]


def test_the_name_that_it_listens_on() -> None:
    rule = HostRule("gpu-box.example", ())
    assert rule.allows("gpu-box.example:8000")
    assert rule.allows("GPU-box.example")
    assert not rule.allows("other.example")


@pytest.mark.parametrize(
    ("pattern", "allowed", "refused"),
    [
        ("eft", ["eft", "eft:8000", "EFT:1"], ["eft.example", "xeft", "x.eft"]),
        ("eft:8000", ["eft:8000"], ["eft", "eft:8001"]),
        (
            "*.example.com",
            ["a.example.com", "a.b.example.com:8000"],
            ["example.com", "evilexample.com", "example.com.x"],
        ),
        ("*.example.com:8000", ["a.example.com:8000"], ["a.example.com", "a.example.com:1"]),
        ("10.0.0.1", ["10.0.0.1:8000"], ["10.0.0.2"]),
        ("[2001:db8::1]", ["[2001:DB8::1]:8000", "[2001:db8:0::1]"], ["[2001:db8::2]"]),
        ("*", ["anything.example:1", "a b"], []),
    ],
)
def test_allowed_hosts(pattern: str, allowed: list[str], refused: list[str]) -> None:
    rule = HostRule("127.0.0.1", (pattern,))
    assert all(map(rule.allows, allowed))
    assert not [host for host in refused if rule.allows(host)]


@given(st.text(max_size=60))
def test_any_text_is_an_authority_or_none(text: str) -> None:
    found = parse_authority(text)
    if found is not None:
        again = f"[{found.host}]" if ":" in found.host else found.host
        assert parse_authority(again + ("" if found.port is None else f":{found.port}")) == found
    parse_origin(text)
    HostRule("127.0.0.1", ()).allows(text)


def arrival(**headers: str) -> Arrival:
    given = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return Arrival(peer="127.0.0.1", port=8000, http_version="1.1", headers=given)


@pytest.mark.parametrize(
    ("headers", "crosses"),
    [
        ({"host": "localhost:8000"}, False),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, False),
        ({"host": "localhost:8000", "origin": "http://localhost:3000"}, True),
        ({"host": "localhost:8000", "origin": "http://evil.example"}, True),
        ({"host": "localhost:8000", "origin": "null"}, True),
        ({"host": "localhost:8000", "origin": "http://["}, True),
        ({"host": "localhost:8000", "sec_fetch_site": "cross-site"}, True),
        ({"host": "localhost:8000", "sec_fetch_site": "same-site"}, True),
        ({"host": "localhost:8000", "sec_fetch_site": "none"}, False),
        # A development server in between changes Host, and cannot change what the browser says.
        ({"host": "localhost:8000", "origin": "http://localhost:3000", "sec_fetch_site": "same-origin"}, False),
        ({"host": "localhost:8000", "origin": "http://app.example", "sec_fetch_site": "cross-site"}, False),
        ({"host": "models.example", "origin": "https://models.example"}, False),
    ],
)
def test_requests_of_pages(headers: dict[str, str], crosses: bool) -> None:
    assert is_cross_origin(arrival(**headers), {"http://app.example"}) is crosses
