"""POST /admin/cache/reset."""

from litestar import post
from msgspec import Struct

from runtime.api.auth import ADMIN
from runtime.api.handle import AnyRequest, api_of


class CacheReset(Struct):
    """What was forgotten."""

    blocks: int
    """KV blocks that could have been found again."""


@post("/admin/cache/reset", status_code=200, opt={ADMIN: True})
async def reset_cache(request: AnyRequest) -> CacheReset:
    """Forget all cached prefixes. Running requests are not disturbed; new ones compute their prompts anew."""
    service = api_of(request).handle.require()
    return CacheReset(blocks=await service.reset_prefixes())
