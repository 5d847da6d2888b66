"""Stream from every adapter of a running server at once, in one batch there.

Run: python examples/stream_async.py "I lost my card"
The server is http://127.0.0.1:8000, or MALORA_BASE_URL.
"""

from __future__ import annotations

import asyncio
import sys

from malora_client import AsyncClient, MaloraError


async def stream(client: AsyncClient, model: str, prompt: str) -> None:
    async with await client.completions.create(
        model=model, prompt=prompt, max_tokens=32, stream=True
    ) as chunks:
        async for chunk in chunks:
            for choice in chunk.choices:
                print(f"{model}: {choice.text!r}", flush=True)


async def main(prompt: str) -> None:
    async with AsyncClient() as client:
        models = await client.models.list()
        await asyncio.gather(*(stream(client, model.id, prompt) for model in models))


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "I lost my card"))
    except MaloraError as error:
        sys.exit(str(error))
