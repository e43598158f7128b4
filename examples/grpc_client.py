"""The Python client of the gRPC API: blocks as they come, what they cost, errors by class, several requests at once.

python examples/grpc_client.py --target 127.0.0.1:50051
"""

from __future__ import annotations

import argparse
import asyncio

from twotower import Accepted, Block, Finished, InvalidArgument, Mode
from twotower.client import GatewayClient

PROMPT = "Tom owns 12 pens. On Friday he buys 6 more. On Saturday he loses 4 of them. How many pens does Tom have?"
OTHERS = (
    "Anna has 3 bags of 6 beads. On Monday she uses 9 beads. How many beads does Anna have now?",
    "Mia has 7 apples. On Monday she buys 2 boxes of 5 apples. How many apples does Mia have now?",
)


async def stream(client: GatewayClient) -> None:
    """One request: each block is shown as soon as the context tower has taken it."""
    async for event in client.generate(PROMPT, max_tokens=96, gamma=0.8):
        match event:
            case Accepted(prompt_tokens=tokens, warnings=warnings):
                print(f"[accepted: {tokens} prompt tokens]", *warnings)
            case Block(text=text):
                print(text, end="", flush=True)
            case Finished() as totals:
                print(totals.text)  # what was held back until the end was known
                print(f"[{totals.completion_tokens} tokens in {totals.blocks} blocks, {totals.forwards} forwards]")


async def text_of(client: GatewayClient, prompt: str, mode: Mode) -> str:
    """A whole text."""
    return "".join(
        [event.text async for event in client.generate(prompt, mode=mode, max_tokens=96) if not isinstance(event, Accepted)]
    )


async def main(target: str) -> None:
    """Everything, one after the other."""
    async with GatewayClient(target) as client:
        await client.wait_ready(30)
        model = await client.model()
        print(f"[{model.model}: blocks of {model.block_size}, {model.max_context} tokens of context]")
        await stream(client)

        # Requests that run at once share the towers' forwards.
        texts = await asyncio.gather(
            *(text_of(client, prompt, mode) for prompt in OTHERS for mode in (Mode.DIFFUSION, Mode.AR))
        )
        for text in texts:
            print(text.splitlines()[-1])

        # A request that can never succeed is refused before any work, by the name of its field.
        try:
            await text_of(client, "", Mode.DIFFUSION)
        except InvalidArgument as error:
            print(f"[refused: {error}]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Stream text from a gateway over gRPC.")
    parser.add_argument("--target", default="127.0.0.1:50051", metavar="HOST:PORT")
    asyncio.run(main(parser.parse_args().target))
