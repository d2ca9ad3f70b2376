"""The functions and structs of `exports.h` for ctypes, and the checks that both sides of the boundary agree on them.

`exports.h` is the one declaration of the boundary between Python and C++. `parse` makes enums, `ctypes.Structure` types
and function prototypes from it, and a C++ source that is compiled into every library: there the compiler asserts that
it reads the same types, sizes, offsets and values, and the library gets a digest of the declarations. `bind` loads a
library and refuses one with another digest.
"""

import ctypes
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER = Path(__file__).resolve().parent / "exports.h"
MARKER = "eft-declarations:"
"""Prefix of the digest in a library."""

_SCALARS: dict[str, Any] = {
    "char": ctypes.c_char,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "int": ctypes.c_int,
    "long": ctypes.c_long,
    "int8_t": ctypes.c_int8,
    "uint8_t": ctypes.c_uint8,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
}
_RESULTS: dict[str, Any] = {"void": None, "int": ctypes.c_int, "const char*": ctypes.c_char_p}
_ENUM = re.compile(r"enum (\w+) : int \{([^{}]*)\};")
_STRUCT = re.compile(r"struct (\w+) \{([^{}]*)\};")
_FUNCTION_TYPE = re.compile(r"using (\w+) = void\(([^()]*)\);")
_FUNCTION = re.compile(r"EXPORT ([\w* ]+?[ *])(\w+)\(([^()]*)\);")
_TYPED_FUNCTION = re.compile(r"EXPORT (\w+) (\w+);")
_DECLARATION = re.compile(r"((?:const )?\w+(?: ?const)?[*]*(?: const\*)?) (\w+)(?:\[(\d+)\])?")


class DeclarationError(ValueError):
    """`exports.h` has something that cannot be read; the message shows it."""


class StaleLibraryError(RuntimeError):
    """A library was compiled from other declarations than this process has read."""


@dataclass(frozen=True)
class Function:
    """An exported function."""

    name: str
    returns: str
    """Type in C++."""
    parameters: Mapping[str, str]
    """Name → type in C++."""
    prototype: Any
    """`ctypes.CFUNCTYPE`; functions of the same C++ type share it, so one fits into a struct's field."""

    def load(self, library: ctypes.CDLL) -> Callable[..., Any]:
        """The function, which takes its arguments by position or by name and checks their number and types.

        ctypes by itself ignores surplus arguments of C functions; with the parameters' names it refuses them.
        """
        function: Callable[..., Any] = self.prototype(
            (self.name, library), tuple((1, name) for name in self.parameters)
        )
        return function


@dataclass(frozen=True)
class Declarations:
    """All of `exports.h`."""

    enums: Mapping[str, Mapping[str, int]]
    structs: Mapping[str, type[ctypes.Structure]]
    functions: Mapping[str, Function]
    checks: str
    """C++ source that does not compile where the compiler and ctypes disagree, and holds the digest."""
    digest: str


class Kernels:
    """A compiled library: its functions as attributes."""

    def __init__(self, library: ctypes.CDLL, declarations: Declarations) -> None:
        for function in declarations.functions.values():
            setattr(self, function.name, function.load(library))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"{HEADER.name} does not declare {name}")


def bind(path: Path, declarations: Declarations) -> Kernels:
    """The library at `path`. Raises `StaleLibraryError` unless it was compiled from `declarations`, `OSError` where it
    cannot be loaded."""
    library = ctypes.CDLL(str(path))
    try:
        library.eft_declarations.restype = ctypes.c_char_p
        found = library.eft_declarations().decode().removeprefix(MARKER)
    except AttributeError:
        found = "none"
    if found != declarations.digest:
        raise StaleLibraryError(
            f"{path} has other declarations ({found}) than {HEADER} had when this process read it "
            f"({declarations.digest}): restart the process; if that does not help, delete the file, which is then "
            "compiled again"
        )
    return Kernels(library, declarations)


def holds(path: Path, digest: str) -> bool:
    """True if the library was compiled from declarations with this digest. Reads the file without loading it."""
    return f"{MARKER}{digest}\0".encode() in path.read_bytes()


@functools.cache
def declared() -> Declarations:
    """The declarations of `exports.h`, as it was when this was first called."""
    return parse(HEADER.read_text(encoding="utf-8"))


def parse(text: str) -> Declarations:
    """Declarations from the text of a header. Raises `DeclarationError` for what it has no rule for."""
    reader = _Reader()
    rest = re.sub(r"//[^\n]*|^#[^\n]*", "", text, flags=re.MULTILINE)
    rest = " ".join(rest.split())
    while rest:
        for pattern, read in reader.rules:
            if match := pattern.match(rest):
                read(*match.groups())
                rest = rest[match.end() :].lstrip()
                break
        else:
            raise DeclarationError(f"{HEADER.name}: cannot read: {rest[:80]}")
    body = "\n".join(reader.assertions)
    digest = hashlib.sha256(body.encode()).hexdigest()[:16]
    checks = (
        f"// Made from {HEADER.name} by declarations.py.\n"
        f'#include "{HEADER.name}"\n\n#include <cstddef>\n#include <type_traits>\n\n{body}\n\n'
        f'const char* eft_declarations() {{ return "{MARKER}{digest}"; }}\n'
    )
    return Declarations(reader.enums, reader.structs, reader.functions, checks, digest)


