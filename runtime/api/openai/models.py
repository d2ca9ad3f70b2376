"""GET /v1/models; GET and DELETE /v1/models/{id}."""

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from litestar import delete, get
from msgspec import UNSET

from runtime.adapters.card import Card
from runtime.adapters.store import split_version
from runtime.api.admin.views import library_of
from runtime.api.handle import AnyRequest, api_of
from runtime.api.http.auth import ADMIN
from runtime.api.http.query import check_names
from runtime.api.http.record import RequestRecord, record_of
from runtime.api.openai.responses import ModelCard, ModelDeleted, ModelList
from runtime.errors import AdapterUnavailable, Conflict, Forbidden, ModelNotFound, NotFound
from runtime.text.chat_template import ChatTemplateError
from runtime.text.reasoning import ReasoningFormat, reasoning_format
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtime.adapters.store import Version
    from runtime.engine.service import EngineService


# -- served ----------------------------------------------------------------------------------------
#
# Resolve the `model` of a request: the base model, or one version of an adapter.

MAX_NAMED = 10
"""Most models that an error lists."""


@dataclass(frozen=True)
class Served:
    """The model of a request. Resolved once: the whole request keeps this version."""

    name: str
    """Name in the client's request; the answer repeats it."""
    service: "EngineService"
    version: "Version | None" = None
    """None: the base model."""
    own_tokenizer: Tokenizer | None = None
    """Tokenizer with the chat template and the tokens that go with the adapter; None: the base model's."""

    @property
    def key(self) -> str:
        """Value for `Submission.adapter`."""
        return self.version.key if self.version else ""

    @property
    def label(self) -> str:
        """Version for a response header: `name@3`, or `base`."""
        return self.version.id if self.version else "base"

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model's prompts and answers: with the chat template and tokens that an adapter was trained
        with."""
        return self.own_tokenizer or self.service.tokenizer

    @property
    def vocab_size(self) -> int:
        """Ids below this are valid."""
        return self.service.vocab_size if self.own_tokenizer is None else self.own_tokenizer.vocab_size

    @property
    def reasoning(self) -> ReasoningFormat | None:
        """Form of the reasoning of answers in chats; None if it is not split from them."""
        if self.own_tokenizer is None:
            return self.service.reasoning
        return reasoning_format(self.own_tokenizer.chat_template, self.service.settings.model.reasoning_parser)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an adapter's answers in chats, besides the base model's."""
        if self.version is None or self.service.adapters is None:
            return ()
        ends = (*self.tokenizer.eos_ids, *self.service.adapters.card(self.version).end_ids)
        limit = self.vocab_size
        return tuple(id for id in dict.fromkeys(ends) if id not in self.service.eos_ids and 0 <= id < limit)

    @property
    def text_end_ids(self) -> tuple[int, ...]:
        """Ids that end an adapter's answers to plain texts, besides the base model's."""
        if self.version is None or self.service.adapters is None:
            return ()
        id = self.service.adapters.card(self.version).eos_id
        return () if id is None or id in self.service.eos_ids or not 0 <= id < self.vocab_size else (id,)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end an adapter's answers in chats."""
        if self.version is None or self.service.adapters is None:
            return ()
        return self.service.adapters.card(self.version).stop

    @property
    def prompt_format(self) -> str | None:
        """Format of the adapter's training rows; None if unknown."""
        if self.version is None or self.service.adapters is None:
            return None
        prompt = self.service.adapters.card(self.version).prompt
        return prompt.format if prompt else None

    async def ready(self, record: RequestRecord) -> None:
        """Let a request name it. Submit before the next await, or it may be forgotten again.

        A key with only the scope inference may name any loaded version, but may load only versions that a name or an
        alias points to: otherwise its requests could evict the versions that others use.
        Raises `AdapterUnavailable`, `Forbidden`.
        """
        library = self.service.adapters
        if self.version is None or library is None:
            return
        if not (record.may_load or library.is_loaded(self.version) or library.is_name(self.name)):
            raise Forbidden(
                f"The version `{self.name[:200]}` is not in memory, and to have it loaded takes a key with the scope "
                "train or admin. Ask for the adapter by its name, or have the version promoted.",
                param="model",
            )
        await library.ready(self.version)


async def resolve_model(service: "EngineService", asked: str | None) -> Served:
    """As `find_model`; an adapter that is not known is looked for first, where the settings say so. Raises its errors
    and `AdapterUnavailable`."""
    if asked and asked != service.model_name and service.adapters is not None:
        await service.adapters.look_for(asked)
    served = find_model(service, asked)
    if served.version is None or service.adapters is None:
        return served
    card = service.adapters.card(served.version)
    if card.chat_template in (None, service.tokenizer.chat_template) and not card.changes_tokens:
        return served
    try:  # on a thread: it is compiled, once, and tried
        return replace(served, own_tokenizer=await asyncio.to_thread(_own_tokenizer, service, card))
    except (ChatTemplateError, ValueError) as error:
        raise AdapterUnavailable(f"The adapter `{served.label}` cannot be asked: {error}.") from error


