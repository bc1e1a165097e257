"""
A way to a server on which every answer takes a while.

`python -m tests.faults.slow_proxy PORT TARGET TARGET_PORT SECONDS` listens on 127.0.0.1.
What the server sends comes as many seconds later, in order and none of it lost.
"""

import asyncio
import sys
from contextlib import suppress

CHUNK = 1 << 16


async def carry(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter, seconds: float
) -> None:
    """Copy a stream to its end, each part when its time has come."""
    loop = asyncio.get_running_loop()
    parts: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due, data = await parts.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                return
            sink.write(data)
            await sink.drain()

    delivering = asyncio.create_task(deliver())
    with suppress(OSError):
        while data := await source.read(CHUNK):
            parts.put_nowait((loop.time() + seconds, data))
    parts.put_nowait((loop.time() + seconds, b""))
    with suppress(OSError):
        await delivering
    sink.close()


async def main(port: int, target: str, target_port: int, seconds: float) -> None:
    """Serve until killed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(target, target_port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(carry(reader, back, 0.0), carry(there, writer, seconds))

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(
        main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    )
