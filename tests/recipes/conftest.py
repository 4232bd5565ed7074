"""Fixtures for the text recipe and its benchmark: a tiny random encoder, and sentences that it can learn."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest
import torch

WORDS = ["good", "bad", "fine", "poor", "film", "plot", "very", "the", "a", "is"]


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer encoder and a word-level tokenizer, as `from_pretrained` reads it."""
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    folder = tmp_path_factory.mktemp("pretrained")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    tokens = {word: number for number, word in enumerate(vocabulary.read_text().split())}
    transformers.BertTokenizer(vocab=tokens).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of 2 to 9 words; the label says whether "good" is in them. One split is not compressed."""
    folder = tmp_path_factory.mktemp("sentences")
    draw = random.Random(0)
    for name, count in {"train.tsv.gz": 96, "dev.tsv": 24, "test.tsv.gz": 20}.items():
        rows = []
        for number in range(count):
            words = draw.choices(WORDS[1:], k=draw.randint(1, 8))
            label = number % 2
            words.insert(draw.randint(0, len(words)), "good" if label else "bad")
            rows.append(f"{' '.join(words)}\t{label}\n")
        text = "".join(rows)
        if name.endswith(".gz"):
            (folder / name).write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)
    return folder
