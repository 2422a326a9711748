"""One file for each address; `ROUTERS` is their list."""

from __future__ import annotations

from transept.serving.endpoints import (
    answers,
    chat,
    classifications,
    completions,
    embeddings,
    fill,
    inspect_ablation,
    inspect_attention,
    inspect_card,
    inspect_latency,
    inspect_lens,
    inspect_positions,
    inspect_rollout,
    models,
    state,
)

INSPECTOR = (inspect_attention, inspect_rollout, inspect_lens, inspect_ablation, inspect_positions, inspect_latency, inspect_card)
ROUTERS = tuple(
    module.router for module in (chat, completions, embeddings, fill, classifications, answers, *INSPECTOR, models, state)
)
