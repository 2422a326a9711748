"""Exact parameter counts of the published models, on the meta device (no memory)."""

from __future__ import annotations

import pytest
import torch

from transept.core.registry import all_families, size

PUBLISHED = {
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328,
    "llama-7b": 6_738_415_616,
    "llama2-70b": 68_976_648_192,
    "deepseek-v3": 671_026_404_352,
    "gpt-neo-125m": 125_198_592,
    "opt-125m": 125_239_296,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_number_of_parameters(name: str) -> None:
    family, spec = size(name)
    with torch.device("meta"):
        model = family.build(spec)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_every_size_of_every_page_can_be_built_and_says_its_name_s_size() -> None:
    """A name such as 'opt-13b' promises about 13 billion parameters; the papers round freely, so a quarter either way is allowed."""
    units = {"m": 1e6, "b": 1e9}
    checked = 0
    for family in all_families():
        for name, spec in family.sizes.items():
            with torch.device("meta"):
                count = sum(p.numel() for p in family.build(spec).parameters())
            tail = name.rsplit("-", 1)[-1]
            if tail[-1] in units and tail[:-1].replace(".", "").isdigit():
                promised = float(tail[:-1]) * units[tail[-1]]
                assert 0.75 * promised <= count <= 1.25 * promised, f"{name} has {count} parameters"
                checked += 1
    assert checked >= 20
