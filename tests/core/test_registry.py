"""Families are found by path, imported when asked for, and may lie outside the package; importing the package loads no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from transept.core import registry
from transept.core.errors import ConfigError, SourceError

PAGE = """
from dataclasses import dataclass
from torch import nn
from transept.core.registry import Family
from transept.core.spec import Spec

@dataclass(frozen=True, kw_only=True)
class OwnSpec(Spec):
    dim: int

SIZES = {"own-size": OwnSpec(dim=3)}
FAMILY = Family(name="own_family_of_a_test", spec=OwnSpec, build=lambda s: nn.Linear(s.dim, s.dim), sizes=SIZES, tiny={})
"""


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    out = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_importing_the_package_loads_no_torch() -> None:
    """Neither torch nor anything heavy, nor a page; `dir` and an unknown attribute do not change that."""
    heavy = "{'torch', 'numpy', 'transformers', 'jaxtyping', 'tokenizers', 'safetensors', 'jinja2', 'pydantic'}"
    loaded = json.loads(
        python(f"""
import sys, json, transept
dir(transept)
try: transept.nothing
except AttributeError as e: assert 'load' in str(e)
print(json.dumps(sorted({heavy} & set(sys.modules) | {{m for m in sys.modules if m.startswith('transept.')}})))
""")
    )
    assert loaded == []


def test_listing_families_imports_none() -> None:
    found, loaded = json.loads(
        python("""
import sys, json
from transept.core import registry
print(json.dumps([sorted(registry.families()), [m for m in sys.modules if m == 'torch' or m.startswith('transept.models')]]))
""")
    )
    assert {"gpt", "gpt_neo", "opt", "llama", "deepseek_v3"} <= set(found)
    assert loaded == []


def test_one_family_is_imported_alone() -> None:
    pages = json.loads(
        python("""
import sys, json
from transept.core import registry
registry.family('opt')
print(json.dumps([n for n, m in registry.families().items() if m in sys.modules]))
""")
    )
    assert pages == ["opt"]


def test_every_page_keeps_its_name_and_its_forms_are_its_own() -> None:
    """Names are file names, no two families share an architecture or a size's name, and every Spec is of the page's class."""
    families = registry.all_families()
    assert [family.name for family in families] == list(registry.families())
    forms = [form.architecture for family in families for form in family.published]
    assert len(forms) == len(set(forms))
    sizes = [name for family in families for name in family.sizes]
    assert len(sizes) == len(set(sizes))
    for family in families:
        assert all(type(spec) is family.spec for spec in (*family.sizes.values(), *family.tiny.values()))
        for form in family.published:
            found, same = registry.by_architecture(form.architecture)
            assert found is family and same is form


def test_sizes_are_found_by_name() -> None:
    family, spec = registry.size("gpt2")
    assert family.name == "gpt" and spec == family.sizes["gpt2"]
    family, spec = registry.size("llama")
    assert spec is next(iter(family.sizes.values()))
    with pytest.raises(ConfigError, match="'gtp2'.*nearest: 'gpt2'"):
        registry.size("gtp2")


def test_a_page_outside_the_package_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_added", {})
    page = tmp_path / "own.py"
    page.write_text(PAGE)
    family = registry.add(page)
    assert registry.family("own_family_of_a_test") is family
    assert registry.size("own-size")[1] == family.sizes["own-size"]
    with pytest.raises(ConfigError, match="nearest: 'own_family_of_a_test'"):
        registry.family("own_family_of_test")


def test_a_page_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no family page"):
        registry.add(tmp_path / "absent.py")
    text = tmp_path / "page.txt"
    text.write_text("FAMILY = 1")
    with pytest.raises(SourceError, match="not a Python file"):
        registry.add(text)
