"""Registries of plug-ins: built-ins, entry points, ``module:Name`` and ``path/to/file.py:Name``."""

from __future__ import annotations

import builtins
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import entry_points
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Generic, TypeVar

from rlzoo.errors import UserError, unknown

T = TypeVar("T")
ENGINE = Path(__file__).parent
LIBRARIES = {"site-packages", "dist-packages"}


class Registry(Generic[T]):
    """A table of names, filled from a package or module of built-ins and from entry points when it is first read.

    A plug-in that is broken has no entry: its name is in `broken`, and looking it up raises UserError.
    """

    def __init__(
        self, kind: str, builtins: str, group: str, check: Callable[[str, Any], object] = lambda spec, found: None
    ) -> None:
        """``kind`` names the entries in messages; ``builtins`` is a module, ``group`` a group of entry points.

        ``check`` raises UserError, which names the spec, for what is not of the kind.
        """
        self.kind, self._builtins, self._group, self._check = kind, builtins, group, check
        self._entries: dict[str, T] = {}
        self._broken: dict[str, str] = {}
        self._filled = False
        _REGISTRIES.append(self)

    def add(self, name: str, entry: T) -> T:
        """Register ``entry`` and return it. Raises UserError if another entry has the name."""
        name = canonical(name)
        present = self._entries.get(name)
        if present is not None and _origin(present) != _origin(entry):
            raise _TakenError(
                f"{self.kind} {name!r} is registered twice: by {_origin(present)} and by {_origin(entry)}; "
                "give one of them another name",
                name,
            )
        self._entries[name] = entry
        return entry

    def names(self) -> list[str]:
        """The names that `get` finds, sorted."""
        self._fill()
        return sorted(self._entries.keys() - self._broken.keys())

    def get(self, spec: str) -> T:
        """Look up a name, or import ``module:Name`` or ``file.py:Name``.

        Raises UserError if there is no such thing, if it is broken, and if it is not of the kind.
        """
        found: T = load_attribute(spec, self.kind) if ":" in spec else self._named(spec)
        self._check(spec, found)
        return found

    def _named(self, spec: str) -> T:
        if spec.endswith(".py"):
            there = _public(_load_file(Path(spec), self.kind))
            raise UserError(f"{self.kind} {spec!r}: write {spec}:Name; it has: {', '.join(there) or 'nothing'}")
        name, known = canonical(spec), self.names()
        if name in self._broken:
            raise UserError(self._broken[name])
        if name not in known:
            raise unknown(self.kind, spec, known)
        return self._entries[name]

    def items(self) -> Iterator[tuple[str, T]]:
        """All names with their entries, sorted by name."""
        for name in self.names():
            yield name, self._entries[name]

    def _fill(self) -> None:
        if self._filled:
            return
        self._filled = True  # before importing: a module may look up a name
        self._broken = {}
        try:
            self._import_all()
        except BaseException:
            self._filled = False
            raise

    def _import_all(self) -> None:
        package = importlib.import_module(self._builtins)
        for module in pkgutil.iter_modules(getattr(package, "__path__", ())):  # a module has none
            if not module.name.startswith("_"):
                name = f"{self._builtins}.{module.name}"
                with self._telling(module.name, f"module {name}", "repair or remove its file"):
                    importlib.import_module(name)
        for point in entry_points(group=self._group):
            package_name = point.dist.name if point.dist else "a package"
            label = f"{point.name!r} ({point.value}) of {package_name}"
            with self._telling(point.name, label, "repair or uninstall that package"):
                found = point.load()
                self._check(point.name, found)
                self.add(point.name, found)

    @contextmanager
    def _telling(self, name: str, what: str, remedy: str) -> Iterator[None]:
        """In this context, what goes wrong in loading a plug-in is kept for those who ask for its name."""
        try:
            yield
        except _TakenError as error:
            self._broken[error.name] = str(error)
        except (Exception, SystemExit) as error:
            reason = str(error) if isinstance(error, UserError) else one_line(error)
            self._broken[canonical(name)] = f"{self.kind} {what} cannot be loaded: {reason}; {remedy}"


_REGISTRIES: list[Registry[Any]] = []


def broken_plugins() -> list[str]:
    """A line for each broken plug-in in the registries that have been read: what it is, and why it cannot be used."""
    return [line for registry in _REGISTRIES for _, line in sorted(registry._broken.items())]


