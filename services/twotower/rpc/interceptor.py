"""What every call passes through: it turns malformed messages, and the errors of servicers, into statuses."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from twotower.errors import InvalidArgument, TwoTowerError
from twotower.rpc.errors import MAX_DETAILS, error_metadata
from twotower.rpc.health import CHECK
from twotower.rpc.limits import CallLimits
from twotower.rpc.logs import MAX_LINE
from twotower.status import status_of

log = logging.getLogger(__name__)

Behavior = Callable[[Any, Any], Any]


MALFORMED = object()
"""Stands for a message that could not be parsed, until the code that can return a status sees it."""


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Ends a call that raised with the status of status.py; errors that are not ours are logged, and "internal error" is sent.

    A message that is no protobuf becomes an InvalidArgument and a line in the log. gRPC is given every method's requests as a
    stream, so that even a single request is read here, within the limits; on the wire there is no difference.
    """

    def __init__(self, limits: CallLimits) -> None:
        self._limits = limits
        self._handlers: dict[str, Any] = {}  # only of methods that exist, so that clients cannot make it grow

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, wrapped; None where there is none."""
        method = handler_call_details.method
        if method in self._handlers:
            return self._handlers[method]
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # no such method
            return None
        kind = _KINDS[handler.request_streaming, handler.response_streaming]
        make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        wrapped = self._handlers[method] = make(
            _wrap(getattr(handler, kind), method, handler.request_streaming, self._limits),
            request_deserializer=_forgiving(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )
        return wrapped


_KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


def _forgiving(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """`deserializer` in a form that does not raise, for which gRPC would answer UNKNOWN and log a traceback."""

    def parse(message: bytes) -> Any:
        try:
            return deserializer(message)
        except Exception as error:
            log.warning("a message that is not valid protobuf was refused: %s", str(error)[:MAX_LINE])
            return MALFORMED

    return parse


class _Messages:
    """The messages of a call. Raises InvalidArgument for one that is malformed."""

    def __init__(self, requests: AsyncIterable[Any]) -> None:
        self._requests = requests
        self._iterator: AsyncIterator[Any] | None = None  # made on first use: an iterator that is never used warns

    def __aiter__(self) -> _Messages:
        return self

    async def __anext__(self) -> Any:
        if self._iterator is None:
            self._iterator = aiter(self._requests)
        request = await anext(self._iterator)
        if request is MALFORMED:
            raise InvalidArgument("message", "is not valid protobuf for this method")
        return request


def _wrap(behavior: Behavior, method: str, request_streaming: bool, limits: CallLimits) -> Behavior:
    """Wrap `behavior`, an async function or generator: it is given valid messages only, and its errors become statuses."""
    # Health checks get an answer, however busy this process is.
    call = contextlib.nullcontext if method == CHECK else limits.call

    async def given(requests: Any) -> Any:
        """The argument for `behavior`."""
        messages = _Messages(requests)
        return messages if request_streaming else await limits.first_message(messages)

    if inspect.isasyncgenfunction(behavior):

        async def generate(requests: Any, context: Any) -> AsyncIterator[Any]:
            responses = None
            try:
                asked = await given(requests)
                with call():
                    responses = behavior(asked, context)
                    async for response in responses:
                        yield response
            except Exception as error:
                await _abort(error, context, method)
            finally:
                if responses is not None:
                    await responses.aclose()  # a cancelled call ends its generator now, not at garbage collection

        return generate
    assert inspect.iscoroutinefunction(behavior), f"{method} is not async"

    async def answer(requests: Any, context: Any) -> Any:
        try:
            asked = await given(requests)
            with call():
                return await behavior(asked, context)
        except Exception as error:
            await _abort(error, context, method)

    return answer


async def _abort(error: Exception, context: Any, method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):  # the servicer chose its status itself
        raise error
    if isinstance(error, TwoTowerError):
        await context.abort(status_of(error).grpc, str(error)[:MAX_DETAILS], error_metadata(error))
    log.error("%s failed", method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error", error_metadata(TwoTowerError()))
