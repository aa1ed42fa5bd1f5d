"""Under which names a model's state is saved, and in which file."""

from __future__ import annotations

from dataclasses import dataclass

from pipekern.runtime.blueprint import Blueprint


@dataclass(frozen=True)
class Names:
    """``first`` gives every name in the model's state the first one of what it is tied to, and that one ``unit``, the
    index of the unit whose file it is in.
    """

    first: dict[str, str]
    unit: dict[str, int]

    @staticmethod
    def of(blueprint: Blueprint) -> Names:
        known = set(blueprint.state)
        places: dict[int, str] = {}
        parameters = {name: place for name, place in blueprint.parameters.items() if name in known}
        shared = {name: places.setdefault(place, name) for name, place in parameters.items()}
        first: dict[str, str] = {}
        home: dict[str, int] = {}
        for index, unit in enumerate(unit for units in blueprint.stages for unit in units):
            for name in unit.state():
                if name in known:
                    first[name] = shared.get(name, name)
                    home.setdefault(first[name], index)
        return Names(first, home)

    @property
    def ties(self) -> dict[str, str]:
        """The first name of each other one."""
        return {name: first for name, first in self.first.items() if name != first}
