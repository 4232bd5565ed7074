"""Train the original encoder-decoder Transformer to translate and, with the presets of `callbacks/`, make it smaller.

A folder with parallel text, one sentence a line (`train.en` and `train.de`, `val.*`, any number of `test*.*`, each
plain or `.gz`); Multi30k takes 27 minutes on two cores, 12 epochs to a BLEU of 36.3 on the test set of 2016:

    python recipes/translation.py fit --config recipes/translation.yaml --data.dataset=path/to/multi30k

or any translation dataset of the Hugging Face hub by name, such as `--data.dataset=bentrevett/multi30k`. On a GPU the
size of the paper, with its warm-up:

    python recipes/translation.py fit --config recipes/translation.yaml --data.dataset=path/to/multi30k \
        --model.size=base --model.warmup=4000 --data.batch_tokens=16384

BLEU of all test sets by beam search, from the checkpoint of a run; a fit goes on with `fit` in the place of `test`:

    python recipes/translation.py test --config recipes/translation.yaml --data.dataset=path/to/multi30k \
        --ckpt_path=path/to/last.ckpt

Smaller in the same fit:

    python recipes/translation.py fit --config recipes/translation.yaml --data.dataset=path/to/multi30k \
        --config callbacks/group_lasso.yaml --config callbacks/finalize.yaml

The sub-word vocabulary is trained on the training sentences, written to the folder of the run as `tokenizer.json`, and
kept in every checkpoint. Needs the extra `recipes`.
"""

from __future__ import annotations

import gzip
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics.text import SacreBLEUScore

# Batches of sentences come in hundreds of shapes. For each one oneDNN compiles its bfloat16 kernels, which takes longer
# than to run them once, and it keeps 1,024 unless it is told otherwise before its first.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(2**16))

PAD, BEGIN, END = 0, 1, 2
SPECIAL = ("<pad>", "<s>", "</s>")
MAX_POSITIONS = 1024
EXTRA = 50  # a translation may have so many tokens more than its source


# The model


@dataclass(frozen=True)
class Size:
    """What one word sets: the shape of the Transformer and its dropout."""

    width: int
    heads: int
    layers: int  # of the encoder, and as many of the decoder
    ffn: int
    dropout: float  # of embeddings, attention and the output of each block


SIZES = {
    "tiny": Size(64, 4, 2, 128, 0.1),
    "small": Size(192, 4, 3, 768, 0.2),
    "base": Size(512, 8, 6, 2048, 0.1),  # that of the paper
}


