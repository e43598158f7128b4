"""Who is waited for, and for how long."""

from __future__ import annotations

import asyncio

from twotower.engine.gathering import Gathering

LONG_S = 60.0


async def _waits(gathering: Gathering) -> bool:
    waiting = asyncio.create_task(gathering.complete())
    for _ in range(5):
        await asyncio.sleep(0)
    waits = not waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    return waits


async def test_a_group_is_complete_when_its_last_has_come() -> None:
    gathering = Gathering(LONG_S)
    gathering.arrive("a", 3)
    assert await _waits(gathering)
    gathering.arrive("a", 3)
    gathering.arrive("b", 1)
    assert await _waits(gathering)
    gathering.arrive("a", 3)
    assert not await _waits(gathering)


async def test_an_arrival_wakes_who_waits() -> None:
    gathering = Gathering(LONG_S)
    gathering.expect("one")
    waiting = asyncio.create_task(gathering.complete())
    await asyncio.sleep(0)
    gathering.arrive("one")
    await asyncio.wait_for(waiting, 10)


async def test_who_will_not_come_is_not_waited_for() -> None:
    gathering = Gathering(LONG_S)
    gathering.expect("gone")
    gathering.forget("gone")
    gathering.forget("never known")
    assert not await _waits(gathering)


async def test_patience_ends_once() -> None:
    gathering = Gathering(0.01)
    gathering.arrive("a", 2)
    await gathering.complete()
    assert not await _waits(gathering)  # the one that did not come is waited for no more
    gathering.arrive("a", 2)  # late, it is the first of a group again, and its fellow has been
    await asyncio.wait_for(gathering.complete(), 10)


async def test_nonsense_about_a_group_holds_up_nobody() -> None:
    gathering = Gathering(LONG_S)
    for together in (0, -3):
        gathering.arrive("a", together)
    assert not await _waits(gathering)
