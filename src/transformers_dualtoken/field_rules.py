"""What arguments and fields may be: one [`Rule`] for each, which configs, recipes and calls are checked by."""

import numbers
from collections.abc import Callable
from dataclasses import dataclass, replace


def shown(value) -> str:
    """A value in a message, however long it is."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


@dataclass(frozen=True)
class Rule:
    """
    "`name` must be {what}, got ...": a `TypeError` of the wrong kind, a `ValueError` out of range, which only values of
    the right kind are asked for. `item` is the rule of every item of a list.
    """

    what: str
    is_kind: Callable[[object], bool] = lambda value: True
    in_range: Callable[[object], bool] = lambda value: True
    item: "Rule | None" = None

    def check(self, name: str, value) -> None:
        is_kind = self.is_kind(value)
        if not is_kind or not self.in_range(value):
            raise (ValueError if is_kind else TypeError)(f"`{name}` must be {self.what}, got {shown(value)}.")
        for index, item in enumerate(value or () if self.item else ()):
            self.item.check(f"{name}[{index}]", item)

    def check_given(self, **values) -> None:
        """Check those that are not `None`."""
        for name, value in values.items():
            if value is not None:
                self.check(name, value)

    def or_none(self) -> "Rule":
        return replace(
            self,
            what=f"{self.what} or None",
            is_kind=lambda value: value is None or self.is_kind(value),
            in_range=lambda value: value is None or self.in_range(value),
        )


def is_a(*types: type) -> Callable[[object], bool]:
    """A check of the type, to which True is no number."""
    return lambda value: isinstance(value, types) and (bool in types or not isinstance(value, bool))


def is_list_of(is_kind: Callable, *lengths: int) -> Callable[[object], bool]:
    """A check of all items; of any length if none is given."""
    is_list = is_a(list, tuple)
    return lambda value: is_list(value) and len(value) in (lengths or (len(value),)) and all(map(is_kind, value))


def within(kind: type, low: float, high: float, below: bool = False) -> Rule:
    """An integer, or with `float` any finite number: `low` included, `high` as well unless `below`."""
    limits = f"of at least {low} and below {high}" if below else f"from {low} to {high}"
    return Rule(
        f"{'an integer' if kind is int else 'a number'} {limits}",
        is_a(int) if kind is int else is_a(int, float),
        lambda value: low <= value <= high and not (below and value == high),
    )


def one_of(*choices) -> Rule:
    """A choice, by type too: 1 is no `True`."""
    names = [repr(choice) for choice in choices]
    return Rule(
        " or ".join(names) if len(names) == 2 else f"one of {', '.join(names)}",
        lambda value: any(type(value) is type(choice) for choice in choices),
        lambda value: value in [choice for choice in choices if type(value) is type(choice)],
    )


def at_least(low: float) -> Rule:
    return Rule(f"at least {low}", is_number, lambda value: value >= low)


def list_of(item: Rule, shortest: int, longest: int) -> Rule:
    count = shortest if shortest == longest else f"{shortest} to {longest}"
    return Rule(f"a list of {count} items", is_a(list, tuple), lambda value: shortest <= len(value) <= longest, item)


is_number, is_whole = is_a(numbers.Real), is_a(numbers.Integral)
FLAG = one_of(True, False)
WHOLE_FROM_0 = Rule("a whole number from 0", is_whole, lambda value: value >= 0)
WHOLE_FROM_1 = Rule("a whole number from 1", is_whole, lambda value: value >= 1)