class _TakenError(UserError):
    """A name that another entry has."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


def canonical(name: str) -> str:
    """The canonical spelling of a name: ``IW_SFT`` and ``iw-sft`` are the same."""
    return name.strip().lower().replace("_", "-")


def _origin(entry: object) -> str:
    return f"{getattr(entry, '__module__', '?')}:{getattr(entry, '__qualname__', entry)}"


def one_line(error: BaseException) -> str:
    """An exception in one line, with the innermost line of a plug-in's code that led to it."""
    lines = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    place = next((f" ({file.name} line {line})" for file, line in reversed(lines) if _is_plug_in(file)), "")
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}{place}"


def _is_plug_in(file: Path) -> bool:
    """Whether a file is neither of the engine nor of a library."""
    if file.suffix != ".py" or LIBRARIES & {*file.parts} or file.is_relative_to(sysconfig.get_path("stdlib")):
        return False
    return not file.is_relative_to(ENGINE) or file.parent.name in ("algorithms", "rewards")


def load_attribute(spec: str, kind: str) -> Any:
    """Import ``package.module:Name`` or ``path/to/file.py:Name``, which runs the code of that module.

    Raises UserError, which names the ``kind`` of thing, if it cannot be imported or lacks the name.
    """
    where, _, attribute = spec.rpartition(":")
    if not where or not attribute:
        raise UserError(f"{kind} {spec!r}: write package.module:Name or path/to/file.py:Name")
    module = _load_file(Path(where), kind) if where.endswith(".py") else _load_module(where, kind)
    try:
        return getattr(module, attribute)
    except AttributeError:
        there = ", ".join(_public(module)) or "nothing"
        raise UserError(f"{kind} {spec!r}: {where} has no {attribute!r}; it has: {there}") from None


def _public(module: ModuleType) -> list[str]:
    """The public names of a module, less the modules, classes and functions of other packages that it imports."""
    package = module.__name__.partition(".")[0]

    def is_foreign(value: object) -> bool:
        of = value.__module__ if isinstance(value, (type, FunctionType)) else package
        return isinstance(value, ModuleType) or of.partition(".")[0] != package

    return [name for name, value in vars(module).items() if not (name.startswith("_") or is_foreign(value))]


def _load_module(name: str, kind: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{kind} module {name!r} cannot be imported: {one_line(error)}") from error


def _load_file(path: Path, kind: str) -> ModuleType:
    """The module of a file. It can import the modules in its folder as a script can (``import helpers``)."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{kind} file {str(path)!r} does not exist")
    own = path.stem if path.stem.isidentifier() else f"file_{_digest(path)}"
    name = f"{_package(path.parent)}.{own}"
    if name in sys.modules:
        return sys.modules[name]
    importlib.invalidate_caches()  # files beside it may be new
    spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, UserError):
            raise
        raise UserError(f"{kind} file {str(path)!r} cannot be loaded: {one_line(error)}") from error
    return module


# Modules next to a plug-in's file. Each folder is a package of its own, so that two folders may both have a helpers.py;
# sys.path is unchanged, so that no module of a user hides one that rlzoo or another package imports.

_PREFIX = "rlzoo_plugin_"


def _digest(path: Path) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()[:8]


def _package(folder: Path) -> str:
    """The name of the package that a folder's modules are imported as part of."""
    name = _PREFIX + _digest(folder)
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    return name


class _Loader(SourceFileLoader):
    """Loads a module whose ``import`` statements look in its own folder first."""

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


class _Finder:
    """Finds modules in the packages of plug-ins' folders, and nothing else."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name.startswith(_PREFIX) else None
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def _import(
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] = (),
    level: int = 0,
) -> ModuleType:
    package = str((globals or {}).get("__name__", "")).partition(".")[0]
    if level == 0 and package in sys.modules and _is_beside(package, name.partition(".")[0]):
        return builtins.__import__(name, {"__package__": package}, None, fromlist, 1)
    return builtins.__import__(name, globals, locals, fromlist, level)


def _is_beside(package: str, name: str) -> bool:
    """Whether ``import name`` means a module in a plug-in's folder: as in a script, but never hiding Python's own.

    A module that an ordinary import finds in that same place is imported that way, as it may be elsewhere too.
    """
    if not package.startswith(_PREFIX) or name in sys.stdlib_module_names:
        return False
    beside = PathFinder.find_spec(f"{package}.{name}", sys.modules[package].__path__)
    if beside is None:
        return False
    try:
        plain = importlib.util.find_spec(name)
    except ValueError:  # a module without a spec
        return False
    if plain is None:
        return True
    if beside.origin is None:  # a folder without __init__.py: any module of that name comes first
        return plain.origin is None and not set(_places(beside)) <= set(_places(plain))
    return beside.origin != plain.origin


def _places(package: ModuleSpec) -> Sequence[str]:
    return list(package.submodule_search_locations or ())
