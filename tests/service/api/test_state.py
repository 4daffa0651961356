import asyncio
from contextlib import suppress

import pytest

from service.api.state import ByteBudget
from service.core.errors import ProblemError

pytestmark = pytest.mark.anyio


async def settle() -> None:
    for _ in range(9):
        await asyncio.sleep(0)


class Users:
    """Tasks that hold bytes until their gate opens."""

    def __init__(self, total: int) -> None:
        self.budget = ByteBudget(total)
        self.holding: list[str] = []
        self.tasks: dict[str, asyncio.Task] = {}
        self.gates: dict[str, asyncio.Event] = {}

    async def hold(self, name: str, amount: int) -> None:
        async with self.budget.use(amount):
            self.holding.append(name)
            try:
                await self.gates[name].wait()
            finally:
                self.holding.remove(name)

    async def start(self, **amounts: int) -> None:
        for name, amount in amounts.items():
            self.gates[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self.hold(name, amount))
            await settle()

    async def finish(self, name: str) -> list[str]:
        self.gates[name].set()
        await settle()
        return self.holding


async def test_free_bytes_are_held_at_once_and_given_back_even_after_an_error():
    budget = ByteBudget(10)
    with suppress(KeyError):
        async with budget.use(4), budget.use(6):
            assert budget.free == 0
            raise KeyError
    assert budget.free == 10
    with pytest.raises(ProblemError, match="takes 11 bytes; at most 10") as caught:
        async with budget.use(11):
            pass
    assert caught.value.status == 413


async def test_first_come_first_served_and_the_large_one_is_not_overtaken():
    users = Users(10)
    await users.start(a=6, large=10, small=1)  # small would fit, but came later
    assert users.holding == ["a"]
    assert await users.finish("a") == ["large"]
    assert await users.finish("large") == ["small"]
    await users.finish("small")
    assert users.budget.free == 10
    await users.start(a=10, b=5, c=5)
    assert await users.finish("a") == ["b", "c"]


async def test_a_cancelled_wait_lets_the_others_on():
    users = Users(10)
    await users.start(a=6, large=10, small=4)
    users.tasks["large"].cancel()
    await settle()
    assert users.holding == ["a", "small"]
    await users.finish("a")
    await users.finish("small")
    assert users.budget.free == 10


@pytest.mark.parametrize("turns", range(4))
async def test_a_wait_cancelled_at_the_moment_of_its_turn_keeps_nothing(turns):
    users = Users(10)
    await users.start(a=10, b=7)
    users.gates["a"].set()
    for _ in range(turns):
        await asyncio.sleep(0)
    users.tasks["b"].cancel()
    await settle()
    assert users.holding == []
    assert users.budget.free == 10
