"""One file for each address; `ROUTERS` is their list."""

from __future__ import annotations

from transept.serving.endpoints import answers, chat, classifications, completions, embeddings, fill, models, state

ROUTERS = tuple(module.router for module in (chat, completions, embeddings, fill, classifications, answers, models, state))
