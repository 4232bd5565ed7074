"""The translation recipe: text, vocabulary, batches, search, schedule, resume, presets and the command line."""

from __future__ import annotations

import csv
import itertools
import math
import os
import random
import runpy
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

pytest.importorskip("tokenizers", reason="needs the extra `recipes`")

from lightning_compress import (
    FinalizeCompression,
    QuantizationAwareTraining,
    StructuredSparsity,
    apply_plan,
    discover,
    make_plan,
    weight_kinds,
)
from recipes import translation
from recipes.translation import (
    BEGIN,
    END,
    PAD,
    SIZES,
    ParallelText,
    Size,
    TokenBuckets,
    Translation,
    TranslationModel,
    collate,
    noam,
    read_folder,
    read_hub,
    search,
    sinusoidal_positions,
    smoothed_cross_entropy,
    train_tokenizer,
)
from tests.recipes import toy_language

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning calls a deprecated torch function
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
]

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 300
TINY = Size(16, 4, 2, 32, 0.0)


@pytest.fixture(scope="session")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    counts = {"train": 120, "val": 12, "test_2016_flickr": 8, "test_2017_flickr": 8}
    return toy_language.write(tmp_path_factory.mktemp("parallel"), counts)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller "tiny", without dropout."""
    monkeypatch.setitem(SIZES, "tiny", TINY)


def make(folder: Path, **options: Any) -> tuple[Translation, ParallelText]:
    L.seed_everything(0, verbose=False)
    module = Translation(VOCABULARY, "tiny", warmup=20, **options)
    return module, ParallelText(str(folder), vocabulary=VOCABULARY, batch_tokens=400)


def quiet_trainer(folder: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        **{"default_root_dir": folder, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        | {"enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, **options}
    )


def random_model(seed: int = 0, vocabulary: int = 40, norm_first: bool = False) -> TranslationModel:
    """In float64, with weights so large that no two translations are alike."""
    torch.manual_seed(seed)
    model = TranslationModel(vocabulary, TINY, norm_first=norm_first).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def padded(lengths: list[int], vocabulary: int = 40, columns: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (batch, tokens) and where they are padding."""
    padding = torch.arange(max(columns, *lengths)) >= torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(3, vocabulary, padding.shape, generator=torch.Generator().manual_seed(1))
    return ids.masked_fill(padding, PAD), padding


@pytest.mark.parametrize("recipe", ["translation", "text_classification"])
def test_kernels_of_many_shapes_are_kept_unless_the_user_says_otherwise(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    capacity = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(capacity, raising=False)
    for expected in (str(2**16), "7"):
        if expected == "7":
            monkeypatch.setenv(capacity, expected)
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="recipe")
        assert os.environ[capacity] == expected


def call() -> tuple[torch.Tensor, ...]:
    (source, source_padding), (target, target_padding) = padded([7, 3, 5, 6, 1]), padded([6, 2, 5, 6, 1])
    target[:, 0] = BEGIN
    return source, target, source_padding, target_padding


# Text


def test_a_folder_is_read_plain_and_compressed(parallel: Path) -> None:
    splits = read_folder(parallel, ("en", "de"))
    counts = {name: len(source) for name, (source, _) in splits.items()}
    assert counts == {"train": 120, "val": 12, "test_2016_flickr": 8, "test_2017_flickr": 8}
    words = toy_language.WORDS
    for source, target in splits.values():
        for english, translated in zip(source, target, strict=True):
            assert sorted(words[w] for w in english[:-1].split()) == sorted(translated[:-1].split())
    assert read_folder(parallel, ("de", "en"))["val"] == splits["val"][::-1]


