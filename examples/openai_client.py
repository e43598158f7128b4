"""OpenAI's client against a gateway: a completion, a stream, log probabilities, parameters that OpenAI does not have.

python examples/openai_client.py --base-url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse

from openai import BadRequestError, OpenAI

PROMPT = "Tom owns 12 pens. On Friday he buys 6 more. On Saturday he loses 4 of them. How many pens does Tom have?"


def main(base_url: str) -> None:
    """Everything, one after the other."""
    with OpenAI(base_url=base_url, api_key="unused", max_retries=3) as client:  # 429 and 503 are tried again
        model = client.models.list().data[0].id
        print(f"[{model}]")

        whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=96)
        print(whole.choices[0].text)

        # What OpenAI's API has no name for goes into extra_body. Forwards are what a request costs.
        fast = client.completions.create(model=model, prompt=PROMPT, max_tokens=96, extra_body={"gamma": 0.5, "steps": 2})
        assert fast.usage is not None
        print(f"[{fast.usage.completion_tokens} tokens, {(fast.usage.model_extra or {})['forwards']} forwards]")

        # A stream brings a block at a time.
        pieces = client.completions.create(model=model, prompt=PROMPT, max_tokens=96, stream=True)
        print(" | ".join(repr(piece.choices[0].text) for piece in pieces if piece.choices and piece.choices[0].text))

        sure = client.completions.create(model=model, prompt=PROMPT, max_tokens=16, logprobs=2)
        logprobs = sure.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.token_logprobs is not None
        for token, logprob in zip(logprobs.tokens[:3], logprobs.token_logprobs[:3], strict=True):
            print(f"[{token!r}: {logprob:.4f}]")

        try:
            client.completions.create(model=model, prompt=PROMPT, extra_body={"gamma": 1.5})
        except BadRequestError as error:
            print(f"[refused: {error.body['message'] if isinstance(error.body, dict) else error}]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Use a gateway by OpenAI's client.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", metavar="URL")
    main(parser.parse_args().base_url)
