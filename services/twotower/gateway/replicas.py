"""The replicas as this gateway knows them: a snapshot of the registry, and a channel to each context."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

import grpc

from twotower.broker.registry import Replica, ReplicaKind
from twotower.errors import BrokerUnavailable
from twotower.gateway.brain import Snapshot
from twotower.gateway.prefixes import PromptChains, SentPrefixes
from twotower.internal.v1 import context_pb2_grpc, scoring_pb2_grpc
from twotower.prefix.chain import ChainSpec, unpack_links
from twotower.rpc.channel import open_channel

log = logging.getLogger(__name__)

POLL_S = 1.0

REFUSED_S = 2.0
"""How long a context that refused a session (it is draining, say) is passed over."""

FORGOTTEN_S = 3.0
"""How long a registry that names nobody any more is not believed: a Redis that was restarted empty has forgotten
all, and each says within a second that it lives."""

DETOUR_SESSIONS = 2
DETOUR_SHARE = 0.25
"""A context that holds a prompt's prefix gets it unless it has this many sessions more than the least loaded one, or
this share of its capacity, whichever is more."""


class ReplicaSource(Protocol):
    """What is needed of `broker.registry.Registry`."""

    async def replicas(self, kind: ReplicaKind) -> Sequence[Replica]:
        """All live replicas of a kind. Raises BrokerUnavailable."""
        ...


class ContextReplica:
    """A context as seen from here."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.announced_load = 0
        self.capacity = 0
        self.chunking: ChainSpec | None = None
        """How it names prefixes; None: it keeps none."""
        self.held: frozenset[bytes] = frozenset()
        """Short links of the prefixes it holds, of which it announces some."""
        self.in_flight = 0
        """Sessions of this gateway on it."""
        self.passed_over_until = 0.0
        self._lost = False
        self._channel = open_channel(address)
        self.stub = context_pb2_grpc.ContextTowerStub(self._channel)
        self.scoring = scoring_pb2_grpc.ScoringStub(self._channel)

    @property
    def load(self) -> int:
        """Sessions it holds, and those of this gateway that it may not have announced yet."""
        return self.announced_load + self.in_flight

    def announced(self, replica: Replica) -> None:
        """Take what it last said."""
        self.announced_load, self.capacity = replica.load, replica.capacity
        keeps = replica.chunk_tokens > 0
        self.chunking = ChainSpec(replica.identity, replica.dtype, replica.chunk_tokens) if keeps else None
        self.held = unpack_links(replica.prefixes)

    def lose(self) -> None:
        """A call broke: not to be used until the channel has connected again."""
        self._lost = True

    def usable(self, now: float) -> bool:
        """Whether a session may be opened on it."""
        if self._lost:
            self._lost = self._channel.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.READY
        return not self._lost and now >= self.passed_over_until

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close(None)


