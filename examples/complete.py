"""Ask every adapter of a running server the same question, and show the experts it took.

Run: python examples/complete.py "I lost my card"
The server is http://127.0.0.1:8000, or MALORA_BASE_URL.
"""

from __future__ import annotations

import sys

from malora_client import Client, MaloraError


def main(prompt: str) -> None:
    with Client() as client:
        for model in client.models.list():
            reply = client.completions.create(
                model=model.id, prompt=prompt, max_tokens=16, temperature=0, include_routing=True
            )
            choice = reply.choices[0]
            print(f"{model.id}: {choice.text!r} ({choice.finish_reason})")
            for token in choice.routing or []:
                experts = ", ".join(f"{e.expert} ({e.gate:.2f})" for e in token.experts)
                print(f"    {token.token!r:<16} experts {experts}")


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "I lost my card")
    except MaloraError as error:
        sys.exit(str(error))
