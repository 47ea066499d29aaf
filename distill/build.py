"""From a config node with `_target_` to an object, checked for being what its place in the configuration calls for.

Hydra's own `instantiate` calls anything that can be imported. Here a target is called only if it is a subclass of the
expected class, or a function whose return annotation is one: `_target_: os.system` is refused without being called.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from distill.errors import UserError, one_line

T = TypeVar("T")
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def resolve(target: str, kind: type[T]) -> Any:
    """Import a dotted name and check that calling it gives a `kind`.

    Raises:
        UserError: it can't be imported, or gives something else.
    """
    try:
        found = get_object(target)
        gives = found if inspect.isclass(found) else None
        if inspect.isfunction(found):
            gives = typing.get_type_hints(found).get("return")
    except Exception as error:
        raise UserError(
            f"_target_={target}: can't be imported ({one_line(error)}); give the dotted name of a {kind.__name__}"
        ) from error
    if not (inspect.isclass(gives) and issubclass(gives, kind)):
        raise UserError(
            f"_target_={target}: is not a {kind.__name__}, nor a function annotated to return one; it is not called"
        )
    return found


def bind(node: DictConfig, kind: type[T], **given: Any) -> tuple[Any, dict[str, Any]]:
    """The target of a node and the arguments for it: the node's own keys, and those of `given` that it takes.

    Raises:
        UserError: no `_target_`, a key that the target does not take, or one that it needs and is missing.
    """
    if not isinstance(node, DictConfig) or not node.get("_target_"):
        raise UserError(f"{node}: is not a {kind.__name__}; give a node with `_target_` and its arguments")
    arguments = typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
    target = resolve(arguments.pop("_target_"), kind)
    parameters = inspect.signature(target).parameters
    if unknown := [key for key in arguments if key not in parameters]:
        raise UserError(
            f"{target.__module__}.{target.__name__} takes no {unknown[0]!r}; it takes: {', '.join(parameters)}"
        )
    arguments |= {key: value for key, value in given.items() if key in parameters and key not in arguments}
    needed = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in VARIADIC and name not in arguments
    ]
    if needed:
        raise UserError(f"{target.__module__}.{target.__name__} needs {', '.join(needed)}")
    return target, arguments


def build(node: DictConfig, kind: type[T], **given: Any) -> T:
    """Call the target of a node; see `bind`."""
    target, arguments = bind(node, kind, **given)
    return target(**arguments)


def build_all(nodes: Mapping[str, DictConfig], kind: type[T], **given: Any) -> dict[str, T]:
    """Build each named node."""
    return {name: build(node, kind, **given) for name, node in nodes.items()}
