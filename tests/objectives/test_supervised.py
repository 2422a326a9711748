"""Fine-tuning on answers against TRL's own trainer: the same rows from its preparation, the same loss and gradients, accumulated or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from tests.parity.mirror import Mirror, mirror
from transept.training.objectives.causal import Causal, answer
from transept.training.objectives.losses import IGNORE, stacked

# TRL sets an option by the name that transformers is about to give up
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")

WORDS, END, PAD = 96, 94, 95
# prompt and answer, in words whose number is their id
ROWS = [([5, 9, 11], [7, 8, 3, 4]), ([1], [2, 6]), ([30, 31, 32, 33, 34, 35], [40]), ([12, 13], [14, 15, 16, 17, 18, 19, 20])]


def trainer(m: Mirror, folder: Path, **options: Any) -> Any:
    """TRL's trainer over the rows as a user would give them: texts of a prompt and of what is to follow."""
    words = Tokenizer(WordLevel({str(i): i for i in range(WORDS)}, unk_token=str(PAD)))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(END), pad_token=str(PAD))

    def said(ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids)

    rows = datasets.Dataset.from_list([{"prompt": said(prompt), "completion": said(text).strip()} for prompt, text in ROWS])
    args = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none",
                         dataloader_pin_memory=False, per_device_train_batch_size=len(ROWS), **options)  # fmt: skip
    return SFTTrainer(model=m.theirs, args=args, train_dataset=rows, processing_class=tokenizer)


@pytest.fixture
def m() -> Mirror:
    return mirror("LlamaForCausalLM", tf.LlamaConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                                    intermediate_size=48, max_position_embeddings=40))  # fmt: skip


def rows_of_both(m: Mirror, folder: Path) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    theirs = trainer(m, folder)
    batch = theirs.data_collator([{k: v for k, v in row.items() if k in ("input_ids", "labels")} for row in theirs.train_dataset])
    return theirs, batch, stacked([answer(prompt, [*text, END]) for prompt, text in ROWS])


def test_the_same_tokens_count(m: Mirror, tmp_path: Path) -> None:
    _, theirs, ours = rows_of_both(m, tmp_path)
    assert torch.equal(theirs["labels"], ours["labels"])
    assert torch.equal(theirs["attention_mask"].bool(), ours["mask"])
    assert torch.equal(theirs["input_ids"][ours["mask"]], ours["ids"][ours["mask"]])
    assert int((ours["labels"] != IGNORE).sum()) == sum(len(text) + 1 for _, text in ROWS)


def test_the_same_loss(m: Mirror, tmp_path: Path) -> None:
    theirs, batch, ours = rows_of_both(m, tmp_path)
    found = Causal()(m.ours.model, ours)
    torch.testing.assert_close(found.loss / found.count, theirs.compute_loss(m.theirs, batch), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_the_same_gradient_from_uneven_parts(m: Mirror, tmp_path: Path, micro: int) -> None:
    """Theirs from parts of `micro` rows, divided by the count of the whole batch; ours from the whole batch at once."""
    theirs, _, ours = rows_of_both(m, tmp_path)
    rows = [{k: v for k, v in row.items() if k in ("input_ids", "labels")} for row in theirs.train_dataset]
    count = sum(len(text) + 1 for _, text in ROWS)
    m.theirs.zero_grad()
    for at in range(0, len(rows), micro):
        theirs.compute_loss(m.theirs, theirs.data_collator(rows[at : at + micro]), num_items_in_batch=torch.tensor(count)).backward()
    found = Causal()(m.ours.model, ours)
    (found.loss / found.count).backward()
    # no row is as long as another, so the mean of the parts' means would be another number
    names = [("embed.tokens.weight", "model.embed_tokens.weight"), ("head.weight", "lm_head.weight")]
    for mine, other in [(m.ours.model.get_parameter(a), m.theirs.get_parameter(b)) for a, b in names]:
        assert mine.grad is not None and other.grad is not None and float(other.grad.abs().max()) > 1e-3
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-5)