def size_named(name: str) -> Size:
    if name not in SIZES:
        raise ValueError(f"Expected size to be one of {list(SIZES)}, but got {name!r}.")
    return SIZES[name]


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Positions (length, width): `sin(p / 10000^(2i / width))` at even and the cosine at odd places."""
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    angles = torch.arange(length, dtype=torch.float64).unsqueeze(1) * rates  # (length, width / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width].to(torch.get_default_dtype())


class TranslationModel(nn.Module):
    """Embeddings times the root of the width, sinusoidal positions, `nn.Transformer`, logits of the next token.

    Args:
        vocabulary: tokens of either language.
        size: the shape.
        tied: whether one matrix serves as source embedding, target embedding and output layer.
        norm_first: normalize in front of each block instead of behind it.
    """

    def __init__(self, vocabulary: int, size: Size, tied: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        self.scale = math.sqrt(size.width)
        self.source = nn.Embedding(vocabulary, size.width)
        self.target = self.source if tied else nn.Embedding(vocabulary, size.width)
        self.output = nn.Linear(size.width, vocabulary, bias=False)
        if tied:
            self.output.weight = self.source.weight
        for table in (self.source, self.target, self.output):
            nn.init.normal_(table.weight, std=1 / self.scale)
        self.register_buffer("positions", sinusoidal_positions(MAX_POSITIONS, size.width), persistent=False)
        self.dropout = nn.Dropout(size.dropout)
        shape = {"dim_feedforward": size.ffn, "dropout": size.dropout, "batch_first": True, "norm_first": norm_first}
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(size.width, size.heads, **shape),
            size.layers,
            nn.LayerNorm(size.width),
            enable_nested_tensor=False,  # which would cut off columns of padding in evaluation
        )
        self.transformer = nn.Transformer(
            size.width, size.heads, num_decoder_layers=size.layers, custom_encoder=encoder, **shape
        )
        for layer in (*self.transformer.encoder.layers, *self.transformer.decoder.layers):
            layer.dropout.p = 0.0  # the paper has dropout behind blocks, none between the two layers of one

    def embed(self, table: nn.Embedding, ids: Tensor, start: int = 0) -> Tensor:
        """(batch, tokens) -> (batch, tokens, width), for tokens from position `start` on."""
        end = start + ids.shape[1]
        if end > MAX_POSITIONS:
            raise ValueError(f"Expected at most {MAX_POSITIONS} tokens, but got {end}. Cut sentences: max_length=128.")
        return self.dropout(table(ids) * self.scale + self.positions[start:end])

    def forward(self, source: Tensor, target: Tensor, source_padding: Tensor, target_padding: Tensor) -> Tensor:
        """Logits (batch, target tokens, vocabulary) of the token behind each target token; zeros at padding.

        Args:
            source: token ids (batch, source tokens).
            target: token ids (batch, target tokens), the first of each row is BEGIN.
            source_padding: bool like `source`, True at padding.
            target_padding: bool like `target`; padding lies behind the sentence, so no real token attends to it.
        """
        hidden = self.transformer(
            self.embed(self.source, source),
            self.embed(self.target, target),
            tgt_mask=causal(target),
            src_key_padding_mask=source_padding,
            memory_key_padding_mask=source_padding,
            tgt_is_causal=True,
        )  # (batch, target tokens, width)
        # padding tells nothing: zeros, so that who compares the answers of two models compares real tokens only
        return self.output(hidden.masked_fill(target_padding.unsqueeze(-1), 0.0))

    def encode(self, source: Tensor, source_padding: Tensor) -> Tensor:
        """The memory that the decoder attends to, (batch, source tokens, width)."""
        return self.transformer.encoder(self.embed(self.source, source), src_key_padding_mask=source_padding)


def causal(ids: Tensor) -> Tensor:
    """Mask (tokens, tokens), True where attention is forbidden: from each token to those behind it."""
    return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)


# Search


class PlainDecoder:
    """Logits of the next token by a decoder that runs over the whole of every prefix again."""

    def __init__(self, model: TranslationModel, memory: Tensor, padding: Tensor, beam: int) -> None:
        self.model, self.beam = model, beam
        self.memory, self.padding = memory.repeat_interleave(beam, 0), padding.repeat_interleave(beam, 0)

    def logits(self, tokens: Tensor) -> Tensor:
        """Prefixes (sentences, beam, tokens) -> (sentences, beam, vocabulary)."""
        rows = tokens.flatten(0, 1)
        hidden = self.model.transformer.decoder(
            self.model.embed(self.model.target, rows),
            self.memory,
            tgt_mask=causal(rows),
            memory_key_padding_mask=self.padding,
            tgt_is_causal=True,
        )
        return self.model.output(hidden[:, -1]).unflatten(0, (-1, self.beam))

    def keep(self, sentences: Tensor, beams: Tensor) -> None:
        """Go on with these sentences (m,), and with these prefixes of each (m, beam)."""
        rows = (sentences.unsqueeze(1) * self.beam + beams).flatten()
        self.memory, self.padding = self.memory[rows], self.padding[rows]


class AttentionWeights:
    """What one `nn.MultiheadAttention` computes with, as large as it is now: heads may have been removed."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        self.heads = attention.num_heads
        # after a removal the widths of queries and keys and of values are no longer those of the constructor
        qk = getattr(attention, "qk_head_dim", attention.head_dim)
        vo = getattr(attention, "vo_head_dim", attention.head_dim)
        self.scale = getattr(attention, "scale", 1 / math.sqrt(attention.head_dim))
        rows = [self.heads * qk, self.heads * qk, self.heads * vo]
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        self.inner = list(zip(weight.split(rows), bias.split(rows), strict=True))  # of queries, keys, values
        self.outer = attention.out_proj.weight, attention.out_proj.bias

    def project(self, which: int, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, heads, tokens, head width)."""
        return nn.functional.linear(x, *self.inner[which]).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, padding: Tensor | None = None) -> Tensor:
        """(batch, heads, tokens, head width) of each -> (batch, query tokens, width)."""
        logits = (queries * self.scale) @ keys.transpose(-2, -1)  # (batch, heads, query tokens, key tokens)
        if padding is not None:
            logits = logits.masked_fill(padding[:, None, None], -math.inf)
        attended = logits.softmax(-1).to(values.dtype) @ values
        return nn.functional.linear(attended.transpose(1, 2).flatten(2), *self.outer)


class CachedDecoder:
    """Logits of the next token by a decoder that computes the last token only, and keeps keys and values of the others.

    Keys and values of the memory are computed once for each sentence: the prefixes of a beam are queries side by side.
    """

    def __init__(self, model: TranslationModel, memory: Tensor, padding: Tensor, beam: int) -> None:
        self.model, self.padding, self.beam = model, padding, beam
        self.layers = list(model.transformer.decoder.layers)
        self.own = [AttentionWeights(layer.self_attn) for layer in self.layers]
        self.cross = [AttentionWeights(layer.multihead_attn) for layer in self.layers]
        # (sentences, heads, source tokens, head width); and of the prefixes (sentences * beam, heads, tokens, ...)
        self.memory = [(cross.project(1, memory), cross.project(2, memory)) for cross in self.cross]
        self.prefix: list[tuple[Tensor, Tensor]] = []

    def logits(self, tokens: Tensor) -> Tensor:
        """Prefixes (sentences, beam, tokens), one token longer than last time -> (sentences, beam, vocabulary)."""
        x = self.model.embed(self.model.target, tokens[..., -1].reshape(-1, 1), tokens.shape[-1] - 1)
        prefix: list[tuple[Tensor, Tensor]] = []  # x is (sentences * beam, 1, width)
        for number, layer in enumerate(self.layers):

            def own(y: Tensor, number: int = number) -> Tensor:
                attention = self.own[number]
                keys, values = attention.project(1, y), attention.project(2, y)
                if self.prefix:
                    before = self.prefix[number]
                    keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
                prefix.append((keys, values))
                return attention.attend(attention.project(0, y), keys, values)

            def cross(y: Tensor, number: int = number) -> Tensor:
                attention = self.cross[number]
                side_by_side = y.reshape(-1, self.beam, y.shape[-1])  # (sentences, beam, width)
                queries = attention.project(0, side_by_side)
                return attention.attend(queries, *self.memory[number], self.padding).reshape(y.shape)

            def feed_forward(y: Tensor, layer: nn.Module = layer) -> Tensor:
                return layer.linear2(layer.activation(layer.linear1(y)))

            for norm, block in ((layer.norm1, own), (layer.norm2, cross), (layer.norm3, feed_forward)):
                x = x + block(norm(x)) if layer.norm_first else norm(x + block(x))
        self.prefix = prefix
        norm = self.model.transformer.decoder.norm
        return self.model.output(x if norm is None else norm(x)).reshape(*tokens.shape[:2], -1)

    def keep(self, sentences: Tensor, beams: Tensor) -> None:
        """Go on with these sentences (m,), and with these prefixes of each (m, beam)."""
        rows = (sentences.unsqueeze(1) * self.beam + beams).flatten()
        self.prefix = [(keys[rows], values[rows]) for keys, values in self.prefix]
        if len(sentences) < len(self.padding):
            self.memory = [(keys[sentences], values[sentences]) for keys, values in self.memory]
            self.padding = self.padding[sentences]


def why_not_cached(model: TranslationModel) -> str | None:
    """What `CachedDecoder`, which goes past the forwards of layers, would not see; None if there is nothing."""
    for name, module in model.transformer.decoder.named_modules(prefix="transformer.decoder"):
        layer = isinstance(module, nn.TransformerDecoderLayer)
        attention = isinstance(module, nn.MultiheadAttention)
        if name.count(".") == 3 and not layer:
            return f"{name!r} is no nn.TransformerDecoderLayer but a {type(module).__name__}"
        if attention and (module.in_proj_weight is None or module.in_proj_bias is None or module.bias_k is not None):
            return f"the projections of {name!r} are not packed, or without biases"
        if (layer or attention) and ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks):
            return f"something is attached to {name!r}"
    return None


class Found(NamedTuple):
    """The best translation of a sentence: its ids without BEGIN and END, whether END came, and its score."""

    ids: list[int]
    ended: bool
    score: float


def length_penalty_of(length: Tensor | float, alpha: float) -> Any:
    """`((5 + length) / 6)^alpha` (Wu et al. 2016), by which log-probabilities are divided."""
    return ((5 + length) / 6) ** alpha


@torch.no_grad()
def search(
    model: TranslationModel,
    source: Tensor,
    source_padding: Tensor,
    beam: int = 1,
    length_penalty: float = 0.6,
    extra: int = EXTRA,
    cached: bool | None = None,
) -> list[Found]:
    """The best translation of each sentence that beam search finds; a beam of one is greedy search.

    A translation of n tokens, END included, has the score `sum log p / ((5 + n) / 6)^length_penalty`. In each step the
    `beam` best of all continuations, and of the translations that have ended, stay. A sentence is done when none of
    what goes on can overtake what has ended, or when its translation is `extra` tokens longer than its source.

    Args:
        model: the model, in evaluation mode.
        source: token ids (batch, source tokens).
        source_padding: bool like `source`, True at padding.
        beam: how many prefixes are followed.
        length_penalty: the exponent, at least 0.
        extra: tokens that a translation may have more than its source.
        cached: whether keys and values are kept. Default: unless something in the decoder is not known, with a warning.
    """
    if beam < 1 or length_penalty < 0:
        raise ValueError(
            f"Expected a beam of at least 1 and a length_penalty of at least 0, but got {beam} and {length_penalty}."
        )
    if cached is None:
        reason = why_not_cached(model)
        cached = reason is None
        if not cached:
            warnings.warn(f"Translating without cached keys and values, which takes longer: {reason}.", stacklevel=2)
    memory = model.encode(source, source_padding)
    decoder = (CachedDecoder if cached else PlainDecoder)(model, memory, source_padding, beam)
    count, device = len(source), source.device
    tokens = torch.full((count, beam, 1), BEGIN, device=device)
    total = torch.full((count, beam), -math.inf, device=device, dtype=torch.promote_types(memory.dtype, torch.float32))
    total[:, 0] = 0.0  # at first all prefixes are the same one
    ended = torch.zeros(count, beam, dtype=torch.bool, device=device)
    length = torch.zeros(count, beam, dtype=torch.long, device=device)
    limit = (~source_padding).sum(1) + extra
    left = list(range(count))  # which sentences the rows are
    found: list[Found | None] = [None] * count
    for step in range(1, int(limit.max()) + 1):
        gain = decoder.logits(tokens).to(total.dtype).log_softmax(-1)  # (sentences, beam, vocabulary)
        gain[..., [PAD, BEGIN]] = -math.inf
        gain[ended] = -math.inf
        gain[..., PAD].masked_fill_(ended, 0.0)  # what has ended goes on as it is, at no cost
        length = torch.where(ended, length, step)
        sums = (total.unsqueeze(-1) + gain).flatten(1)  # (sentences, beam * vocabulary)
        penalty = length_penalty_of(length.to(total.dtype), length_penalty)
        ranks = (sums.unflatten(1, (beam, -1)) / penalty.unsqueeze(-1)).flatten(1)
        rank, place = ranks.topk(beam)
        beams, new = place // gain.shape[-1], place % gain.shape[-1]
        total, length = sums.gather(1, place), length.gather(1, beams)
        tokens = torch.cat([tokens.gather(1, beams.unsqueeze(-1).expand(-1, -1, step)), new.unsqueeze(-1)], -1)
        ended = ended.gather(1, beams) | (new == END)
        # the log-probability only falls, and no penalty is larger than that of the last step
        reach = total.masked_fill(ended, -math.inf).amax(1) / length_penalty_of(limit.to(total.dtype), length_penalty)
        best = rank.masked_fill(~ended, -math.inf).amax(1)
        done = ended.all(1) | (step >= limit) | ((best >= reach) & (best > -math.inf))
        for row in done.nonzero().flatten().tolist():
            winner = int(rank[row].argmax())
            ids = [i for i in tokens[row, winner, 1:].tolist() if i not in (PAD, END)]
            found[left[row]] = Found(ids, bool(ended[row, winner]), float(rank[row, winner]))
        stay = (~done).nonzero().flatten()
        if not len(stay):
            break
        decoder.keep(stay, beams[stay])
        tokens, total, ended, length, limit = tokens[stay], total[stay], ended[stay], length[stay], limit[stay]
        left = [left[row] for row in stay.tolist()]
    assert all(found)
    return found  # type: ignore[return-value]


# Training


def noam(step: int, width: int, warmup: int) -> float:
    """Learning rate of optimizer step `step` = 1, 2, ...: `width^-0.5 min(step^-0.5, step warmup^-1.5)`."""
    return width**-0.5 * min(step**-0.5, step * warmup**-1.5)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean over the real tokens of `-(1 - smoothing) log p_label - smoothing / vocabulary sum_k log p_k`."""
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=PAD, label_smoothing=smoothing
    )


