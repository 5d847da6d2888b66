"""Requests made up from the OpenAPI document find no fault in any route."""

import httpx

EXAMPLES = 60
WORKING = {"/v1/completions", "/v1/chat/completions", "/detokenize"}
"""Where some of the requests must have done what was asked, or they test little."""


def test_every_route(url, app, fuzz):
    document = app.openapi()
    assert document["paths"].keys() > WORKING
    with httpx.Client(base_url=url, timeout=60) as client:
        for path, methods in document["paths"].items():
            for method in methods:
                num_done = fuzz(
                    client, document, method, path, models=["tiny", "sql"], examples=EXAMPLES
                )
                assert num_done > 0 or path not in WORKING, path
