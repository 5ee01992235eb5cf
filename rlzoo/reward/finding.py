"""Finding rewards by name, and binding their options.

A reward has TRL's signature, ``reward(prompts, completions, **columns) -> list[float | None]``, sync or async, so that
rewards can be shared with TRL. Prompts and completions are strings or conversations.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar, cast

import pydantic

from rlzoo.errors import UserError, unknown
from rlzoo.registry import Registry, canonical, one_line
from rlzoo.reward.calling import (
    ENGINE,
    RAISED,
    VARIADIC,
    innermost,
    is_reward,
    parameters,
    required,
    takes_anything,
    unlike,
)
from rlzoo.reward.scoring import OnError, Reward

_rewards: Registry[Callable[..., Any]] = Registry("reward", "rlzoo.rewards", "rlzoo.rewards")
_Callable = TypeVar("_Callable", bound=Callable[..., Any])


def register_reward(reward: _Callable) -> _Callable:
    """Decorator: register a reward function or class under its ``name``, or else its Python name with dashes.

    Raises UserError if another reward has that name.
    """
    _rewards.add(_name_of(reward), reward)
    return reward


def list_rewards() -> list[str]:
    """The names of all registered rewards: built-in ones and those in entry points of installed packages."""
    return _rewards.names()


def get_reward(spec: Any, on_error: OnError = "fail") -> Reward:
    """The reward that ``spec`` describes.

    A spec is a name, ``package.module:Name``, ``path/to/file.py:Name``, a callable, a mapping ``{"name": any of these,
    **options}``, or a list of these, each with an optional ``"weight"``, for their weighted sum. Options are passed to
    the constructor of a class, bound to a function that takes completions, and passed to any other function, which is
    then a factory. A `Reward` is returned unchanged. ``on_error`` determines what happens to a row on which the reward
    fails. Raises UserError for an unknown name or option, and for anything that is not a reward.
    """
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        spec = {"name": "weighted", "of": spec}
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    if "name" not in options:
        raise UserError(f"reward {options!r:.200} has no name: write {{'name': ..., options}}")
    which = options.pop("name")
    found = _rewards.get(which) if isinstance(which, str) else which
    if isinstance(found, Reward) and not options:
        return found
    if not callable(found):
        raise UserError(f"reward {which!r:.200} is {type(found).__name__}: give a name, a function or a class")
    function = _built(found, options)
    return Reward(_name_of(function), function, on_error)


def _name_of(reward: Any) -> str:
    reward = innermost(reward)
    given = getattr(reward, "name", None)
    own = given if isinstance(given, str) else getattr(reward, "__name__", type(reward).__name__)
    return canonical(own)


def _built(found: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that scores completions, built from the object that a spec names and its options."""
    name, takes = _name_of(found), parameters(found)
    scores = not isinstance(found, type) and is_reward(takes)
    options = _checked_options(found, name, takes, options, anything=not scores and takes_anything(takes))
    if scores:
        return functools.partial(found, **options) if options else found
    missing = [p.name for p in required(takes) if p.name not in options]
    if missing:
        message = f"needs the option {missing[0]!r}: {{'name': ..., {missing[0]!r}: ...}}"
        if not isinstance(found, type):
            message = f"{unlike(found, takes)}; if it builds a reward, it {message}"
        raise UserError(f"reward {name!r} {message}")
    try:
        built = found(**options)
    except UserError:
        raise
    except RAISED as error:
        raise UserError(f"reward {name!r} cannot be built: {one_line(error)}") from error
    if not callable(built):
        raise UserError(
            f"reward {name!r} {unlike(found, takes)}; if it builds a reward, it must return a callable, "
            f"not {type(built).__name__}"
        )
    return cast(Callable[..., Any], built)


def _checked_options(
    found: Any, name: str, takes: Mapping[str, inspect.Parameter], options: Mapping[str, Any], anything: bool
) -> dict[str, Any]:
    known = [n for n, p in takes.items() if p.kind not in VARIADIC and n not in ENGINE]
    hints = _hints(found) if options else {}
    checked = {}
    for option, value in options.items():
        if option not in known and not anything:
            raise unknown(f"option of reward {name!r}", str(option), known)
        checked[option] = _typed(value, hints.get(option, Any), f"reward {name!r}: option {option!r}")
    return checked


def _typed(value: Any, hint: Any, what: str) -> Any:
    """The value, validated against its annotation; an annotation unknown to pydantic accepts anything."""
    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        raise UserError(f"{what} = {value!r:.60}: {error.errors()[0]['msg']}") from None
    except pydantic.errors.PydanticUserError:
        return value


def _hints(found: Any) -> dict[str, Any]:
    try:
        plain_class = isinstance(found, type) and not is_dataclass(found)
        return typing.get_type_hints(vars(found).get("__init__", found) if plain_class else found)
    except (NameError, TypeError):  # names imported for type checking only, or a callable without annotations
        return {}
