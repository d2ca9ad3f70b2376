"""The OpenAPI schema and a reference page made from it. Loads nothing from anywhere else."""

from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from runtime.version import version


def openapi_config() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="Eft", version=version(), path="/docs", render_plugins=[JsonRenderPlugin(path="/openapi.json")]
    )
