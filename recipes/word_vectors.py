"""word2vec and GloVe trained on real text, with analogies (rows 9, 10).

    python recipes/word_vectors.py --text FILE [FILE ...] --analogies questions-words.txt.gz [--epochs 12]

Texts are plain, .gz or .xz. Measured on 2026-11-21 on 15 books, 29,000 picture captions and Shakespeare (1.5 million words, 11,946
different), 12 epochs, one core of a busy machine: skip-gram 202 s (170 s of processor time), CBOW 148 s (143 s), GloVe 124 s (120 s).
Right of the 5,212 analogies whose words it knows: 9.8 %, 10.2 %, 9.1 %, of which in families 33.0 %, 41.5 %, 57.2 %. So small a corpus
knows families and some grammar and no capitals, and its kings are Shakespeare's: king - man + woman gives "iii", "prince", "iv", "richard",
"henry" by skip-gram, and "queen" comes fourth by GloVe. Published vectors saw a thousand times more.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from transept.models.text import glove, word2vec


def read(path: Path) -> str:
    """A text file, unpacked."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        return file.read()


class Corpus:
    """Words by frequency, and the text as their numbers; rarer words than `least` are left out, frequent ones can be thinned."""

    def __init__(self, text: str, least: int):
        tokens = re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("’", "'"))
        counts = Counter(tokens)
        self.words = [word for word, n in counts.most_common() if n >= least]
        self.index = {word: i for i, word in enumerate(self.words)}
        self.counts = np.array([counts[word] for word in self.words], dtype=np.float64)
        self.ids = np.array([self.index[t] for t in tokens if t in self.index], dtype=np.int64)

    def thinned(self, draw: np.random.Generator, threshold: float) -> np.ndarray:
        """The text with frequent words dropped at random (arXiv 1310.4546, eq. 5)."""
        share = self.counts / self.counts.sum()
        keep = np.minimum(1.0, np.sqrt(threshold / share) + threshold / share)
        return self.ids[draw.random(len(self.ids)) < keep[self.ids]]


