"""GET /v1/models and /v1/models/{id}."""

from typing import TYPE_CHECKING

from litestar import get

from runtime.api.handle import AnyRequest, api_of
from runtime.api.openai.intake import check_model
from runtime.api.openai.responses import Model, ModelList

if TYPE_CHECKING:
    from runtime.service import EngineService


@get("/v1/models")
async def list_models(request: AnyRequest) -> ModelList:
    """The models that can be asked for."""
    return ModelList(data=[_describe(api_of(request).handle.require())])


@get("/v1/models/{model_id:path}")  # a path: names of hub models have a slash in them
async def retrieve_model(request: AnyRequest) -> Model:
    """One model."""
    service = api_of(request).handle.require()
    check_model(str(request.path_params["model_id"]).removeprefix("/"), service.model_name)
    return _describe(service)


def _describe(service: "EngineService") -> Model:
    return Model(
        id=service.model_name,
        created=service.created,
        root=service.model_name,
        max_model_len=service.max_model_len,
    )