class _Reader:
    """Declarations read so far, and what the compiler is to assert of them."""

    def __init__(self) -> None:
        self.rules: list[tuple[re.Pattern[str], Callable[..., None]]] = [
            (_ENUM, self._enum),
            (_STRUCT, self._struct),
            (_FUNCTION_TYPE, self._function_type),
            (_FUNCTION, self._function),
            (_TYPED_FUNCTION, self._typed_function),
        ]
        self.enums: dict[str, dict[str, int]] = {}
        self.structs: dict[str, type[ctypes.Structure]] = {}
        self.functions: dict[str, Function] = {}
        self.assertions = [
            _assertion(f"sizeof({name}) == {ctypes.sizeof(kind)}", f"{name} has another size for ctypes")
            for name, kind in _SCALARS.items()
        ]
        self._types: dict[str, tuple[dict[str, str], Any]] = {}

    def _enum(self, name: str, body: str) -> None:
        values = {}
        for entry in _parts(body, ","):
            key, _, value = entry.partition(" = ")
            if not value.isdecimal():
                raise DeclarationError(f"{HEADER.name}: {name}: expected `NAME = number`, got `{entry}`")
            values[key] = int(value)
            self.assertions.append(_assertion(f"{key} == {value}", f"{name} has another value"))
        self.enums[name] = values

    def _struct(self, name: str, body: str) -> None:
        entries = [_declaration(entry) for entry in _parts(body, ";")]
        fields = [
            (field, self._ctype(kind) * int(count) if count else self._ctype(kind)) for kind, field, count in entries
        ]
        made = type(name, (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})
        self.structs[name] = made
        self.assertions.append(
            _assertion(f"sizeof({name}) == {ctypes.sizeof(made)}", f"{name} has another size for ctypes")
        )
        for kind, field, count in entries:
            place = getattr(made, field)
            same = f"std::is_same_v<decltype({name}::{field}), {kind}{f'[{count}]' if count else ''}>"
            self.assertions.append(
                _assertion(
                    f"offsetof({name}, {field}) == {place.offset} && sizeof({name}::{field}) == {place.size} && {same}",
                    f"{name}::{field} lies elsewhere, or is of another type, for ctypes",
                )
            )

    def _function_type(self, name: str, parameters: str) -> None:
        self._types[name] = self._signature("void", parameters)

    def _function(self, returns: str, name: str, parameters: str) -> None:
        returns = returns.strip()
        self._add(name, returns, *self._signature(returns, parameters))

    def _typed_function(self, kind: str, name: str) -> None:
        if kind not in self._types:
            raise DeclarationError(f"{HEADER.name}: {name} is of type {kind}, which is not declared above it")
        self._add(name, "void", *self._types[kind])

    def _add(self, name: str, returns: str, parameters: dict[str, str], prototype: Any) -> None:
        if name in self.functions:
            raise DeclarationError(f"{HEADER.name} declares {name} twice")
        self.functions[name] = Function(name, returns, parameters, prototype)
        kind = f"{returns}({', '.join(parameters.values())})"
        names = ", ".join(parameters)
        self.assertions.append(f"// {name}({names})")  # callers pass arguments by name
        self.assertions.append(_assertion(f"std::is_same_v<decltype({name}), {kind}>", f"{name} is of another type"))

    def _signature(self, returns: str, text: str) -> tuple[dict[str, str], Any]:
        parameters = {}
        for entry in _parts(text, ","):
            kind, name, count = _declaration(entry)
            if count or name in parameters:
                raise DeclarationError(f"{HEADER.name}: cannot read the parameter `{entry}`")
            parameters[name] = kind
        if returns not in _RESULTS:
            raise DeclarationError(f"{HEADER.name}: functions return {', '.join(_RESULTS)}, not `{returns}`")
        return parameters, ctypes.CFUNCTYPE(_RESULTS[returns], *(self._ctype(kind) for kind in parameters.values()))

    def _ctype(self, kind: str) -> Any:
        """The type for ctypes: pointers to structs and functions are of their type, those to numbers are addresses."""
        base, stars = kind.replace("const", "").replace(" ", "").rstrip("*"), kind.count("*")
        if base in self._types:
            if stars != 1:
                raise DeclarationError(f"{HEADER.name}: expected `{base}*`, got `{kind}`")
            return self._types[base][1]
        if base in self.structs:
            made: Any = self.structs[base]
            for _ in range(stars):
                made = ctypes.POINTER(made)
            return made
        if base not in _SCALARS and not (base == "void" and stars):
            raise DeclarationError(f"{HEADER.name}: the type `{kind}` is not known")
        return ctypes.c_void_p if stars else _SCALARS[base]


def _parts(text: str, separator: str) -> Iterator[str]:
    return (part.strip() for part in text.split(separator) if part.strip())


def _declaration(text: str) -> tuple[str, str, str | None]:
    """Type, name and count of an array's elements."""
    match = _DECLARATION.fullmatch(text)
    if match is None:
        raise DeclarationError(f"{HEADER.name}: expected `type name` or `type name[count]`, got `{text}`")
    kind, name, count = match.groups()
    return kind, name, count


def _assertion(condition: str, message: str) -> str:
    return f'static_assert({condition}, "{message}");'
