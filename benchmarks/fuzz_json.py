"""Mutations of JSON values, for fuzzing structured requests."""

from __future__ import annotations

import copy
import random
from typing import Any

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, 1e39, 2**31, 2**63, 2**64, 10**30),
    *("", "0", "images", "FP16", "BF16", "BYTES", "INT64", "\x00", "é", [], [[]], {}, [1], [True]),
)
_KEYS = (
    *("id", "parameters", "inputs", "outputs", "name", "shape", "datatype", "data"),
    *("binary_data_size", "binary_data", "binary_data_output", "sequence_id", "timeout"),
    *("shared_memory_region", "classification", "priority"),
)


def mutate_json(value: Any, chance: random.Random) -> Any:
    """Return a copy of a JSON value with a few random changes."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            return chance.choice(_VALUES)
        _change(*chance.choice(places), chance)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """List every container and key of a value, outermost first."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found: list[tuple[Any, Any]] = [(value, key) for key in keys]
    for key in keys:
        found += _places(value[key])
    return found


def _change(owner: Any, key: Any, chance: random.Random) -> None:
    old = owner[key]
    match chance.randrange(7):
        case 0:
            del owner[key]
        case 1 if type(old) is int:
            owner[key] = old + chance.choice((-1, 1, 4, 2**32))
        case 2:
            owner[key] = [old]
        case 3 if isinstance(owner, list):
            owner.insert(key, copy.deepcopy(old))
        case 4 if isinstance(owner, dict):
            owner[chance.choice(_KEYS)] = copy.deepcopy(old)
        case 5 if isinstance(owner, dict):
            owner[chance.choice(_KEYS)] = chance.choice(_VALUES)
        case _:
            owner[key] = copy.deepcopy(chance.choice(_VALUES))
