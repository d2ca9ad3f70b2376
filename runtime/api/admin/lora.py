"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's shape: what works with its server works here."""

import asyncio

from litestar import MediaType, Response, post
from msgspec import Struct

from runtime.api.admin.library import allowed_folder, library_of
from runtime.api.auth import ADMIN
from runtime.api.docs import BODY
from runtime.api.handle import AnyRequest, api_of
from runtime.api.openai.intake import Intake
from runtime.errors import InvalidRequest, NotFound


class LoadLoraRequest(Struct, kw_only=True):
    """What to load, and what to call it."""

    lora_name: str
    lora_path: str
    """A folder on the server, in PEFT's format; under trainer.data_roots or the state directory."""
    load_inplace: bool = False
    """Take the place of a loaded adapter of this name."""


class UnloadLoraRequest(Struct, kw_only=True):
    """What to unload."""

    lora_name: str


_load = Intake(LoadLoraRequest)
_unload = Intake(UnloadLoraRequest)


@post("/v1/load_lora_adapter", status_code=200, opt={ADMIN: True, BODY: LoadLoraRequest}, media_type=MediaType.TEXT)
async def load_lora_adapter(request: AnyRequest) -> Response[str]:
    """Copy an adapter into the library, and serve it under its name."""
    api = api_of(request)
    library = library_of(api)
    asked = await _load.read(request, api)
    if not asked.lora_name or not asked.lora_path:
        missing = "lora_path" if asked.lora_name else "lora_name"
        raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.", param=missing)
    folder = await asyncio.to_thread(allowed_folder, asked.lora_path, api, param="lora_path")
    await library.load_external(asked.lora_name, folder, inplace=asked.load_inplace)
    return Response(f"Success: LoRA adapter '{asked.lora_name}' added successfully.", media_type=MediaType.TEXT)


@post("/v1/unload_lora_adapter", status_code=200, opt={ADMIN: True, BODY: UnloadLoraRequest}, media_type=MediaType.TEXT)
async def unload_lora_adapter(request: AnyRequest) -> Response[str]:
    """Serve an adapter no more. Its versions stay in the library."""
    api = api_of(request)
    library = library_of(api)
    asked = await _unload.read(request, api)
    if not asked.lora_name:
        raise InvalidRequest("'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name")
    if library.resolve(asked.lora_name) is None:
        raise NotFound(f"The lora adapter '{asked.lora_name[:200]}' cannot be found.", param="lora_name")
    await library.unload(asked.lora_name)
    return Response(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.", media_type=MediaType.TEXT)
