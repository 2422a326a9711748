"""Which families exist: every file under models/ is one page, found by its path and imported when it is first asked for.

A page defines FAMILY, a `Family`. A page outside the package joins with `add(path)`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transept.core.errors import ConfigError, SourceError, nearest
from transept.core.spec import Spec

_PAGES = Path(__file__).parents[1] / "models"
_added: dict[str, str] = {}


@dataclass(frozen=True)
class Published:
    """One published form of a family: the architecture that a file declares, and the two tables that read and write it.

    `architecture` is the name in config.json's `architectures`, or `gguf:NAME` for GGUF's `general.architecture`. `names` is the
    weight map and `fields` the configuration table (both of `transept.mapping`). `build` wires the module where this form has another head
    than the family's own.
    """

    architecture: str
    names: Any
    fields: Any
    build: Callable[[Any], Any] | None = None
    model_type: str = ""


@dataclass(frozen=True)
class Family:
    """What a page exports: its Spec class, its wiring, its sizes, a tiny size for the contract tests, and its published forms."""

    name: str
    spec: type[Spec]
    build: Callable[[Any], Any]
    sizes: Mapping[str, Spec]
    tiny: Mapping[str, Spec]
    published: tuple[Published, ...] = ()
    exempt: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    def form(self, architecture: str) -> Published:
        """The published form of that name; an unknown one is refused with the nearest."""
        for form in self.published:
            if form.architecture == architecture:
                return form
        names = [form.architecture for form in self.published]
        raise ConfigError(
            f"family {self.name} has no published form {architecture!r}{nearest(architecture, names)}; it has {', '.join(names)}"
        )


def families() -> dict[str, str]:
    """Family name -> module name of its page, without importing one."""
    pages = {p.stem: "transept.models." + p.relative_to(_PAGES).with_suffix("").as_posix().replace("/", ".")
             for p in sorted(_PAGES.glob("*/*.py")) if p.stem != "__init__"}
    return {**pages, **_added}


def family(name: str) -> Family:
    """The page of that name, imported now; an unknown name is refused with the nearest."""
    known = families()
    if name not in known:
        raise ConfigError(f"no family is called {name!r}{nearest(name, known)}; known are {', '.join(sorted(known))}")
    page = sys.modules.get(known[name]) or importlib.import_module(known[name])
    return page.FAMILY


def all_families() -> list[Family]:
    """Every page, imported."""
    return [family(name) for name in families()]


def by_architecture(name: str) -> tuple[Family, Published]:
    """The family and form that a checkpoint's declared architecture names (law 7: never guessed from a file's name or keys)."""
    # The pages that spell the name come first, so that loading one model does not import every family.
    spelling = [family(label) for label, module in families().items() if _spells(module, name)]
    for pages in (spelling, None):
        forms = {form.architecture: (fam, form) for fam in (all_families() if pages is None else pages) for form in fam.published}
        if name in forms:
            return forms[name]
    raise ConfigError(f"the checkpoint declares the architecture {name!r}, which no family knows{nearest(name, forms)}")


def _spells(module: str, name: str) -> bool:
    path = _PAGES.parents[1].joinpath(*module.split(".")).with_suffix(".py")
    return path.is_file() and f'"{name}"' in path.read_text(encoding="utf-8")


def sizes() -> dict[str, tuple[Family, Spec]]:
    """Every published size of every family."""
    return {label: (fam, spec) for fam in all_families() for label, spec in fam.sizes.items()}


def size(name: str) -> tuple[Family, Spec]:
    """The family and Spec of a published size such as 'gpt2-xl'; a family's name, or the beginning of a size's, stands for its first
    size."""
    known = sizes()
    if name in known:
        return known[name]
    begun = [label for label, (fam, _) in known.items() if fam.name == name or label.startswith(f"{name}-")]
    if not begun:
        raise ConfigError(f"no family has a size called {name!r}{nearest(name, known)}; known are {', '.join(sorted(known))}")
    return known[begun[0]]


def add(path: str | Path) -> Family:
    """Register a page that lies outside the package, named by the user; returns its Family."""
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"there is no family page at {path}")
    name = f"transept_family_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    found: Family = module.FAMILY
    _added[found.name] = name
    return found


