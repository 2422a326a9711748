"""A transformers model with random weights, the same checkpoint in this library, and what must be equal between the two."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import transept
from transept.door import Model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Tensors:
    """Tensors in memory, read as a file is."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def keys(self) -> list[str]:
        return list(self.tensors)

    def read(self, key: str, /) -> Tensor:
        return self.tensors[key]


class Mirror:
    """Both sides of one checkpoint: `theirs` saved it, `ours` loaded it from the folder."""

    def __init__(self, architecture: str, config: Any, folder: Path, seed: int = 0):
        self.cls = getattr(transformers, architecture)
        config._attn_implementation = "eager"
        torch.manual_seed(seed)
        self.theirs: Any = spread(self.cls(config)).eval()
        self.theirs.save_pretrained(folder)
        self.folder = folder
        self.ours: Model = transept.load(folder)

    @property
    def vocab(self) -> int:
        return self.theirs.config.vocab_size

    def ids(self, batch: int, length: int, seed: int = 0) -> Tensor:
        """Random ids; the first four, often a checkpoint's special tokens, are left out."""
        return torch.randint(4, self.vocab, (batch, length), generator=torch.Generator().manual_seed(seed))

    def gradients(self, loss: Tensor, our_loss: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Native name -> (ours, theirs): the gradients of every parameter, theirs carried through the weight map."""
        loss.backward()
        our_loss.backward()
        foreign = self._unstacked({name: _grad(p) for name, p in self.theirs.named_parameters()})
        ours = {name: _grad(p) for name, p in self.ours.model.named_parameters()}
        shapes = {name: t.shape for name, t in self.ours.model.state_dict().items()}
        for name, buffer in self.theirs.named_buffers():
            if name in self.theirs.state_dict():
                foreign[name] = torch.zeros_like(buffer)
        assert self.ours.form is not None
        theirs = dict(self.ours.form.names.load(Tensors(foreign), self.ours.spec, shapes))
        return {name: (grad, theirs[name]) for name, grad in ours.items()}

    def _unstacked(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients under the names of the file: transformers keeps experts stacked and joined in memory, but saves them one by one."""
        out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            stem, _, leaf = name.rpartition(".")
            if stem.endswith("mlp.experts"):
                parts = {"gate_proj": tensor.chunk(2, 1)[0], "up_proj": tensor.chunk(2, 1)[1]} if leaf == "gate_up_proj" else {leaf: tensor}
                out.update({f"{stem}.{e}.{part}.weight": value[e] for part, value in parts.items() for e in range(len(value))})
            else:
                out[name] = tensor
        return out

    def reloaded(self, folder: Path) -> Any:
        """What transformers makes of the folder that this library saves."""
        transept.save(self.ours, folder)
        model, info = self.cls.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
        return model.eval()


def spread(model: nn.Module) -> nn.Module:
    """Random weights that give logits of order one, so that an error of 1e-5 is seen: matrices of std 1/sqrt(inputs), gains near one."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "Sinusoidal" in type(_owner(model, name)).__name__:
                continue
            if p.dim() >= 2:
                inputs = p.shape[0] if type(_owner(model, name)).__name__ == "Conv1D" else p.shape[-1]
                p.normal_(std=inputs**-0.5)
                if name.endswith("Attention.q.weight"):
                    # T5 does not divide its scores, but starts with smaller queries.
                    p.mul_(p.shape[0] ** -0.5)
            elif name.endswith("bias"):
                p.normal_(std=0.2)
            else:
                p.normal_(mean=1.0, std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "final_logits_bias")):
                buffer.normal_(std=0.1)
    return model


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _grad(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def mirror(architecture: str, config: Any) -> Mirror:
    """A new mirror in a folder of its own."""
    return Mirror(architecture, config, Path(_scratch().name) / f"{architecture}-{len(list(Path(_scratch().name).iterdir()))}")


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="transept-parity-")