def windows(ids: np.ndarray, reach: int, batch: int, draw: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Centres [b], neighbours [b 2 reach] and which of them count: each centre draws how far its own window reaches."""
    padded = np.pad(ids, reach)
    offsets = np.array([o for o in range(-reach, reach + 1) if o])
    for part in np.array_split(draw.permutation(len(ids)), max(1, len(ids) // batch)):
        at = part[:, None] + offsets
        real = (np.abs(offsets) <= draw.integers(1, reach + 1, len(part))[:, None]) & (at >= 0) & (at < len(ids))
        yield ids[part], padded[at + reach], real


def train_word2vec(corpus: Corpus, spec: word2vec.Word2VecSpec, epochs: int, seed: int = 0) -> torch.Tensor:
    """The word vectors after some epochs of Adam with a falling rate."""
    draw = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = word2vec.build(spec)
    optim = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.99))
    rare = corpus.counts**0.75
    bins = np.cumsum(rare / rare.sum())
    for epoch in range(epochs):
        for group in optim.param_groups:
            group["lr"] = 2e-3 * (1 - epoch / epochs) + 1e-4
        total, seen = 0.0, 0
        for centre, near, real in windows(corpus.thinned(draw, 1e-3), spec.window, 2048, draw):
            drawn = np.searchsorted(bins, draw.random((len(centre), spec.negatives))).clip(max=spec.vocab - 1)
            loss = model(*(torch.from_numpy(x) for x in (centre, near, real, drawn)))
            optim.zero_grad()
            (loss / len(centre)).backward()
            optim.step()
            total, seen = total + loss.item(), seen + int(real.sum())
        print(f"  epoch {epoch + 1}: loss {total / seen:.3f} per neighbour", flush=True)
    return model.words.weight.detach()


def cooccurrence(corpus: Corpus, reach: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of words and how often they stand near each other, a pair at distance d counting 1/d (section 4.2 of the GloVe paper)."""
    size, ids = len(corpus.words), corpus.ids
    keys, weights = np.zeros(0, dtype=np.int64), np.zeros(0)
    for d in range(1, reach + 1):
        a, b = ids[:-d], ids[d:]
        pair, count = np.unique(np.concatenate((a * size + b, b * size + a)), return_counts=True)
        every, where = np.unique(np.concatenate((keys, pair)), return_inverse=True)
        weights = np.bincount(where, np.concatenate((weights, count / d)), len(every))
        keys = every
    return torch.from_numpy(keys // size), torch.from_numpy(keys % size), torch.from_numpy(weights).float()


def train_glove(corpus: Corpus, spec: glove.GloveSpec, epochs: int, seed: int = 0) -> torch.Tensor:
    """The word vectors after some epochs of Adagrad, as published."""
    torch.manual_seed(seed)
    i, j, count = cooccurrence(corpus, spec.window)
    model = glove.build(spec)
    optim = torch.optim.Adagrad(model.parameters(), lr=0.05)
    for epoch in range(epochs):
        total = 0.0
        for part in torch.randperm(len(i)).split(16384):
            loss = model(i[part], j[part], count[part])
            optim.zero_grad()
            loss.backward()
            optim.step()
            total += loss.item()
        if epoch % 5 == 4:
            print(f"  epoch {epoch + 1}: loss {total / len(i):.4f} per cell", flush=True)
    return model.vectors.detach()


def analogies(path: Path, index: dict[str, int]) -> dict[str, list[tuple[int, int, int, int]]]:
    """The questions a : b = c : ? whose four words are known, by category."""
    found: dict[str, list[tuple[int, int, int, int]]] = {}
    for line in read(path).lower().splitlines():
        if line.startswith(":"):
            name = line[2:]
            found[name] = []
        elif len(words := line.split()) == 4 and all(w in index for w in words):
            a, b, c, d = (index[w] for w in words)
            found[name].append((a, b, c, d))
    return {name: rows for name, rows in found.items() if rows}


def accuracy(vectors: torch.Tensor, questions: list[tuple[int, int, int, int]]) -> float:
    """How often the word nearest to b - a + c, the three left out, is the right one."""
    unit = torch.nn.functional.normalize(vectors, dim=1)
    rows = torch.tensor(questions)
    scores = (unit[rows[:, 1]] - unit[rows[:, 0]] + unit[rows[:, 2]]) @ unit.T
    scores.scatter_(1, rows[:, :3], float("-inf"))
    return (scores.argmax(1) == rows[:, 3]).float().mean().item()


def nearest(vectors: torch.Tensor, words: list[str], target: torch.Tensor, without: list[int]) -> list[str]:
    """The five words nearest to a vector."""
    scores = torch.nn.functional.normalize(vectors, dim=1) @ torch.nn.functional.normalize(target, dim=0)
    scores[without] = float("-inf")
    return [words[i] for i in scores.topk(5).indices.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--analogies", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--least", type=int, default=5)
    parser.add_argument("--dim", type=int, default=100)
    options = parser.parse_args()
    corpus = Corpus("\n".join(read(path) for path in options.text), options.least)
    size = len(corpus.words)
    print(f"{len(corpus.ids):,} words, {size:,} different ones at least {options.least} times")
    made: dict[str, torch.Tensor] = {}
    for name, train in (
        ("skip-gram", lambda: train_word2vec(corpus, word2vec.Word2VecSpec(vocab=size, dim=options.dim), options.epochs)),
        ("cbow", lambda: train_word2vec(corpus, word2vec.Word2VecSpec(vocab=size, dim=options.dim, way=word2vec.Way.CBOW), options.epochs)),
        ("glove", lambda: train_glove(corpus, glove.GloveSpec(vocab=size, dim=options.dim, most=10.0), 2 * options.epochs)),
    ):
        begin, processor = time.perf_counter(), time.process_time()
        print(name)
        made[name] = train()
        print(f"  {time.perf_counter() - begin:.0f} s, {time.process_time() - processor:.0f} s of processor time")
    print(f"{'analogies':30s} {'questions':>9s} " + " ".join(f"{name:>10s}" for name in made))
    every = analogies(options.analogies, corpus.index)
    for category, rows in [*every.items(), ("all", [row for found in every.values() for row in found])]:
        print(f"{category:30s} {len(rows):9d} " + " ".join(f"{accuracy(v, rows):10.1%}" for v in made.values()))
    king, man, woman, queen = (corpus.index[w] for w in ("king", "man", "woman", "queen"))
    for name, vectors in made.items():
        unit = torch.nn.functional.normalize(vectors, dim=1)
        sum_of = unit[king] - unit[man] + unit[woman]
        print(f"{name}: king - man + woman = {', '.join(nearest(vectors, corpus.words, sum_of, [king, man, woman]))}")
        print(f"{name}: nearest to queen: {', '.join(nearest(vectors, corpus.words, vectors[queen], [queen]))}")


if __name__ == "__main__":
    main()
