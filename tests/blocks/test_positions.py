"""What position information is for, and what each scheme promises (rows 30-33)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from transept.blocks.attention import Attention
from transept.blocks.block import Block, Branch, Pre
from transept.blocks.embeddings import Embedding, TokenEmbedding
from transept.blocks.feedforward import MLP
from transept.blocks.norms import LayerNorm
from transept.blocks.positions import Learned, NoPosition, Rotary, Sinusoidal
from transept.blocks.stack import Trunk
from transept.core.errors import InputError
from transept.ops.activations import Act
from transept.ops.masks import Full
from transept.ops.rotary import Layout, RopeSpec

I, AM, A, ROBOT = range(4)


def encoder(added: nn.Module | None = None, inner: NoPosition | None = None) -> Trunk:
    """Blocks with a full mask: an encoder."""
    torch.manual_seed(1)

    def layer() -> Block:
        attn = Attention(32, 4, 4, 8, mask=Full(), position=inner)
        return Block(attn=Branch(attn, LayerNorm(32), Pre()), mlp=Branch(MLP(32, 64, Act.GELU), LayerNorm(32), Pre()))

    model = Trunk(Embedding(TokenEmbedding(10, 32), added), [layer(), layer()], LayerNorm(32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.3)
    return model


def off(model: Trunk) -> float:
    """How far the encoder's states are from being permuted with its input."""
    ids, order = torch.tensor([[I, AM, A, ROBOT]]), torch.tensor([1, 0, 2, 3])
    with torch.no_grad():
        return (model.hidden(ids)[:, order] - model.hidden(ids[:, order])).abs().max().item()


def test_without_positions_an_encoder_cannot_tell_a_statement_from_a_question() -> None:
    """ "I am a robot" and "am I a robot" give the same states in another order."""
    assert off(encoder()) < 1e-5


@pytest.mark.parametrize(
    "scheme",
    [
        {"added": Sinusoidal(32)},
        {"added": Learned(8, 32)},
        {"inner": Rotary(RopeSpec(theta=100.0, dims=8))},
        {"inner": Rotary(RopeSpec(theta=100.0, dims=8, layout=Layout.PAIRS))},
    ],
    ids=["sinusoidal", "learned", "rotary halves", "rotary pairs"],
)
def test_with_any_scheme_it_can(scheme: dict[str, nn.Module]) -> None:
    assert off(encoder(**scheme)) > 0.01


def table(length: int, dim: int = 32) -> Tensor:
    return Sinusoidal(dim)(torch.zeros(1, length, dim), torch.arange(length)[None])[0]


def test_the_sinusoidal_formula() -> None:
    t = table(50).double()
    for pos in (0, 1, 7, 49):
        for i in range(16):
            angle = torch.tensor(pos / 10000 ** (2 * i / 32), dtype=torch.float64)
            assert abs(t[pos, 2 * i] - angle.sin()) < 1e-5 and abs(t[pos, 2 * i + 1] - angle.cos()) < 1e-5


def test_sinusoidal_positions_are_unique() -> None:
    t = table(2000)
    assert torch.cdist(t, t).add(torch.eye(2000) * 9).min() > 0.05


def test_equal_steps_are_equally_far_apart_everywhere() -> None:
    t = table(512)
    for step in (1, 2, 10, 100):
        gap = (t[step:] - t[:-step]).norm(dim=-1)
        assert gap.max() - gap.min() < 1e-3


def test_they_reach_any_length_and_a_longer_table_begins_like_a_shorter() -> None:
    assert torch.equal(table(5000)[:100], table(100))
    far = Sinusoidal(32)(torch.zeros(1, 1, 32), torch.tensor([[10**6]]))
    assert torch.isfinite(far).all() and far.abs().max() <= 1


def test_a_learned_table_ends_and_says_where() -> None:
    learned = Learned(8, 4, offset=2)
    x = learned(torch.zeros(1, 8, 4), torch.arange(8)[None])
    assert torch.equal(x[0], learned.weight[2:])
    with pytest.raises(InputError, match="position 9.*ends at 8"):
        learned(torch.zeros(1, 9, 4), torch.arange(9)[None])


def test_a_one_hot_vector_times_the_table_is_a_look_up() -> None:
    tokens, ids = TokenEmbedding(12, 6), torch.randint(12, (3, 7))
    assert torch.equal(tokens(ids), nn.functional.one_hot(ids, 12).float() @ tokens.weight)
    with pytest.raises(InputError, match="id 12 .* 12 tokens"):
        tokens(torch.tensor([[12]]))
