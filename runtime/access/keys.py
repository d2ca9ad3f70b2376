"""API keys: their names, scopes and limits, and the file that holds them.

The file has digests, never keys. A key made here is 256 random bits, so one round of SHA-256 is enough: there is
nothing to guess, and a slow hash (scrypt, argon2) would give every anonymous request tens of milliseconds of the
event loop.
"""

import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from runtime.support.logs import get_logger

Scope = Literal["inference", "train", "admin"]
SCOPES: tuple[Scope, ...] = ("inference", "train", "admin")

KEY_PREFIX = "eft-"
MAX_FILE_BYTES = 4 * 1024**2
LABEL_DIGITS = 12
"""Digits of a key's SHA-256 that are its tenant's label, in scheduling and logs: no key can be recovered from them."""

KeyName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
PositiveCount = Annotated[int, Meta(ge=1)]
PositiveShare = Annotated[float, Meta(gt=0, le=1)]
PositiveSeconds = Annotated[float, Meta(gt=0)]


class KeysFileError(Exception):
    """A keys file that cannot be read, or is not one. The message names the file and what is wrong."""


class KeyLimits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of one key; None: as much as the server gives. The settings `server.key_…` have the same names."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    max_queue_share: float | None = None
    min_priority: int | None = None
    min_deadline: float | None = None


class OwnLimits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A stored key's limits. What is left out is the setting's; null is no limit."""

    requests_per_minute: PositiveCount | UnsetType | None = UNSET
    tokens_per_minute: PositiveCount | UnsetType | None = UNSET
    max_concurrent: PositiveCount | UnsetType | None = UNSET
    max_queue_share: PositiveShare | UnsetType | None = UNSET
    min_priority: int | UnsetType | None = UNSET
    min_deadline: PositiveSeconds | UnsetType | None = UNSET

    def over(self, defaults: KeyLimits) -> KeyLimits:
        """These limits, and `defaults` where they say nothing."""
        own = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not UNSET}
        return msgspec.structs.replace(defaults, **own)


class StoredKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the keys file."""

    name: KeyName
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    created: str
    """UTC, as 2026-01-31T12:00:00Z."""
    limits: OwnLimits = OwnLimits()


class KeysFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file, as JSON."""

    version: Literal[1] = 1
    keys: tuple[StoredKey, ...] = ()

    def check(self) -> None:
        """Raise `ValueError` for a name or a digest that is there twice."""
        for field in ("name", "sha256"):
            seen: set[str] = set()
            for key in self.keys:
                value = getattr(key, field)
                if value in seen:
                    raise ValueError(f"two keys have the {field} `{value}`")
                seen.add(value)


_decoder = msgspec.json.Decoder(KeysFile)


def digest_of(key: bytes) -> str:
    """SHA-256 in hexadecimal: what the file stores."""
    return hashlib.sha256(key).hexdigest()


def make_key() -> str:
    """A new key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def read_keys(path: Path) -> KeysFile:
    """Raises `KeysFileError`."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeysFileError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise KeysFileError(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
    try:
        found = _decoder.decode(data)
        found.check()
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise KeysFileError(f"{path}: is no keys file: {error}") from error
    return found


def change_keys(path: Path, change: Callable[[tuple[StoredKey, ...]], Iterable[StoredKey]]) -> KeysFile:
    """Replace the file's keys by `change(keys)` in one step, with mode 0600; a missing file has none.

    Changes by several processes follow one another. Raises `KeysFileError`, and what `change` raises.
    """
    folder = path.parent
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeysFileError(f"{folder}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = read_keys(path).keys if path.exists() else ()
        after = KeysFile(keys=tuple(change(before)))
        after.check()
        write_private(path, msgspec.json.format(msgspec.json.encode(after), indent=2) + b"\n")
        os.fsync(lock)
        return after
    except OSError as error:
        raise KeysFileError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        os.close(lock)


def write_private(path: Path, data: bytes) -> None:
    """Put a file in its place whole and on the disk, readable and writable by its owner only. Raises `OSError`."""
    path = path.resolve()  # the file that a link names, not the link, is replaced
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(6)}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        fresh.replace(path)
    except BaseException:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise


def describe_limits(limits: OwnLimits) -> dict[str, Any]:
    """The limits that are set, by name."""
    found: dict[str, Any] = msgspec.to_builtins(limits)
    return found


# -- ring ------------------------------------------------------------------------------------------
#
# The keys of one server, to look a given one up in: those of the settings, those of the keys file, the admin token.

_log = get_logger("access")

_Identity = tuple[int, int, int, int]


class Principal(Struct, frozen=True, kw_only=True):
    """The holder of a key: the part of it that requests need."""

    name: str
    """For the log: the key's name, or where it comes from."""
    label: str = ""
    """Tenant of its requests, made from the key without revealing it; "" where no key is required."""
    scopes: frozenset[Scope]
    limits: KeyLimits = KeyLimits()

    def may(self, scope: str) -> bool:
        """An admin key may do everything; the other scopes are apart from each other."""
        return scope in self.scopes or "admin" in self.scopes


