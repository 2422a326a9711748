"""POST /v1/inspect/ablation: the answer with and without some heads."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from fastapi import APIRouter, Request
from starlette.responses import Response

from transept.blocks.encoder import TokenHead
from transept.core.errors import InputError
from transept.core.shapes import Float, Tensor
from transept.inspection.attention import of_kind
from transept.inspection.interventions import ablated, divergence, probabilities
from transept.inspection.watch import heads_off
from transept.serving.endpoints.inspected import Look, answer, guesses, looked, numbers
from transept.serving.replies import AblationReply, documented
from transept.serving.requests import AblationRequest
from transept.serving.wire import Route

router = APIRouter(route_class=Route)


@router.post("/v1/inspect/ablation", response_model=None, responses=documented(AblationReply))
async def ablation(body: AblationRequest, request: Request) -> Response:
    """What is predicted and written with all heads, and with the named ones giving zeros."""

    def work(look: Look) -> dict[str, Any]:
        names = named(look, body)
        before, after = ablated(look.module, look.ids, names, look.source)
        place = where(look, before)
        sides = [side(look, body, found, place) for found in (before, after)]
        for one, off in zip(sides, ([], names), strict=True):
            one["text"] = written(look, off, body.max_tokens)
        return {"tokens": look.tokens(), "before": sides[0], "after": sides[1], **moved(before, after, place)}

    return await looked(request, body, "ablation", work)


def named(look: Look, body: AblationRequest) -> list[str]:
    """The heads by the names that `heads_off` takes."""
    names = []
    for i, head in enumerate(body.heads):
        layers = of_kind(look.module, head.kind or look.kind)
        if head.layer >= len(layers) or head.head >= layers[head.layer].heads:
            most = max(one.heads for one in layers)
            raise InputError(
                f"heads.{i}: the layers are 0 to {len(layers) - 1} and the heads 0 to {most - 1}, found {head.layer} and {head.head}"
            )
        names.append(f"{layers[head.layer].name}.head[{head.head}]")
    return names


def where(look: Look, found: Any) -> int | None:
    """The position whose guesses are told: a mask, else the last; None where the whole text has one answer, or none."""
    logits = getattr(found, "logits", None)
    if logits is None or logits.ndim < 3:
        return None
    mask = look.served.tokenizer.mask_id
    ids = look.ids[0].tolist()
    return ids.index(mask) if mask in ids else len(ids) - 1


def at(found: Any, place: int | None) -> Float[Tensor, "v"] | None:
    """The scores there."""
    logits = getattr(found, "logits", None)
    scored = logits is not None and (place is not None or (logits.ndim == 2 and logits.shape[1] > 1))
    return (logits[0] if place is None else logits[0, place]) if logits is not None and scored else None


def side(look: Look, body: AblationRequest, found: Any, place: int | None) -> dict[str, Any]:
    """One side of the comparison, but for its text."""
    labels = look.served.model.labels if place is None or isinstance(getattr(look.module, "head", None), TokenHead) else ()
    row = at(found, place)
    words = [] if row is None or (place is None and len(labels) != len(row)) else guesses(look.served, row, body.top, labels)
    chances: list[float | None] = [None] * look.ids.shape[1]
    if generates(look):
        chances[1:] = numbers(probabilities(found.logits, look.ids)[0])
    return {"guesses": words, "at": place, "probabilities": chances}


def generates(look: Look) -> bool:
    """Whether the model writes from left to right."""
    return look.source is not None or "completions" in look.served.book.tasks


def written(look: Look, off: list[str], most: int) -> str | None:
    """The greedy answer without these heads; None for a model that writes nothing."""
    if not generates(look):
        return None
    ids = (look.ids if look.source is None else look.source)[0].tolist()
    if not most or (look.source is None and len(ids) == look.served.book.context):
        return ""
    if not off:
        return answer(look.served, ids, most).text
    with heads_off(look.module, off):
        return answer(look.served, ids, most).text


def moved(before: Any, after: Any, place: int | None) -> dict[str, float]:
    """How far the answer went, and the states."""
    rows = at(before, place), at(after, place)
    bits = 0.0 if rows[0] is None or rows[1] is None else float(divergence(rows[0], rows[1]))
    alike = F.cosine_similarity(before.hidden[0].double(), after.hidden[0].double(), dim=-1).mean()
    return {"divergence": round(bits, 6), "similarity": round(float(alike), 6)}