class ReplicaPool:
    """Live contexts and the number of live denoisers, refreshed in the background, never per request."""

    def __init__(self, source: ReplicaSource, keep_s: float, clock: Callable[[], float]) -> None:
        """`keep_s`: how long the last snapshot is used while the registry does not answer. `clock`: seconds, monotonic."""
        self._source = source
        self._keep_s = keep_s
        self._clock = clock
        self._refreshed = clock()
        self._empty_since: dict[ReplicaKind, float] = {}
        """When the registry first named nobody of a kind after it had named somebody; infinity: it still names somebody."""
        self._away = False
        self._live: dict[str, ContextReplica] = {}
        self._gone: list[ContextReplica] = []
        self._sent = SentPrefixes()
        self.denoisers = 0
        """Live denoiser workers."""
        self.snapshot = Snapshot()
        """As last announced; what the registry forgot all at once stays for a while."""
        self._none_since: dict[ReplicaKind, float] = {"context": -math.inf, "denoiser": -math.inf}
        """When the last live replica of a kind had gone; long ago: there was none yet."""

    @property
    def contexts(self) -> int:
        """Live context replicas."""
        return len(self._live)

    @property
    def away(self) -> bool:
        """Whether the registry does not answer."""
        return self._away

    def none_for_s(self, kind: ReplicaKind) -> float:
        """For how long no replica of a kind has been live; 0: one is, infinity: none has been yet."""
        live = self.contexts if kind == "context" else self.denoisers
        return 0.0 if live else self._clock() - self._none_since[kind]

    def pick(self, avoid: Collection[ContextReplica] = (), prompt: PromptChains | None = None) -> ContextReplica | None:
        """The usable context that holds most of the prompt's prefix, among those not overloaded; else the least loaded.

        Equals are told apart by chance, as other gateways choose too.
        """
        now = self._clock()
        usable = [replica for replica in self._live.values() if replica not in avoid and replica.usable(now)]
        least = min((replica.load for replica in usable), default=0)
        fit = [r for r in usable if r.load - least <= max(DETOUR_SESSIONS, DETOUR_SHARE * r.capacity)]
        return max(fit, key=lambda r: (self.expected_tokens(r, prompt), -r.load, random.random()), default=None)

    def expected_tokens(self, replica: ContextReplica, prompt: PromptChains | None) -> int:
        """Tokens of the prompt's prefix that a context probably need not read."""
        if prompt is None or replica.chunking is None:
            return 0
        chain = prompt.of(replica.chunking)
        return self._sent.chunks(chain, replica.address, replica.held) * replica.chunking.chunk_tokens

    def sent(self, replica: ContextReplica, prompt: PromptChains) -> None:
        """The prompt goes there: it will hold its prefix soon."""
        if replica.chunking is not None:
            self._sent.add(prompt.of(replica.chunking), replica.address)

    def pass_over(self, replica: ContextReplica) -> None:
        """It refused a session; others first for a while."""
        replica.passed_over_until = self._clock() + REFUSED_S

    async def refresh(self) -> None:
        """Take a new snapshot; while the registry does not answer, keep the last one for `keep_s`."""
        try:
            contexts = await self._source.replicas("context")
            denoisers = await self._source.replicas("denoiser")
            gateways = await self._source.replicas("gateway")
        except BrokerUnavailable as error:
            if not self._away:
                log.warning("%s; the last known replicas are used for %.0f s", error, self._keep_s)
            self._away = True
            if self._clock() - self._refreshed < self._keep_s:
                return
            self.denoisers = 0
            await self._take(())
            self._note_live()
            return
        if self._away:
            log.warning("the registry answers again")
        self._away = False
        self._refreshed = self._clock()
        if self._forgotten("denoiser", denoisers):
            denoisers = self.snapshot.denoisers
        else:
            self.denoisers = sum(replica.capacity > 0 for replica in denoisers)
        if self._forgotten("context", contexts):
            contexts = self.snapshot.contexts
        else:
            await self._take(contexts)
        self.snapshot = Snapshot(gateways, contexts, denoisers)
        self._note_live()

    def _note_live(self) -> None:
        now = self._clock()
        if self.contexts:
            self._none_since["context"] = now
        if self.denoisers:
            self._none_since["denoiser"] = now

    def _forgotten(self, kind: ReplicaKind, named: Sequence[Replica]) -> bool:
        """Whether a list that is empty all at once should not be believed yet."""
        if named:
            self._empty_since[kind] = math.inf
            return False
        # From the first empty list on, not from the last one that was not: Redis may have been away in between.
        since = self._empty_since.get(kind, -math.inf)
        if since == math.inf:
            since = self._empty_since[kind] = self._clock()
        return self._clock() - since < FORGOTTEN_S

    async def _take(self, contexts: Sequence[Replica]) -> None:
        taking = {replica.address: replica for replica in contexts if replica.capacity > 0}  # 0: it drains
        for address in self._live.keys() - taking.keys():
            self._gone.append(self._live.pop(address))
        for address, replica in taking.items():
            if address not in self._live:
                self._live[address] = ContextReplica(address)
            self._live[address].announced(replica)
        # Sessions may still run on a replica that is no longer announced (it drains, or Redis lost its entry).
        idle = [context for context in self._gone if context.in_flight == 0]
        self._gone = [context for context in self._gone if context.in_flight > 0]
        for context in idle:
            await context.close()

    async def watch(self, refreshed: Callable[[], Awaitable[None]]) -> None:
        """Refresh once a second, and call `refreshed` each time, until cancelled."""
        while True:
            try:
                await self.refresh()
                await refreshed()
            except Exception:
                log.exception("the replicas could not be refreshed")
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """Close all channels."""
        for replica in (*self._live.values(), *self._gone):
            await replica.close()
        self._live, self._gone = {}, []