class Translation(L.LightningModule):
    """Adam with the Noam schedule, smoothed cross entropy; BLEU by greedy search in validation, by beams in tests.

    Args:
        vocabulary: tokens of either language.
        size: "tiny", "small" or "base".
        tied: whether one matrix serves as source embedding, target embedding and output layer.
        norm_first: normalize in front of each block instead of behind it.
        warmup: steps in which the learning rate rises.
        factor: times the learning rate of the Noam schedule.
        label_smoothing: probability that is spread over the whole vocabulary.
        beam: width of the search in tests.
        length_penalty: its exponent, see `search`.
    """

    def __init__(
        self,
        vocabulary: int,
        size: str = "small",
        tied: bool = True,
        norm_first: bool = False,
        warmup: int = 1000,
        factor: float = 1.0,
        label_smoothing: float = 0.1,
        beam: int = 4,
        length_penalty: float = 0.6,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = TranslationModel(vocabulary, size_named(size), tied, norm_first)
        self.bleu = nn.ModuleDict()  # a score for each set of sentences

    def forward(self, source: Tensor, target: Tensor, source_padding: Tensor, target_padding: Tensor) -> Tensor:
        return self.model(source, target, source_padding, target_padding)

    def logits(self, batch: dict[str, Any]) -> Tensor:
        return self(batch["source"], batch["target"], batch["source"].eq(PAD), batch["target"].eq(PAD))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = smoothed_cross_entropy(self.logits(batch), batch["labels"], self.hparams.label_smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss = smoothed_cross_entropy(self.logits(batch), batch["labels"], 0.0)
        self.log("val_loss", loss, batch_size=int(batch["labels"].ne(PAD).sum()), prog_bar=True)
        self.score("val", batch, beam=1)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[str]]:
        """The translations, for callbacks that keep them (`on_test_batch_end`)."""
        return {"translations": self.score(self.trainer.datamodule.tests[dataloader_idx], batch, self.hparams.beam)}

    def score(self, name: str, batch: dict[str, Any], beam: int) -> list[str]:
        """Translate a batch and count it towards the BLEU of a set of sentences."""
        found = search(self.model, batch["source"], batch["source"].eq(PAD), beam, self.hparams.length_penalty)
        translations = [self.trainer.datamodule.decode(f.ids) for f in found]
        self.bleu[name].update(translations, [[text] for text in batch["references"]])
        return translations

    def setup(self, stage: str) -> None:
        names = self.trainer.datamodule.tests if stage == "test" else ["val"]
        self.bleu = nn.ModuleDict({name: SacreBLEUScore() for name in names})

    def on_validation_epoch_end(self) -> None:
        self.log_bleu()

    def on_test_epoch_end(self) -> None:
        self.log_bleu()

    def log_bleu(self) -> None:
        for name, score in self.bleu.items():
            self.log(f"{name}_bleu", 100 * score.compute(), prog_bar=True)
            score.reset()

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` = 1, 2, ..."""
        return self.hparams.factor * noam(step, size_named(self.hparams.size).width, self.hparams.warmup)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# Data


class TokenBuckets(Sampler[list[int]]):
    """Batches of pairs of nearly the same lengths with at most `batch_tokens` tokens, padding included.

    Pairs are sorted by the lengths of source and target and cut into batches. In each epoch pairs of equal lengths
    change places and batches come in another order, so that the number of batches is always the same. Seed and epoch
    alone decide the order; `skip` batches at the beginning are left out, once.

    Args:
        lengths: (source tokens, target tokens) of each pair.
        batch_tokens: tokens of a batch; a pair that is longer is a batch of its own.
        seed: of the order; None: always as sorted, the longest first.
    """

    def __init__(self, lengths: Sequence[tuple[int, int]], batch_tokens: int, seed: int | None = 0) -> None:
        self.lengths, self.seed, self.epoch, self.skip = lengths, seed, 0, 0
        ordered = sorted(lengths, reverse=True)
        self.cuts = [0]
        target = 0  # the longest source of a batch is its first
        for place, pair in enumerate(ordered):
            first = self.cuts[-1]
            target = max(target, pair[1])
            if place > first and (place + 1 - first) * (ordered[first][0] + target) > batch_tokens:
                self.cuts.append(place)
                target = pair[1]
        self.cuts.append(len(ordered))

    def __len__(self) -> int:
        return len(self.cuts) - 1 if self.lengths else 0

    def set_epoch(self, epoch: int) -> None:  # called by the Trainer at the start of each epoch, after a resume too
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        if self.seed is None:
            order, batches = list(range(len(self.lengths))), list(range(len(self)))
        else:
            generator = torch.Generator().manual_seed(self.seed * 10_007 + self.epoch)
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
            batches = torch.randperm(len(self), generator=generator).tolist()
        order.sort(key=self.lengths.__getitem__, reverse=True)  # keeps the order of equal ones
        return (order[self.cuts[number] : self.cuts[number + 1]] for number in batches[skip:])


class ResumableLoader(DataLoader):
    """A loader that a checkpoint written within an epoch finds at the batch where it stood."""

    batches = 0

    def __iter__(self) -> Any:
        self.batches = self.sampler.skip
        for batch in super().__iter__():
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches % max(1, len(self))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.skip = state["batches"]


class Pair(NamedTuple):
    """Token ids of both languages without special tokens, and the target sentence."""

    source: list[int]
    target: list[int]
    reference: str


class Pairs(Dataset):
    """Indexed by the list of indices of a batch."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs

    def __getitem__(self, batch: list[int]) -> list[Pair]:
        return [self.pairs[index] for index in batch]


def collate(pairs: Sequence[Pair]) -> dict[str, Any]:
    """A batch: `source` (batch, source tokens), `target` and `labels` (batch, target tokens), `references`."""

    def padded(rows: list[list[int]]) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)

    return {
        "source": padded([[*pair.source, END] for pair in pairs]),
        "target": padded([[BEGIN, *pair.target] for pair in pairs]),
        "labels": padded([[*pair.target, END] for pair in pairs]),
        "references": [pair.reference for pair in pairs],
    }


Split = tuple[list[str], list[str]]  # sentences of the source language, and of the target language


class ParallelText(L.LightningDataModule):
    """Pairs of sentences out of a folder of text files or a dataset of the hub, in sub-word units.

    Args:
        dataset: the folder, or the name of a dataset of the hub with a column for each language or a column
            `translation` with both.
        languages: source and target, the endings of the files.
        config: configuration of the dataset of the hub.
        vocabulary: tokens of a vocabulary, by byte pair encoding of bytes: no text is unknown.
        joint: whether both languages share one vocabulary.
        tokenizers: folder of `tokenizer.json` (not joint: `tokenizer.LANGUAGE.json`), which are read if they are there
            and written if not. Default: the folder of the run.
        batch_tokens: tokens of a training batch in both languages, padding included.
        max_length: tokens after which a sentence is cut.
        seed: of the order of the training batches.
    """

    def __init__(
        self,
        dataset: str,
        languages: tuple[str, str] = ("en", "de"),
        config: str | None = None,
        vocabulary: int = 6000,
        joint: bool = True,
        tokenizers: str | None = None,
        batch_tokens: int = 2048,
        max_length: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.texts: dict[str, Split] = {}
        self.splits: dict[str, list[Pair]] = {}
        self.tokenizers: list[Tokenizer] = []  # of source and target

    @property
    def tests(self) -> list[str]:
        """Names of the test sets."""
        return sorted(name for name in self.texts if name.startswith("test"))

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        folder, languages = Path(self.hparams.dataset), tuple(self.hparams.languages)
        if folder.is_dir():
            self.texts = read_folder(folder, languages)
        else:
            self.texts = read_hub(self.hparams.dataset, self.hparams.config, languages)
        trainer = self.trainer
        made = self._tokenizers() if trainer is None or trainer.is_global_zero else None
        self._encode(made if trainer is None else trainer.strategy.broadcast(made))

    def _tokenizers(self) -> list[str]:
        """The vocabularies as JSON, one or one of each language: those of the folder, or trained and written there."""
        joint, languages = self.hparams.joint, self.hparams.languages
        names = ["tokenizer.json"] if joint else [f"tokenizer.{language}.json" for language in languages]
        given = self.hparams.tokenizers
        if given is None and self.trainer is not None:
            given = self.trainer.log_dir or self.trainer.default_root_dir
        paths = [Path(given) / name for name in names] if given is not None else []
        if paths and all(path.is_file() for path in paths):
            return [path.read_text(encoding="utf-8") for path in paths]
        sides = self.texts["train"]
        corpora = [sides[0] + sides[1]] if joint else list(sides)
        made = [train_tokenizer(sentences, self.hparams.vocabulary).to_str() for sentences in corpora]
        for path, text in zip(paths, made, strict=False):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}")  # another run may be reading
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        return made

    def _encode(self, made: list[str]) -> None:
        self.tokenizers = [Tokenizer.from_str(text) for text in (made * 2)[:2]]
        largest = max(tokenizer.get_vocab_size() for tokenizer in self.tokenizers)
        if largest > self.hparams.vocabulary:
            raise ValueError(
                f"Expected tokenizers of at most vocabulary={self.hparams.vocabulary} tokens, but got one of "
                f"{largest}. Set vocabulary={largest}, or choose another folder for tokenizers."
            )
        for name, (source, target) in self.texts.items():
            ids = (self.encode(side, texts) for side, texts in enumerate((source, target)))
            self.splits[name] = [Pair(*row) for row in zip(*ids, target, strict=True)]

    def encode(self, side: int, texts: list[str]) -> list[list[int]]:
        """Token ids of sentences of the source (0) or target language (1), cut to the longest that is allowed."""
        return [e.ids[: self.hparams.max_length] for e in self.tokenizers[side].encode_batch(texts)]

    def decode(self, ids: list[int]) -> str:
        """The sentence of the target language."""
        return self.tokenizers[1].decode(ids, skip_special_tokens=True)

    def state_dict(self) -> dict[str, Any]:
        return {"tokenizers": [t.to_str() for t in (self.tokenizers[:1] if self.hparams.joint else self.tokenizers)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The vocabularies with which the weights of the checkpoint were trained."""
        if state_dict["tokenizers"] != self.state_dict()["tokenizers"]:
            self._encode(state_dict["tokenizers"])

    def loader(self, split: str, seed: int | None = None) -> DataLoader:
        pairs = self.splits[split]
        sampler = TokenBuckets([(len(p.source), len(p.target)) for p in pairs], self.hparams.batch_tokens, seed)
        kind = DataLoader if seed is None else ResumableLoader
        return kind(Pairs(pairs), batch_size=None, sampler=sampler, collate_fn=collate)

    def train_dataloader(self) -> DataLoader:
        return self.loader("train", self.hparams.seed)

    def val_dataloader(self) -> DataLoader:
        return self.loader("val")

    def test_dataloader(self) -> list[DataLoader]:
        return [self.loader(name) for name in self.tests]


def train_tokenizer(sentences: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte pair encoding of bytes: every text has an encoding, and its decoding is the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary < len(alphabet) + len(SPECIAL):
        raise ValueError(
            f"Expected a vocabulary of at least {len(alphabet) + len(SPECIAL)} tokens, the bytes and the special "
            f"ones, but got {vocabulary}."
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer


def read_folder(folder: Path, languages: tuple[str, str]) -> dict[str, Split]:
    """`train`, `val` and every test set, by the name of the files without the ending of the language and `.gz`."""
    stems = {"train": ("train",), "val": ("val", "valid", "validation", "dev")}
    found: dict[str, dict[str, Path]] = {}  # stem -> language -> file
    for path in sorted(folder.iterdir()):
        stem, _, language = path.name.removesuffix(".gz").rpartition(".")
        if stem and language in languages:
            found.setdefault(stem, {})[language] = path
    splits: dict[str, Split] = {}
    for split, names in stems.items():
        stem = next((name for name in names if name in found), None)
        if stem is None:
            wanted = " or ".join(f"{name}.{languages[0]}" for name in names)
            raise ValueError(
                f"Expected {wanted} (or .gz) in {folder}, but found none. Give a folder with parallel files "
                f"{names[0]}.{languages[0]} and {names[0]}.{languages[1]}, one sentence a line."
            )
        splits[split] = read_pair(folder, stem, found[stem], languages)
    for stem in found:
        if stem.startswith("test"):
            splits[stem.replace(".", "_")] = read_pair(folder, stem, found[stem], languages)
    return splits


def read_pair(folder: Path, stem: str, paths: dict[str, Path], languages: tuple[str, str]) -> Split:
    sides = []
    for language in languages:
        if language not in paths:
            there = next(iter(paths.values())).name
            raise ValueError(f"Expected {stem}.{language} (or .gz) beside {there} in {folder}, but found none.")
        path = paths[language]
        opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8", newline="\n") as file:
            sides.append([line.removesuffix("\n").removesuffix("\r") for line in file])
        for number, line in enumerate(sides[-1], 1):
            if not line.strip():
                raise ValueError(
                    f"{path.name}, line {number}: expected a sentence, but the line is empty. Remove it from the files "
                    "of both languages."
                )
    if len(sides[0]) != len(sides[1]) or not sides[0]:
        names = [paths[language].name for language in languages]
        raise ValueError(
            f"Expected {names[0]} and {names[1]} to be parallel, with as many lines each and at least one, but got "
            f"{len(sides[0])} and {len(sides[1])}."
        )
    return sides[0], sides[1]


def read_hub(dataset: str, config: str | None, languages: tuple[str, str]) -> dict[str, Split]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{dataset!r} is no folder, and datasets of the hub need the extra `recipes`: "
            "pip install 'lightning-compress[recipes]'."
        ) from error
    splits: dict[str, Split] = {}
    for name, rows in load_dataset(dataset, config).items():
        split = {"validation": "val", "valid": "val", "dev": "val"}.get(name, name)
        columns = rows["translation"] if "translation" in rows.column_names else None
        try:
            source, target = (
                [row[language] for row in columns] if columns is not None else list(rows[language])
                for language in languages
            )
        except KeyError as error:
            raise ValueError(
                f"Expected columns {list(languages)} or a column 'translation' with both in {dataset!r}, but got "
                f"{rows.column_names}. Set languages=[SOURCE, TARGET]."
            ) from error
        splits[split] = source, target
    missing = {"train", "val"} - set(splits)
    if missing:
        raise ValueError(f"Expected the splits train and validation in {dataset!r}, but got {sorted(splits)}.")
    return splits


if __name__ == "__main__":

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.link_arguments("data.vocabulary", "model.vocabulary")
            parser.link_arguments("data.joint", "model.tied")

    CLI(Translation, ParallelText, seed_everything_default=0)
