"""GET /v1/models and /v1/models/{id}."""

from litestar import get

from runtime.api.handle import AnyRequest, api_of
from runtime.api.openai.responses import Model, ModelList
from runtime.api.openai.served import Served, every_model, find_model


@get("/v1/models")
async def list_models(request: AnyRequest) -> ModelList:
    """The models that can be asked for: the base first, then adapters and aliases, then checkpoints of running jobs."""
    service = api_of(request).handle.require()
    return ModelList(data=[_describe(served) for served in every_model(service)])


@get("/v1/models/{model_id:path}")  # a path: names of hub models have a slash in them
async def retrieve_model(request: AnyRequest) -> Model:
    """One model."""
    asked = str(request.path_params["model_id"]).removeprefix("/")
    return _describe(find_model(api_of(request).handle.require(), asked))


def _describe(served: Served) -> Model:
    service, version = served.service, served.version
    return Model(
        id=served.name,
        created=service.created if version is None else int(version.created),
        root=service.model_name,
        parent=None if version is None else service.model_name,
        max_model_len=service.max_model_len,
    )
