"""Noticing that a client has left. Web frameworks let a handler run on for nobody; ours stops."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from litestar.types import Receive

from runtime.api.errors import ClientDisconnected

T = TypeVar("T")


async def until_disconnect(receive: Receive) -> None:
    """Return when the client is gone. Only for a request whose body has been read."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises `ClientDisconnected` then."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(until_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected("The client left before its answer was ready.")
    finally:
        await cancel(task, gone)


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended, however they end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