def _own_tokenizer(service: "EngineService", card: Card) -> Tokenizer:
    tokenizer = service.tokenizer_of(card) or service.tokenizer
    source = card.chat_template
    return tokenizer if source in (None, tokenizer.chat_template) else tokenizer.with_template(source)


def find_model(service: "EngineService", asked: str | None) -> Served:
    """Resolve `asked`: the base model's name (or None), an adapter's, an alias, `name@3` for one version, or
    `name:ckpt-step-20` for a checkpoint of a job that runs.
    Raises `ModelNotFound`."""
    if asked is None or asked == service.model_name:
        return Served(service.model_name, service)
    version = service.adapters.resolve(asked) if service.adapters else None
    if version is None:
        there = ", ".join(f"`{served.name}`" for served in every_model(service)[:MAX_NAMED])
        raise ModelNotFound(f"The model `{asked[:200]}` does not exist. This server has {there}.", param="model")
    return Served(asked, service, version)


def every_model(service: "EngineService") -> list[Served]:
    """All models that can be requested: the base first, then adapters, each followed by its aliases, then the
    checkpoints of running jobs."""
    found = [Served(service.model_name, service)]
    if service.adapters is not None:
        for record in service.adapters.list():
            if record.served and service.adapters.fits(record.version):
                found += [Served(name, service, record.version) for name in (record.name, *record.aliases)]
        found += [Served(version.id, service, version) for version in service.adapters.checkpoints()]
    return found


_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")


@get("/v1/models")
async def list_models(request: AnyRequest) -> ModelList:
    """The models that can be requested: the base first, then adapters and aliases, then checkpoints of running jobs."""
    service = api_of(request).handle.require()
    return ModelList(data=[_describe(served) for served in every_model(service)])


@get("/v1/models/{model_id:path}")  # a path: names of hub models have a slash in them
async def retrieve_model(request: AnyRequest) -> ModelCard:
    """One model."""
    check_names(request, ())
    return _describe(await resolve_model(api_of(request).handle.require(), _model_id(request)))


@delete("/v1/models/{model_id:path}", status_code=200, opt={ADMIN: True})
async def delete_model(request: AnyRequest) -> ModelDeleted:
    """Delete a fine-tuned model: an adapter with all its versions, or one version, `name@3`. 409 for one that is in
    use, and for the served base model."""
    check_names(request, ())
    api, asked = api_of(request), _model_id(request)
    service = api.handle.require()
    if asked == service.model_name:
        raise Conflict(
            f"`{asked[:200]}` is the served base model, which only the server's end unloads: fine-tuned models can be "
            "deleted.",
            param="model",
            code="base_model",
        )
    library = library_of(api)
    if any(asked == version.id for version in library.checkpoints()):
        raise Conflict(
            f"`{asked[:200]}` is a checkpoint of a job that runs: it goes when the job has ended.", param="model"
        )
    try:
        if (record := library.find(asked)) is not None:
            if asked != record.name:
                raise Conflict(
                    f"`{asked[:200]}` is an alias of `{record.name}`: delete that, or the alias, with DELETE "
                    f"/admin/adapters/{record.name}/alias/{asked[:200]}.",
                    param="model",
                )
            await library.delete(asked)
        elif (parts := split_version(asked)) is not None:
            await library.delete_version(*parts)
        else:
            find_model(service, asked)  # raises
    except NotFound:
        raise ModelNotFound(f"The model `{asked[:200]}` does not exist.", param="model") from None
    record_of(request).target = asked
    return ModelDeleted(id=asked)


def _model_id(request: AnyRequest) -> str:
    return str(request.path_params["model_id"]).removeprefix("/")


def _describe(served: Served) -> ModelCard:
    service, version = served.service, served.version
    defaults = {name: value for name, value in service.sampling_defaults.changed.items() if name in _SAMPLING}
    if version is None or service.adapters is None:
        return ModelCard(
            id=served.name,
            created=service.created,
            root=service.label,
            max_model_len=service.max_model_len,
            default_sampling_params=defaults,
        )
    return ModelCard(
        id=served.name,
        created=int(version.created),
        root=str(service.adapters.directory(version)),
        parent=service.model_name,
        max_model_len=service.max_model_len,
        prompt_format=served.prompt_format or UNSET,
        default_sampling_params=defaults,
    )
