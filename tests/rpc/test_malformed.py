"""Messages that are no protobuf, or are and mean nothing, to every method of every real service."""

from __future__ import annotations

import asyncio
import collections
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.gateways import gateway
from tests.support.mutations import is_valid, mutated
from tests.support.scripted_context import ScriptedContext
from tests.support.tokenizers import VOCAB_SIZE, write_byte_tokenizer
from tests.support.towers import towers
from twotower.engine.local import LocalEngine
from twotower.internal.v1 import context_pb2, link_pb2
from twotower.request import GenerationParams
from twotower.v1 import inference_pb2
from twotower.wire.params import params_to_pb

COUNT = 400
"""Messages for each method."""

PARAMS = GenerationParams(max_tokens=8, block_size=4)

GENERATE = inference_pb2.GenerateRequest(
    text="the fox", max_tokens=8, block_size=4, steps=4, gamma=0.5, temperature=1.0, top_k=3, top_p=0.5, seed=7, stop=["a", "b"]
)
OPEN = context_pb2.OpenRequest(request_id="1", prompt=inference_pb2.TokenIds(ids=[5, 6, 7]), params=params_to_pb(PARAMS))
LINK = link_pb2.WorkerMessage(hello=link_pb2.Hello(schema_version=3, checkpoint_id="nobody's", worker_id="w"))
HEALTH = {
    "/grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest(service="twotower.v1.Inference"),
    "/grpc.health.v1.Health/Watch": health_pb2.HealthCheckRequest(service="twotower.v1.Inference"),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": reflection_pb2.ServerReflectionRequest(
        file_containing_symbol="twotower.v1.Inference"
    ),
}
GATEWAY = {
    "/twotower.v1.Inference/Generate": GENERATE,
    "/twotower.v1.Inference/GetModel": inference_pb2.GetModelRequest(),
}
CONTEXT = {"/twotower.internal.v1.ContextTower/Open": OPEN, "/twotower.internal.v1.ContextTower/Link": LINK}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_tiny_checkpoint(path, vocab_size=VOCAB_SIZE, block_size=4)
    write_byte_tokenizer(path)
    return path


async def code_of(channel: grpc.aio.Channel, path: str, data: bytes) -> grpc.StatusCode:
    """How a call with one message ends; one that would go on is left after a moment."""
    call = channel.stream_stream(path)(iter([data]), timeout=0.5)  # type: ignore[call-arg]  # bytes as they are
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError:
        pass
    return await call.code()


async def check(address: str, methods: dict[str, Message], log: pytest.LogCaptureFixture) -> None:
    at_once = asyncio.Semaphore(32)
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:

        async def one(path: str, data: bytes, valid: bool) -> tuple[str, bool, grpc.StatusCode]:
            async with at_once:
                return path, valid, await code_of(channel, path, data)

        sent = [
            one(path, data, is_valid(data, type(message)))
            for seed, (path, message) in enumerate(methods.items())
            for data in mutated(message, seed, COUNT)
        ]
        codes = collections.Counter(await asyncio.gather(*sent))
    for path, message in methods.items():
        malformed = {code for (where, valid, code) in codes if where == path and not valid}
        assert malformed == {grpc.StatusCode.INVALID_ARGUMENT}, (path, codes)
        others = {code for (where, valid, code) in codes if where == path and valid}
        assert not others & {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}, (path, type(message), codes)
    assert not [record for record in log.records if record.exc_info]
    assert sum("not valid protobuf" in record.getMessage() for record in log.records) == sum(
        count for (_, valid, _), count in codes.items() if not valid
    )


async def test_to_a_gateway(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with gateway(checkpoint, ScriptedContext([5, 6, 7] * 100)) as running:
        await check(running.grpc, {**GATEWAY, **HEALTH}, caplog)
        async with running.client() as client:
            assert [event async for event in client.generate("the fox", max_tokens=4)]


async def test_to_a_context(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with towers(checkpoint) as running:
        await check(running.service.sessions.address, {**CONTEXT, **HEALTH}, caplog)
        running.start_worker()
        tokens, _ = await running.generate([5, 6, 7], PARAMS)
    assert tokens == LocalEngine(checkpoint, threads=1).generate([5, 6, 7], PARAMS).token_ids
