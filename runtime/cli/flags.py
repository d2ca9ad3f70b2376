"""A flag for every setting, made from the schema, and the settings of a command line."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import msgspec
from cyclopts import Group, Parameter

from runtime.cli.output import UsageError
from settings import fields, values
from settings.fields import Field
from settings.load import Loaded, load
from settings.schema import Settings

P = ParamSpec("P")
R = TypeVar("R")

ConfigFile = Annotated[
    Path | None,
    Parameter(help="TOML file with settings; default: what EFT_CONFIG names, else ./eft.toml where it exists."),
]
"""The type of a command's `config` parameter."""

Json = Annotated[bool, Parameter(help="Print JSON, for programs.", negative="", show_default=False)]

MODEL_SECTIONS = ("model", "parallel", "cache", "scheduler", "limits", "observability")
"""Sections of settings for a command that loads a model without serving it over HTTP."""

_METAVAR = {"count": "COUNT", "bytes": "SIZE", "seconds": "TIME"}


def with_settings(*sections: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a command that takes `**flags` a flag for every field of these sections (default: all).

    A field for which the command has its own parameter (`model`) is skipped. A flag that is not given is None.
    """

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {parameter.name for parameter in own}
        made = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(field))
            for field in fields.fields()
            if field.name not in taken and (not sections or field.section in sections)
        ]
        command.__signature__ = signature.replace(parameters=own + made)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in own + made}
        return command

    return decorate


def read_settings(flags: dict[str, Any], config: Path | None, **more: Any) -> Loaded:
    """The settings of a command that was decorated with `with_settings`; a model of the library is named by its
    directory. Raises `SettingsError`."""
    loaded = load(flags={**flags, **more}, file=config)
    return msgspec.structs.replace(loaded, settings=with_library_model(loaded.settings))


def with_library_model(settings: Settings) -> Settings:
    """The settings with `NAME@VERSION`, a whole model that a job has trained, as the directory that it is in. It is
    served as NAME where the settings give no other name."""
    label = settings.model.model
    if "@" not in label or Path(label).expanduser().exists():
        return settings
    from runtime.checkpoints.model_library import ModelLibrary  # imports torch, which few commands need
    from runtime.support.state_directory import state_directory

    if (found := ModelLibrary(state_directory(settings)).find(label)) is None:
        return settings
    name = settings.model.served_model_name or label.rpartition("@")[0]
    model = msgspec.structs.replace(settings.model, model=str(found), served_model_name=name)
    return msgspec.structs.replace(settings, model=model)


def refuse_settings(flags: dict[str, Any], config: Path | None) -> None:
    """Raise `UsageError` if settings were given to a command that uses a server, and loads nothing."""
    given = [fields.by_name()[name].flag for name, value in flags.items() if value is not None]
    if config is not None:
        given.append("--config")
    if given:
        raise UsageError(f"{given[0]} is for a model that is loaded here; a server has settings of its own")


def _annotation(field: Field) -> Any:
    shown = values.show(field, field.default)
    return Annotated[
        _type(field),
        Parameter(
            name=field.flag,
            help=field.doc,
            group=_group(field.section),
            show_default=(lambda _: shown) if shown else False,
            negative="" if field.base is tuple else None,
            metavar=_METAVAR.get(field.unit or "") or ("NUMBER" if field.base is int else None),
            allow_leading_hyphen=True,  # so that `--port -1` is a value out of range, not a flag
        ),
    ]


def _type(field: Field) -> Any:
    """Type that cyclopts parses. Numbers stay text: `settings.values` holds their units and limits."""
    if field.base is bool:
        return bool | None
    if field.base is tuple:
        return list[str] | None
    return Literal[field.choices] | None if field.choices else str | None


def _group(section: str) -> Group:
    order = list(fields.sections()).index(section)
    return Group(section.capitalize(), help=fields.sections()[section].__doc__ or "", sort_key=10 + order)
