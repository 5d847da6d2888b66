"""Requests made up from the OpenAPI document find no fault in the engine either."""

import httpx

from malora.base_model import PATH as BASE

EXAMPLES = 25
PATHS = ("/v1/completions", "/v1/chat/completions")


def test_the_routes_that_compute(serve, adapters, fuzz):
    flags = ("--base", BASE, "--served-model-name", "base", "--adapters", adapters)
    limits = ("--max-output-tokens", 8, "--kv-cache-memory", "64MiB")
    with serve(*flags, *limits) as url, httpx.Client(base_url=url, timeout=60) as client:
        document = client.get("/openapi.json").json()
        for path in PATHS:
            models = ["base", "experts", "compact", "lora"]
            num_done = fuzz(client, document, "post", path, models=models, examples=EXAMPLES)
            assert num_done >= 3, path
        assert client.get("/health").is_success
        metrics = client.get("/metrics").text.splitlines()
    in_engine = [line for line in metrics if line.startswith("malora_num_requests_")]
    assert in_engine
    assert all(line.endswith(" 0.0") for line in in_engine)
