"""`priority` decides who is next where there is not room for all."""

import asyncio

import httpx

from malora.base_model import PATH as BASE


async def waiting(client):
    """How many requests wait in the engine, by its own account."""
    text = (await client.get("/metrics")).text
    values = [
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("malora_num_requests_waiting{")
    ]
    assert values
    return sum(values)


async def test_the_urgent_overtake_those_that_wait(serve, adapters):
    flags = ("--base", BASE, "--served-model-name", "base", "--adapters", adapters)
    with serve(*flags, "--max-num-seqs", 1, "--kv-cache-memory", "64MiB") as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            finished = []

            async def ask(name, num_tokens, **fields):
                body = {"prompt": "Once", "max_tokens": num_tokens, "ignore_eos": True, **fields}
                reply = await client.post("/v1/completions", json=body)
                assert reply.json()["usage"]["completion_tokens"] == num_tokens
                finished.append(name)

            async def queue(name, position, **fields):
                task = asyncio.create_task(ask(name, 4, **fields))
                while await waiting(client) < position:
                    await asyncio.sleep(0.01)
                return task

            for model in ("experts", "lora"):  # one that is still loading is overtaken
                await ask(model, 1, model=model)
            finished.clear()
            running = asyncio.create_task(ask("running", 400, model="base"))
            # Ever more urgent, the last two of other adapters; None is the default, 0.
            tasks = [
                await queue("later", 1, model="base", priority=7),
                await queue("default", 2, model="base"),
                await queue("soon", 3, model="experts", priority=-1),
                await queue("now", 4, model="lora", priority=-5),
            ]
            assert not running.done()
            await asyncio.gather(running, *tasks)
    assert finished == ["running", "now", "soon", "default", "later"]
