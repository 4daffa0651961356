import asyncio

import pytest

from service.api.state import ByteBudget
from service.core.errors import ProblemError


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), 5))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Users:
    """Tasks that hold bytes until they are told to let go."""

    def __init__(self, budget: ByteBudget) -> None:
        self.budget = budget
        self.holding: list[str] = []
        self.tasks: dict[str, asyncio.Task] = {}
        self.gates: dict[str, asyncio.Event] = {}

    async def start(self, name: str, amount: int) -> None:
        self.gates[name] = asyncio.Event()

        async def hold() -> None:
            async with self.budget.use(amount):
                self.holding.append(name)
                await self.gates[name].wait()
                self.holding.remove(name)

        self.tasks[name] = asyncio.create_task(hold())
        await settle()

    async def finish(self, name: str) -> None:
        self.gates[name].set()
        await settle()


def test_what_fits_is_had_at_once_and_given_back():
    async def scenario():
        budget = ByteBudget(10)
        async with budget.use(4), budget.use(6):
            assert budget.free == 0
        assert budget.free == 10

    run(scenario)


def test_more_than_there_is_is_413():
    async def scenario():
        async with ByteBudget(10).use(11):
            pass

    with pytest.raises(ProblemError, match="takes 11 bytes; at most 10") as caught:
        run(scenario)
    assert caught.value.status == 413


def test_first_come_first_served_and_the_large_one_is_not_overtaken():
    async def scenario():
        users = Users(ByteBudget(10))
        await users.start("a", 6)
        await users.start("large", 10)
        await users.start("small", 1)  # would fit, but came later
        assert users.holding == ["a"]
        await users.finish("a")
        assert users.holding == ["large"]
        await users.finish("large")
        assert users.holding == ["small"]
        await users.finish("small")
        assert users.budget.free == 10

    run(scenario)


def test_several_that_fit_together_are_served_together():
    async def scenario():
        users = Users(ByteBudget(10))
        await users.start("a", 10)
        await users.start("b", 5)
        await users.start("c", 5)
        await users.finish("a")
        assert users.holding == ["b", "c"]

    run(scenario)


def test_who_stops_waiting_lets_the_others_on():
    async def scenario():
        users = Users(ByteBudget(10))
        await users.start("a", 6)
        await users.start("large", 10)
        await users.start("small", 4)
        users.tasks["large"].cancel()
        await settle()
        assert users.holding == ["a", "small"]
        await users.finish("a")
        await users.finish("small")
        assert users.budget.free == 10

    run(scenario)


def test_who_is_cancelled_in_the_moment_of_being_served_keeps_nothing():
    async def scenario():
        users = Users(ByteBudget(10))
        await users.start("a", 10)
        await users.start("b", 7)
        users.gates["a"].set()
        await asyncio.sleep(0)  # a lets go, and b's turn is set; b has not run yet
        users.tasks["b"].cancel()
        await settle()
        assert users.holding == []
        assert users.budget.free == 10

    run(scenario)


def test_an_error_gives_the_bytes_back():
    async def scenario():
        budget = ByteBudget(10)
        with pytest.raises(KeyError):
            async with budget.use(10):
                raise KeyError
        assert budget.free == 10

    run(scenario)
