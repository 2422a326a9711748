"""The configuration table of one published form: which published field is which Spec field, in both directions.

A published field that the table does not know is refused, unless it is empty or known to change no arithmetic: it is never ignored
silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transept.core.errors import ConfigError, nearest

REQUIRED = object()

# Fields of published configurations that change no number a model computes, or that name code, which this library never runs.
INERT = frozenset(
    """
    architectures model_type dtype torch_dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id initializer_range init_std output_attentions output_hidden_states return_dict chunk_size_feed_forward
    is_encoder_decoder id2label label2id problem_type tokenizer_class prefix task_specific_params finetuning_task
    gradient_checkpointing n_ctx auto_map trust_remote_code custom_pipelines custom_code attn_implementation pretraining_tp
    classifier_dropout attn_pdrop embd_pdrop resid_pdrop dropout attention_dropout hidden_dropout resid_dropout embed_dropout
    activation_dropout layerdrop summary_first_dropout summary_type summary_use_proj summary_activation summary_proj_to_labels
    hidden_dropout_prob attention_probs_dropout_prob predict_special_tokens n_special output_router_logits router_aux_loss_coef
    aux_loss_alpha seq_aux num_nextn_predict_layers ep_size unsloth_version unsloth_fixed transformers.js_config is_llama_config
    num_labels forced_bos_token_id forced_eos_token_id
    """.split()
)


@dataclass(frozen=True)
class Field:
    """One published field that is one Spec field; `load` and `save` change its form (an activation's name to an Act), `default`
    stands where it is absent."""

    native: str
    foreign: str
    default: Any = REQUIRED
    load: Callable[[Any], Any] | None = None
    save: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Derived:
    """Several published fields that together are one Spec field, or a Spec field worked out from them."""

    native: str
    foreign: tuple[str, ...]
    load: Callable[[Mapping[str, Any]], Any]
    save: Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Given:
    """A Spec field that this form leaves unsaid because it follows from the rest; a Spec that has another value cannot be written
    in this form.
    """

    native: str
    value: Callable[[Mapping[str, Any]], Any]


class Fields:
    """The table. `fixed` are published fields that must have one value (another would change the arithmetic); `inert` adds to INERT."""

    def __init__(
        self,
        *entries: Field | Derived | Given | tuple[str, str] | tuple[str, str, Any],
        fixed: Mapping[str, Any] | None = None,
        inert: Sequence[str] = (),
    ):
        made = tuple(_field(*e) if isinstance(e, tuple) else e for e in entries)
        self.given = tuple(e for e in made if isinstance(e, Given))
        self.entries = tuple(e for e in made if not isinstance(e, Given))
        self.fixed = dict(fixed or {})
        self.inert = INERT | set(inert)

    def read(self, config: Mapping[str, Any], ignore: Sequence[str] = ()) -> dict[str, Any]:
        """The Spec's fields from a published configuration; `ignore` names fields that the user knows to be harmless."""
        self._refuse_unknown(config, set(ignore))
        for name, value in self.fixed.items():
            if name in config and config[name] != value:
                raise ConfigError(f"the configuration's field {name!r} is {config[name]!r}; this family computes with {value!r} only")
        found = {entry.native: self._read(entry, config) for entry in self.entries}
        return found | {given.native: given.value(config) for given in self.given}

    def write(self, spec: Any) -> dict[str, Any]:
        """The published configuration of a Spec; a Spec that this form cannot say is refused."""
        out = dict(self.fixed)
        for entry in self.entries:
            out.update(self._write(entry, spec))
        unsaid = {given.native: given.value(out) for given in self.given}
        said = {entry.native for entry in self.entries}
        unsaid |= {f.name: f.default for f in dataclasses.fields(spec) if f.name not in said and f.name not in unsaid}
        for name, value in unsaid.items():
            if getattr(spec, name) != value:
                raise ConfigError(
                    f"this published form always has {name} = {value!r}, so it cannot hold a model with {name} = {getattr(spec, name)!r}"
                )
        return out

    def _read(self, entry: Field | Derived, config: Mapping[str, Any]) -> Any:
        if isinstance(entry, Derived):
            return _guarded(lambda: entry.load(config), entry.foreign, config)
        value = config.get(entry.foreign)
        if entry.foreign not in config and entry.default is not REQUIRED:
            return entry.default
        if value is None and entry.default is REQUIRED:
            raise ConfigError(f"the configuration lacks the field {entry.foreign!r}{nearest(entry.foreign, config)}")
        return _guarded(lambda: entry.load(value) if entry.load else value, (entry.foreign,), config)

    def _write(self, entry: Field | Derived, spec: Any) -> Mapping[str, Any]:
        value = getattr(spec, entry.native)
        try:
            if isinstance(entry, Derived):
                return entry.save(spec)
            return {entry.foreign: entry.save(value) if entry.save else value}
        except (TypeError, ValueError, AttributeError, KeyError, StopIteration) as e:
            raise ConfigError(f"this published form cannot say {entry.native} = {value!r} ({type(e).__name__}: {e})") from e

    def _refuse_unknown(self, config: Mapping[str, Any], ignore: set[str]) -> None:
        known = {name for e in self.entries for name in ((e.foreign,) if isinstance(e, Field) else e.foreign)} | set(self.fixed)
        for name, value in config.items():
            empty = value is None or value is False or value in ("", 0, 0.0) or value == [] or value == {}
            if name in known or name in self.inert or name in ignore or name.startswith("_") or empty:
                continue
            shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}..."
            raise ConfigError(
                f"the configuration's field {name!r} = {shown} is unknown to this family and might change its arithmetic"
                f"{nearest(name, known)}; if it is known to be harmless, load with ignore=({name!r},)"
            )


def _field(native: str, foreign: str, default: Any = REQUIRED) -> Field:
    return Field(native, foreign, default)


def _guarded(compute: Callable[[], Any], names: tuple[str, ...], config: Mapping[str, Any]) -> Any:
    try:
        return compute()
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as e:
        found = ", ".join(f"{name}={config[name]!r}"[:80] for name in names if name in config) or "nothing"
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise ConfigError(f"the configuration's {' and '.join(names)} cannot be read: found {found} ({reason})") from e
