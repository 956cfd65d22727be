"""Which of the teacher's classes each class of a data set is: by hand, by name, by number or by order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raydfkd.config.schema import Count, Text
from raydfkd.errors import RecipeError, close_to

ClassMap = dict[Text, Count] | tuple[Text, ...]
"""Numbers of the teacher's classes by name, or the names in the order of those."""
_SAID = 5
"""Names that a line lists at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """How the classes of a data set are found among the teacher's."""

    what: str
    """What one of them is called in messages, such as "class folder"."""
    given: ClassMap = ()
    """What the recipe says of them."""
    is_sorted: bool = True
    """Whether their order is only that of their names; else it is the set's own, and the teacher's likely the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """The classes of a data set among the teacher's."""

    labels: tuple[int, ...]
    """The teacher's class of each of them."""
    names: tuple[str, ...]
    """A name for each of the teacher's classes."""
    notes: tuple[str, ...]
    """What the user should know of it, a line each."""


def match_classes(
    found: Sequence[str], matching: Matching, *, classes: int, teacher_names: tuple[str, ...] | None
) -> Matched:
    """Find each of the classes ``found`` among the teacher's.

    What the recipe says comes first; then names, in which case, spaces, hyphens and underscores do not matter; then
    numbers, where all of the others are numbers; then their order, where there are as many as the teacher has and none
    is a number.

    Args:
        found: their names.
        matching: how.
        classes: number of the teacher's.
        teacher_names: theirs; None where nobody knows them.

    Raises:
        RecipeError: a class is none of the teacher's, or may be several; or nobody knows which it is.
    """
    labels = _by_hand(found, matching, classes)
    rest = [name for name in found if name not in labels]
    notes = []
    if teacher_names is not None and _are_alike(found, teacher_names):
        labels = {**dict(zip(found, range(classes), strict=True)), **labels}
    elif by_name := _by_name(rest, teacher_names or (), matching.what):
        labels |= by_name
    elif all(name.isdecimal() for name in rest):
        labels |= {name: int(name) for name in rest if int(name) < classes}
    elif len(found) == classes and not labels and not any(name.isdecimal() for name in found):
        labels = {name: label for label, name in enumerate(found)}
        if matching.is_sorted or teacher_names is not None:
            order = "in sorted order" if matching.is_sorted else "in their own order"
            notes.append(
                f"real_data: its {classes} classes ({_some(found)}) are taken for the teacher's {order}; another one "
                "is given as real_data.classes"
            )
    unknown = [name for name in found if name not in labels]
    if unknown:
        raise RecipeError(_complaint(unknown, found, matching.what, classes, teacher_names))
    ordered = tuple(labels[name] for name in found)
    names = list(teacher_names or map(str, range(classes)))
    if teacher_names is None:
        for name, label in labels.items():
            names[label] = name
    absent = [names[label] for label in sorted(set(range(classes)) - set(ordered))]
    if absent:
        notes.append(f"real_data has no images of {len(absent)} of the teacher's {classes} classes ({_some(absent)})")
    return Matched(labels=ordered, names=tuple(names), notes=tuple(notes))


def _by_hand(found: Sequence[str], matching: Matching, classes: int) -> dict[str, int]:
    given = matching.given
    labels = dict(given) if isinstance(given, dict) else {name: label for label, name in enumerate(given)}
    for name, label in labels.items():
        if label >= classes:
            raise RecipeError(f"real_data.classes.{name} is {label}, but the teacher's classes are 0 to {classes - 1}")
        if name not in found and isinstance(given, dict):
            meant = close_to(name, found)
            remedy = f"did you mean {meant}?" if meant else f"there are {_some(sorted(found))}"
            raise RecipeError(f"real_data.classes.{name}: there is no such {matching.what}; {remedy}")
    return {name: label for name, label in labels.items() if name in found}


def _by_name(found: Iterable[str], teacher_names: Sequence[str], what: str) -> dict[str, int]:
    exact = _positions(teacher_names)
    plain = _positions([_plain(name) for name in teacher_names])
    first = _positions([_plain(name.partition(",")[0]) for name in teacher_names])
    labels: dict[str, int] = {}
    for name in found:
        short = _plain(name.partition(",")[0])
        places = exact.get(name) or plain.get(_plain(name)) or first.get(short) or []
        if len(places) > 1:
            raise RecipeError(
                f"real_data: {what} {name!r} may be any of the teacher's classes {', '.join(map(str, places))}, which "
                f"have that name; say which, as real_data.classes={{{name}: {places[0]}}}"
            )
        if places:
            labels[name] = places[0]
    return labels


def _positions(names: Sequence[str]) -> dict[str, list[int]]:
    positions: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        positions.setdefault(name, []).append(label)
    return positions


def _are_alike(found: Sequence[str], names: Sequence[str]) -> bool:
    return [_plain(name.partition(",")[0]) for name in found] == [_plain(name.partition(",")[0]) for name in names]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _complaint(
    unknown: Sequence[str], found: Sequence[str], what: str, classes: int, teacher_names: tuple[str, ...] | None
) -> str:
    by_hand = f"real_data.classes={{{unknown[0]}: NUMBER}}"
    if all(name.isdecimal() for name in unknown):
        return (
            f"real_data: {what} {unknown[0]!r} is none of the teacher's classes, whose numbers are 0 to {classes - 1}; "
            f"rename it, or say which it is, as {by_hand}"
        )
    if teacher_names is None:
        return (
            f"real_data: nobody knows which of the teacher's {classes} classes each {what} is ({_some(unknown)}); give "
            f"teacher.class_names, or {by_hand}"
        )
    meant = close_to(unknown[0], teacher_names) if len(unknown) < len(found) else None
    names = f"did the teacher call it {meant!r}?" if meant else f"those are {_some(teacher_names)};"
    others = f" (nor are {_some(unknown[1:])})" if len(unknown) > 1 else ""
    return (
        f"real_data: {what} {unknown[0]!r} is none of the teacher's {classes} classes{others}; {names} rename it, "
        f"say which it is, as {by_hand}, or leave it out"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SAID} more" if len(names) > _SAID else ""
    return ", ".join(names[:_SAID]) + more