class KeyRing:
    """Finds the principal of a key. Event-loop thread only, but for `read_file`."""

    def __init__(
        self,
        inference_keys: Iterable[str],
        admin_keys: Iterable[str],
        *,
        file: Path | None,
        defaults: KeyLimits,
    ) -> None:
        """Reads `file`. Raises `KeysFileError`."""
        self._file = file
        self._defaults = defaults
        # Digests are looked up under a secret of this process, so the time that a search takes says nothing of them.
        self._secret = secrets.token_bytes(32)
        self._fixed: dict[bytes, Principal] = {}
        for scope, keys in (("inference", inference_keys), ("admin", admin_keys)):
            for key in keys:
                self._add_fixed(key, scope)  # type: ignore[arg-type]
        self._stored: dict[bytes, Principal] = {}
        self._token: tuple[bytes, Principal] | None = None
        self._identity: _Identity | None = None
        self._complaint = ""
        if file is not None:
            self._identity = _identity_of(file)  # before reading, as in `read_file`
            self._take(read_keys(file).keys)

    @property
    def principals(self) -> list[Principal]:
        """All holders of keys, by name."""
        return sorted(self._all(), key=lambda principal: principal.name)

    @property
    def labels(self) -> frozenset[str]:
        """Labels of all principals."""
        return frozenset(principal.label for principal in self._all())

    def any_may(self, scope: Scope) -> bool:
        """True where some configured key has `scope`; the admin token does not count."""
        return any(scope in principal.scopes for principal in (*self._fixed.values(), *self._stored.values()))

    def find(self, key: bytes) -> Principal | None:
        """The holder of `key`."""
        blinded = self._blind(digest_of(key))
        if self._token is not None and self._token[0] == blinded:
            return self._token[1]
        return self._fixed.get(blinded) or self._stored.get(blinded)

    def holder(self, label: str) -> Principal | None:
        """The principal with this label."""
        return next((principal for principal in self._all() if principal.label == label), None)

    def set_token(self, token: str) -> None:
        """Accept `token` as an admin key."""
        digest = digest_of(token.encode())
        principal = Principal(name="admin-token", label=digest[:LABEL_DIGITS], scopes=frozenset(SCOPES))
        self._token = (self._blind(digest), principal)

    # -- the file ------------------------------------------------------------------------------

    def read_file(self) -> tuple[_Identity, tuple[StoredKey, ...]] | None:
        """The file's identity and keys, where it is not the one that was taken last. Blocks; for any thread.
        Raises `KeysFileError`."""
        if self._file is None:
            return None
        identity = _identity_of(self._file)  # before reading: a change meanwhile is seen the next time
        if identity is None:
            raise KeysFileError(f"{self._file}: there is no such file")
        return None if identity == self._identity else (identity, read_keys(self._file).keys)

    def take(self, found: tuple[_Identity, tuple[StoredKey, ...]]) -> None:
        """Use these keys from now on. Running requests of a removed key continue to their end."""
        identity, keys = found
        before = {principal.name for principal in self._stored.values()}
        self._take(keys)
        self._identity, self._complaint = identity, ""
        after = {principal.name for principal in self._stored.values()}
        _log.info("keys_reloaded", keys=len(after), added=sorted(after - before), removed=sorted(before - after))

    def complain(self, error: KeysFileError) -> None:
        """Log why the file was not taken, once for each reason. The keys that were read before stay."""
        if str(error) != self._complaint:
            self._complaint = str(error)
            _log.error("keys_not_reloaded", reason=self._complaint)

    def _take(self, keys: Iterable[StoredKey]) -> None:
        stored: dict[bytes, Principal] = {}
        for key in keys:
            stored[self._blind(key.sha256)] = Principal(
                name=key.name,
                label=key.sha256[:LABEL_DIGITS],
                scopes=frozenset(key.scopes),
                limits=key.limits.over(self._defaults),
            )
        self._stored = stored

    def _add_fixed(self, key: str, scope: Scope) -> None:
        digest = digest_of(key.encode("utf-8", "surrogateescape"))  # what an environment held
        blinded, label = self._blind(digest), digest[:LABEL_DIGITS]
        known = self._fixed.get(blinded)
        scopes = (known.scopes if known else frozenset()) | {scope}
        self._fixed[blinded] = Principal(name=f"key-{label}", label=label, scopes=scopes, limits=self._defaults)

    def _all(self) -> Iterable[Principal]:
        tokens = (self._token[1],) if self._token else ()
        return (*self._fixed.values(), *self._stored.values(), *tokens)

    def _blind(self, digest: str) -> bytes:
        return hashlib.blake2b(bytes.fromhex(digest), key=self._secret, digest_size=32).digest()


def _identity_of(path: Path) -> _Identity | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev
