"""News as server-sent events, for whoever stays on the line."""

import contextlib
import json
from collections.abc import AsyncGenerator, Mapping

from aiohttp import web

HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
SILENCE = b":\n\n"
"""A comment: it says that the line still holds."""


async def stream(
    request: web.Request, news: AsyncGenerator[Mapping[str, object], None]
) -> web.StreamResponse:
    """
    Send each piece of news until there is no more of it, or nobody hears it.

    What the first piece raises is the caller's to answer.
    """
    response = web.StreamResponse(headers=HEADERS)
    async with contextlib.aclosing(news):
        first = await anext(news)
        with contextlib.suppress(ConnectionResetError):
            await response.prepare(request)
            await response.write(message(first))
            async for piece in news:
                await response.write(message(piece))
    return response


def message(piece: Mapping[str, object]) -> bytes:
    """Return a piece of news as it is sent; what is empty is silence."""
    if not any(piece.values()):
        return SILENCE
    return b"data: " + json.dumps(piece).encode() + b"\n\n"