def test_only_the_ends_of_lines_end_lines(tmp_path: Path) -> None:
    for name in ("train", "dev", "test.2016"):
        (tmp_path / f"{name}.en").write_bytes("a\x85b\u2028c\r\nd".encode())
        (tmp_path / f"{name}.de").write_bytes(b"e\nf\n")
    splits = read_folder(tmp_path, ("en", "de"))
    assert splits == dict.fromkeys(("train", "val", "test_2016"), (["a\x85b\u2028c", "d"], ["e", "f"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val.en": None, "val.de": None}, r"Expected val.en or valid.en or .* \(or .gz\) in .*, but found none"),
        ({"test_a.de": None}, r"Expected test_a.de \(or .gz\) beside test_a.en in .*, but found none"),
        ({"val.de": "x\n"}, r"Expected val.en and val.de to be parallel, .* but got 2 and 1"),
        ({"train.en": "", "train.de": ""}, r"Expected train.en and train.de .* at least one, but got 0 and 0"),
        ({"train.en": "a\n \n"}, r"train.en, line 2: expected a sentence, but the line is empty. Remove it"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, str | None], message: str) -> None:
    files = {f"{name}.{language}": "a\nb\n" for name in ("train", "val", "test_a") for language in ("en", "de")}
    for name, text in (files | change).items():
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path, ("en", "de"))


class Rows(dict):
    """Columns by name, as a dataset of the hub has them."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def test_datasets_of_the_hub_have_two_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(splits: dict[str, Rows]) -> None:
        def load_dataset(*names: Any) -> dict[str, Rows]:
            asked.append(names)
            return splits

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))

    columns = Rows(en=["a"], de=["b"])
    load({"train": columns, "validation": Rows(translation=[{"en": "c", "de": "d"}]), "test": columns})
    assert read_hub("some/name", "de-en", ("en", "de")) == {
        "train": (["a"], ["b"]),
        "val": (["c"], ["d"]),
        "test": (["a"], ["b"]),
    }
    assert asked == [("some/name", "de-en")]
    with pytest.raises(
        ValueError, match=r"Expected columns \['en', 'fr'\] or a column 'translation' .* \['en', 'de'\]"
    ):
        read_hub("some/name", None, ("en", "fr"))
    load({"train": columns})
    with pytest.raises(ValueError, match=r"Expected the splits train and validation in 'some/name', but got \['train'"):
        read_hub("some/name", None, ("en", "de"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'some/name' is no folder, .*lightning-compress\[recipes\]"):
        read_hub("some/name", None, ("en", "de"))


# Vocabulary


def test_every_text_survives_the_vocabulary() -> None:
    tokenizer = train_tokenizer(["ein alter Hund", "ein alter Mann"], VOCABULARY)
    for text in ("ein alter Hund", "Größe & 3,5 €", "  two  spaces ", "猫", "<s> </s>", ""):
        kept = text.replace("<s>", "").replace("</s>", "")  # what looks like a special token is one
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == kept
    assert [tokenizer.token_to_id(token) for token in translation.SPECIAL] == [PAD, BEGIN, END]
    assert len(tokenizer.encode("ein alter").ids) < 5
    with pytest.raises(ValueError, match=r"Expected a vocabulary of at least 259 tokens, .* but got 100"):
        train_tokenizer(["a"], 100)


@pytest.mark.parametrize("joint", [True, False])
def test_vocabularies_are_written_once_and_reused(parallel: Path, tmp_path: Path, joint: bool) -> None:
    def text(**options: Any) -> ParallelText:
        data = ParallelText(str(parallel), vocabulary=VOCABULARY, joint=joint, tokenizers=str(tmp_path), **options)
        data.setup()
        return data

    data = text()
    names = ["tokenizer.json"] if joint else ["tokenizer.de.json", "tokenizer.en.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert data.decode(data.splits["val"][0].target) == data.texts["val"][1][0]
    other = train_tokenizer(["something else"], 260).to_str()
    for name in names:
        (tmp_path / name).write_text(other)
    reused = text()
    assert reused.tokenizers[0].to_str() == other != data.tokenizers[0].to_str()
    reused.load_state_dict(data.state_dict())  # those of a checkpoint count more than those of a folder
    assert reused.splits == data.splits and reused.state_dict() == data.state_dict()
    large = r"Expected tokenizers of at most vocabulary=260 tokens, but got one of \d+. Set vocabulary=\d+, or"
    for name, text_of in zip(names, (data.state_dict()["tokenizers"] * 2)[: len(names)], strict=True):
        (tmp_path / name).write_text(text_of)
    with pytest.raises(ValueError, match=large):
        ParallelText(str(parallel), vocabulary=260, joint=joint, tokenizers=str(tmp_path)).setup()


@pytest.mark.data
def test_real_sentences_survive_the_vocabulary(tmp_path: Path) -> None:
    data = ParallelText(str(Path(os.environ["LIGHTNING_COMPRESS_DATA"]) / "multi30k"), tokenizers=str(tmp_path))
    data.texts = read_folder(Path(data.hparams.dataset), ("en", "de"))
    assert {name: len(split[0]) for name, split in data.texts.items() if name in ("train", "val", *data.tests)} == {
        "train": 29000,
        "val": 1014,
        "test_2016_flickr": 1000,
        "test_2017_flickr": 1000,
        "test_2017_mscoco": 461,
        "test_2018_flickr": 1071,
    }
    data.texts = {name: (source[:200], target[:200]) for name, (source, target) in data.texts.items()}
    data._encode(data._tokenizers())
    for pair in data.splits["train"]:
        assert data.decode(pair.target) == pair.reference


# Batches


def test_targets_are_shifted_labels() -> None:
    batch = collate([translation.Pair([5], [6, 7], "x y"), translation.Pair([5, 8, 9], [6], "x")])
    assert batch["source"].tolist() == [[5, END, PAD, PAD], [5, 8, 9, END]]
    assert batch["target"].tolist() == [[BEGIN, 6, 7], [BEGIN, 6, PAD]]
    assert batch["labels"].tolist() == [[6, 7, END], [6, END, PAD]]
    assert batch["references"] == ["x y", "x"]


@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_buckets_hold_every_pair_once_within_the_limit(count: int) -> None:
    draw = random.Random(0)
    lengths = [(draw.randint(1, 40), draw.randint(1, 40)) for _ in range(count)]
    sampler = TokenBuckets(lengths, batch_tokens=200, seed=3)
    first = list(sampler)
    assert len(first) == len(sampler) and sorted(itertools.chain(*first)) == list(range(count))
    for batch in first:
        sizes = [lengths[i] for i in batch]
        assert len(batch) == 1 or len(batch) * (max(s for s, _ in sizes) + max(t for _, t in sizes)) <= 200
    assert list(sampler) == first  # the same epoch again, as after a resume
    sampler.set_epoch(1)
    second = list(sampler)
    assert len(second) == len(first) and (count < 3 or second != first)
    sampler.skip = min(2, len(sampler))
    assert list(sampler) == second[2:] and list(sampler) == second  # once


def test_buckets_pad_little_and_change_partners() -> None:
    draw = random.Random(0)
    lengths = [(length := draw.randint(5, 25), length + draw.randint(-3, 3)) for _ in range(3000)]
    sampler = TokenBuckets(lengths, batch_tokens=1000)
    first = list(sampler)
    used = sum(len(b) * (max(lengths[i][0] for i in b) + max(lengths[i][1] for i in b)) for b in first)
    assert used < 1.05 * sum(s + t for s, t in lengths)
    sampler.set_epoch(1)
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in sampler}


# The model


def test_positions_are_those_of_the_paper() -> None:
    table = sinusoidal_positions(50, 7)
    for position, place in itertools.product((0, 1, 49), range(7)):
        angle = position / 10000 ** (place // 2 * 2 / 7)
        expected = math.cos(angle) if place % 2 else math.sin(angle)
        assert float(table[position, place]) == pytest.approx(expected, abs=1e-6)


def test_sizes() -> None:
    base = TranslationModel(37000, SIZES["base"])
    assert round(sum(p.numel() for p in base.parameters()) / 1e6) == 63  # "65 million" in the paper
    assert base.source.weight is base.target.weight is base.output.weight
    own = TranslationModel(40, TINY, tied=False)
    assert own.source.weight is not own.target.weight is not own.output.weight
    with pytest.raises(ValueError, match=r"Expected size to be one of \['tiny', 'small', 'base'\], but got 'large'."):
        Translation(40, "large")
    ids = torch.full((1, 1025), 5)
    with pytest.raises(ValueError, match=r"Expected at most 1024 tokens, but got 1025. Cut sentences: max_length=128"):
        own(ids, ids, ids.eq(PAD), ids.eq(PAD))


@pytest.mark.parametrize("grad", [True, False])  # without gradients layers of the encoder take their fused path
def test_padding_changes_nothing(grad: bool) -> None:
    model = random_model()
    source, target, source_padding, target_padding = call()
    with torch.set_grad_enabled(grad):
        logits = model(source, target, source_padding, target_padding)
        wide = (torch.nn.functional.pad(t, (0, 3), value=PAD) for t in (source, target))
        longer = model(*(wide := tuple(wide)), *(t.eq(PAD) for t in wide))
        for row in range(5):
            alone = [
                t[row : row + 1, : int((~t_pad[row]).sum())]
                for t, t_pad in ((source, source_padding), (target, target_padding))
            ]
            own = model(*alone, *(t.eq(PAD) for t in alone))[0]
            for other in (logits, longer):
                torch.testing.assert_close(other[row, : len(own)], own, rtol=0, atol=1e-12)
                assert not other[row, len(own) :].any()


def test_no_token_sees_those_behind_it() -> None:
    model = random_model()
    source, target, source_padding, target_padding = call()
    logits = model(source, target, source_padding, target_padding)
    changed = target.clone()
    changed[:, 3:] = target[:, 3:].flip(0)
    torch.testing.assert_close(model(source, changed, source_padding, target_padding)[0, :3], logits[0, :3])


# Search


def score_of(model: TranslationModel, source: torch.Tensor, ids: list[int], ended: bool, alpha: float) -> float:
    """By one pass over the whole translation."""
    labels = [*ids, END] if ended else ids
    target = torch.tensor([[BEGIN, *labels[:-1]]])
    with torch.no_grad():
        logits = model(source, target, source.eq(PAD), target.eq(PAD))[0]
    gains = logits.log_softmax(-1)[range(len(labels)), labels]
    return float(gains.sum()) / ((5 + len(labels)) / 6) ** alpha


def pruned(model: TranslationModel) -> TranslationModel:
    structures = discover(model, call(), kinds=("head", "ffn"))
    draw = torch.Generator().manual_seed(2)
    scores = {s.name: torch.rand(s.units, generator=draw) for s in structures}
    plan = make_plan(model, structures, scores=scores, macs=0.5)
    assert apply_plan(model, plan, verify=(call(), {})).error <= 1e-9
    decoder = model.transformer.decoder.layers
    assert any(layer.self_attn.num_heads < 4 or layer.multihead_attn.num_heads < 4 for layer in decoder)
    assert any(layer.linear1.out_features < 32 for layer in decoder)
    return model


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("change", ["whole", "units removed", "widths removed", "layer removed"])
def test_caches_change_nothing(change: str, norm_first: bool) -> None:
    model = random_model(norm_first=norm_first)
    if change == "units removed":
        pruned(model)
    elif change == "widths removed":
        structures = discover(model, call(), kinds=("qk_dim", "vo_dim"))
        apply_plan(model, make_plan(model, structures, units=7 / 12), verify=(call(), {}))
    elif change == "layer removed":
        structures = discover(model, call(), kinds=("layer",), prove=True)
        apply_plan(model, make_plan(model, structures, units=0.75), verify=(call(), {}))
    source, _, padding, _ = call()
    for beam in (1, 4):
        found = search(model, source, padding, beam, extra=12)  # a warning would be an error: caches are used
        plain = search(model, source, padding, beam, extra=12, cached=False)
        assert [(f.ids, f.ended) for f in found] == [(f.ids, f.ended) for f in plain]
        assert [f.score for f in found] == pytest.approx([f.score for f in plain], rel=0, abs=1e-10)
        for row, one in enumerate(found):
            alone = source[row : row + 1, : int((~padding[row]).sum())]
            assert one.score == pytest.approx(score_of(model, alone, one.ids, one.ended, 0.6), rel=0, abs=1e-10)
            (same,) = search(model, alone, alone.eq(PAD), beam, extra=12)  # nor do the others of the batch
            assert (same.ids, same.ended) == (one.ids, one.ended)


def test_a_beam_of_one_is_greedy() -> None:
    for seed in range(3):
        model = random_model(seed)
        source, _, padding, _ = call()
        found = search(model, source, padding, extra=9)
        for row, one in enumerate(found):
            alone, ids = source[row : row + 1, : int((~padding[row]).sum())], [BEGIN]
            while ids[-1] != END and len(ids) - 1 < alone.shape[1] + 9:
                target = torch.tensor([ids])
                with torch.no_grad():
                    logits = model(alone, target, alone.eq(PAD), target.eq(PAD))[0, -1]
                logits[[PAD, BEGIN]] = -math.inf
                ids.append(int(logits.argmax()))
            assert [*one.ids, *([END] if one.ended else [])] == ids[1:]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_beam_that_holds_everything_finds_the_best(alpha: float) -> None:
    """Against all 31 translations of at most four tokens in a vocabulary of two words."""
    different = 0
    for seed in range(6):
        model = random_model(seed, vocabulary=5)
        source, padding = padded([2], vocabulary=5)
        every = [
            (list(ids), ended)
            for length in range(5)
            for ids in itertools.product((3, 4), repeat=length)
            for ended in (True, False)
            if ended != (length == 4)
        ]
        assert len(every) == 31
        scores = [score_of(model, source, ids, ended, alpha) for ids, ended in every]
        (best,) = search(model, source, padding, 40, alpha, extra=2)
        assert best.score == pytest.approx(max(scores), abs=1e-12)
        assert (best.ids, best.ended) == every[scores.index(max(scores))]
        (greedy,) = search(model, source, padding, 1, alpha, extra=2)
        assert greedy.score <= best.score + 1e-12
        different += greedy.ids != best.ids
    assert different  # else greedy search would have done


def test_what_a_cache_would_miss_is_found_and_said() -> None:
    model = random_model()
    source, _, padding, _ = call()
    found = search(model, source, padding, 3, extra=5)
    handle = model.transformer.decoder.layers[1].self_attn.register_forward_hook(lambda *_: None)
    with pytest.warns(
        UserWarning, match=r"without cached keys .*: something is attached to 'transformer.decoder.layers.1.self_attn'"
    ):
        assert [f.ids for f in search(model, source, padding, 3, extra=5)] == [f.ids for f in found]
    handle.remove()
    model.transformer.decoder.layers[0] = torch.nn.Sequential()
    assert (
        translation.why_not_cached(model)
        == "'transformer.decoder.layers.0' is no nn.TransformerDecoderLayer but a Sequential"
    )
    for beam, penalty in ((0, 0.6), (1, -0.1)):
        with pytest.raises(
            ValueError, match=r"Expected a beam of at least 1 and a length_penalty of at least 0, but got"
        ):
            search(model, source, padding, beam, penalty)


# Training


def test_the_loss_is_that_of_the_formula() -> None:
    logits, labels = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[3, 2, PAD], [4, 1, 2]])
    logs, total = logits.log_softmax(-1), 0.0
    for row, column in itertools.product(range(2), range(3)):
        if labels[row, column] != PAD:
            own = float(logs[row, column, labels[row, column]])
            total -= 0.9 * own + 0.1 / 5 * float(logs[row, column].sum())
    assert float(smoothed_cross_entropy(logits, labels, 0.1)) == pytest.approx(total / 5)


def test_the_learning_rate_is_that_of_noam(parallel: Path, tmp_path: Path, narrow: None) -> None:
    module, data = make(parallel, factor=2.0)
    rates: list[float] = []

    class Record(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    quiet_trainer(tmp_path, max_steps=30, limit_val_batches=0, callbacks=[Record()]).fit(module, data)
    assert rates == pytest.approx([2 / 4 * min(t**-0.5, t * 20**-1.5) for t in range(1, 31)])
    assert max(rates) == rates[19] == 2 * noam(20, 16, 20)


@pytest.mark.parametrize("crash", [4, 9])  # within the first epoch, and within the second
def test_a_resumed_run_is_the_straight_run(parallel: Path, tmp_path: Path, narrow: None, crash: int) -> None:
    class PowerCut(Exception):
        pass

    class Crash(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == crash:
                raise PowerCut

    def train(name: str, *callbacks: L.Callback, ckpt_path: str | None = None) -> dict[str, torch.Tensor]:
        module, data = make(parallel)
        checkpoint = ModelCheckpoint(tmp_path / name, save_last=True, every_n_train_steps=3)
        options = {"max_epochs": 2, "enable_checkpointing": True, "limit_val_batches": 0}
        trainer = quiet_trainer(tmp_path / name, callbacks=[checkpoint, *callbacks], **options)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
        assert trainer.global_step == 2 * len(data.train_dataloader()) == 16
        return module.state_dict()

    straight = train("straight")
    with pytest.raises(PowerCut):
        train("crashed", Crash())
    resumed = train("crashed", ckpt_path=str(tmp_path / "crashed" / "last.ckpt"))
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


def test_bleu_is_that_of_sacrebleu(parallel: Path, tmp_path: Path, narrow: None) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs the extra `recipes`")
    module, data = make(parallel)
    trainer = quiet_trainer(tmp_path)
    said: dict[str, list[str]] = {"test_2016_flickr": [], "test_2017_flickr": []}
    noise = random.Random(0)

    def decode(ids: list[int]) -> str:
        """An untrained model says nothing that would score: the references with words left out."""
        name = module.trainer.datamodule.tests[module._current]
        reference = data.splits[name][order[name][len(said[name])]].reference
        said[name].append(" ".join(w for w in reference.split() if noise.random() < 0.8))
        return said[name][-1]

    data.setup()
    order = {name: list(itertools.chain(*data.loader(name).sampler)) for name in said}
    data.decode = decode  # type: ignore[method-assign]
    step = module.test_step

    def test_step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        module._current = dataloader_idx
        step(batch, batch_idx, dataloader_idx)

    module.test_step = test_step  # type: ignore[method-assign]
    trainer.test(module, data, verbose=False)
    for name, texts in said.items():
        references = [data.splits[name][i].reference for i in order[name]]
        expected = sacrebleu.corpus_bleu(texts, [references]).score
        assert 5 < expected < 95
        assert float(trainer.callback_metrics[f"{name}_bleu"]) == pytest.approx(expected, abs=1e-3)


# Compression


def test_heads_and_units_of_both_stacks_are_found() -> None:
    model = random_model()
    structures = discover(model, call(), kinds=("head", "ffn"), prove=True)
    expected = [
        f"transformer.{stack}.layers.{n}.{part}" for stack, parts in STACKS.items() for n in (0, 1) for part in parts
    ]
    assert sorted(s.name for s in structures) == sorted(expected)
    assert {(s.kind, s.units, s.tier) for s in structures} == {("head", 4, "native"), ("ffn", 32, "native")}
    kinds = weight_kinds(model, call())
    assert {name: kind for name, kind in kinds.items() if kind not in ("attention", "ffn")} == {
        "source.weight": "embedding"
    }
    assert (
        sum(kind == "attention" for kind in kinds.values()) == 12 and sum(kind == "ffn" for kind in kinds.values()) == 8
    )


STACKS = {
    "encoder": ("self_attn.head", "ffn"),
    "decoder": ("self_attn.head", "multihead_attn.head", "ffn"),
}


PRESETS = [
    ("group_lasso", "finalize", "distillation"),
    ("hoyer_square", "finalize", "quantization_aware_training"),
    ("token_pruning",),
]


@pytest.mark.parametrize("names", PRESETS, ids="+".join)
def test_presets_work_and_search_sees_what_they_do(
    names: tuple[str, ...], parallel: Path, tmp_path: Path, cli_callbacks: Callable[..., list[Any]], narrow: None
) -> None:
    callbacks = cli_callbacks(*(ROOT / "callbacks" / f"{name}.yaml" for name in names))
    module, data = make(parallel)
    trainer = quiet_trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=callbacks)
    trainer.fit(module, data)
    for callback in callbacks:
        if isinstance(callback, FinalizeCompression):
            assert callback.report is not None and callback.report.error <= 1e-9
            assert callback.report.macs_kept <= 0.4
            layers = [*module.model.transformer.encoder.layers, *module.model.transformer.decoder.layers]
            assert any(layer.linear1.out_features < 32 for layer in layers)
            assert any(layer.self_attn.num_heads < 4 for layer in layers)
        if isinstance(callback, QuantizationAwareTraining):
            assert len(callback.quantizers) == 20
    module.double().eval()
    batch = next(iter(data.val_dataloader()))
    for one, source in zip(
        search(module.model, batch["source"], batch["source"].eq(PAD), 2), batch["source"], strict=True
    ):
        alone = source[source.ne(PAD)].unsqueeze(0)
        assert one.score == pytest.approx(score_of(module.model, alone, one.ids, one.ended, 0.6), rel=0, abs=1e-6)


def test_strategies_of_tprune_know_the_decoder(parallel: Path, tmp_path: Path, narrow: None) -> None:
    module, data = make(parallel)
    model = module.model
    sparsity = StructuredSparsity(
        strategy="fine", decoder="transformer.decoder", strength=1e3, start=0.0, module="model"
    )
    quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[sparsity]).fit(module, data)
    encoder, decoder = model.transformer.encoder.layers[0], model.transformer.decoder.layers[0]
    assert (
        not encoder.self_attn.in_proj_weight.any()
        and not encoder.linear1.weight.any()
        and not encoder.linear2.weight.any()
    )
    for attention in (decoder.self_attn, decoder.multihead_attn):
        query, key, value = attention.in_proj_weight.chunk(3)
        assert not query.any() and not key.any() and value.any() and attention.out_proj.weight.any()
    assert decoder.linear1.weight.any() and decoder.linear2.weight.any()


# From the command line


def run_command(page: str, contains: str, parallel: Path, folder: Path, *arguments: str) -> list[str]:
    """Run the command of `page` with the recipe and these words, word for word but for its paths; its words."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(
        line.strip(" #`")
        for line in text.splitlines()
        if line.strip(" #").startswith("python recipes/translation.py") and contains in line
    )
    words = (
        line.replace("path/to/multi30k", str(parallel)).replace("path/to/last.ckpt", str(folder / "last.ckpt")).split()
    )
    own = [
        "--model.size=tiny",
        "--trainer.accelerator=cpu",
        f"--data.vocabulary={VOCABULARY}",
        "--trainer.logger=CSVLogger",
    ]
    own += [f"--trainer.logger.save_dir={folder}", "--data.batch_tokens=1000", "--trainer.enable_progress_bar=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words[1:], *own, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return words


def metrics(folder: Path) -> dict[str, float]:
    """The last value of everything that was logged."""
    found: dict[str, float] = {}
    for path in sorted(folder.rglob("metrics.csv")):
        with path.open() as file:
            found |= {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}
    return found


def test_the_commands_of_the_documentation_run(parallel: Path, tmp_path: Path) -> None:
    words = run_command("README.md", "finalize", parallel, tmp_path, "--trainer.max_epochs=4")
    assert {"callbacks/group_lasso.yaml", "callbacks/finalize.yaml"} <= set(words)
    assert 0.2 < metrics(tmp_path)["compression/macs_kept"] <= 0.4 and "val_bleu" in metrics(tmp_path)
    (tokenizer,) = tmp_path.rglob("tokenizer.json")
    next(tmp_path.rglob("*.ckpt")).rename(tmp_path / "last.ckpt")
    presets = [
        f"--config={ROOT / 'callbacks' / name}.yaml" for name in ("group_lasso", "finalize")
    ]  # as it was trained
    run_command("recipes/translation.py", "--ckpt_path", parallel, tmp_path, *presets)
    assert {"test_2016_flickr_bleu", "test_2017_flickr_bleu"} <= set(metrics(tmp_path))
    assert all(path.read_text() == tokenizer.read_text() for path in tmp_path.rglob("tokenizer.json"))


def test_the_recipe_learns(tmp_path: Path, narrow: None) -> None:
    """Eight sentences by heart."""
    for stem in ("train", "val"):
        toy_language.write(tmp_path / "text", {stem: 8})
    module, data = make(tmp_path / "text", factor=0.3)
    quiet_trainer(tmp_path, max_epochs=180, limit_val_batches=0).fit(module, data)
    trainer = quiet_trainer(tmp_path)
    trainer.validate(module, data, verbose=False)
    assert float(trainer.callback_metrics["val_bleu"]) > 90
