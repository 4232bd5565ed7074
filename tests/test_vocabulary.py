"""A smaller vocabulary: the corpus is tokenized as before, in new ids, and the smaller model answers in them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from lightning_compress import PruningPlan, apply_plan, discover, make_plan
from lightning_compress.discovery.tracer import output_tensors
from lightning_compress.surgery.errors import SurgeryError
from lightning_compress.vocabulary import trim_tokenizer, used_ids
from tests.test_theorem import call, double, error
from tests.zoo import MODELS

SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
TRAINED_ON = ["the cat sat on the mat", "a dog ran over the hill", "unbelievable cats were running fast"] * 3
CORPUS = ["the cat ran", "a cat over the mat"]
KINDS = {
    "WordPiece": (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer, {}),
    "BPE": (models.BPE(unk_token="[UNK]"), trainers.BpeTrainer, {}),
    "Unigram": (models.Unigram(), trainers.UnigramTrainer, {"unk_token": "[UNK]"}),
    "WordLevel": (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer, {}),
}


def tokenizer_of(kind: str) -> Tokenizer:
    model, trainer, options = KINDS[kind]
    tokenizer = Tokenizer(copy.deepcopy(model))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        TRAINED_ON, trainer(vocab_size=80, special_tokens=SPECIAL, show_progress=False, **options)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_padding(pad_id=3, pad_token="[PAD]")
    tokenizer.add_special_tokens(["[LATE]"])
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_the_corpus_is_tokenized_as_before(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = used_ids(tokenizer, CORPUS)
    small = trim_tokenizer(tokenizer, ids)
    assert small.get_vocab_size() == len(ids) < tokenizer.get_vocab_size()
    for before, after in zip(tokenizer.encode_batch(CORPUS), small.encode_batch(CORPUS), strict=True):
        assert after.tokens == before.tokens
        assert [ids[new] for new in after.ids] == before.ids  # padding and special tokens included
    assert small.token_to_id("[LATE]") == len(ids) - 1
    assert small.decode(small.encode("the cat").ids) == tokenizer.decode(tokenizer.encode("the cat").ids)


def test_other_texts_can_be_spelt_unless_characters_go() -> None:
    tokenizer = tokenizer_of("WordPiece")
    small = trim_tokenizer(tokenizer, used_ids(tokenizer, CORPUS))
    assert "[UNK]" not in small.encode("dog hill").tokens
    tiny = trim_tokenizer(tokenizer, used_ids(tokenizer, CORPUS, characters=False))
    assert tiny.get_vocab_size() < small.get_vocab_size()
    assert "[UNK]" in tiny.encode("dog").tokens
    assert tiny.encode("the cat").tokens == tokenizer.encode("the cat").tokens


def test_a_fast_tokenizer_of_transformers_is_trimmed_and_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    full = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of("BPE"), unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    ids = used_ids(full, CORPUS)
    small = trim_tokenizer(full, ids)
    assert isinstance(small, type(full)) and len(small) == len(ids) < len(full)
    expected = [[ids.index(i) for i in row] for row in full(CORPUS, padding=True)["input_ids"]]
    assert small(CORPUS, padding=True)["input_ids"] == expected
    assert small.pad_token_id == ids.index(full.pad_token_id)
    small.save_pretrained(tmp_path)
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded(CORPUS, padding=True)["input_ids"] == expected


@pytest.mark.parametrize("processor", ["BertProcessing", "RobertaProcessing"])
def test_ids_in_other_post_processors_follow(processor: str) -> None:
    tokenizer = tokenizer_of("WordPiece")
    tokenizer.post_processor = getattr(processors, processor)(("[LATE]", tokenizer.token_to_id("[LATE]")), ("[CLS]", 1))
    ids = used_ids(tokenizer, CORPUS)
    small = trim_tokenizer(tokenizer, ids)
    assert [ids[i] for i in small.encode("the cat").ids] == tokenizer.encode("the cat").ids


def test_merges_written_as_one_string_are_read() -> None:
    tokenizer = tokenizer_of("BPE")
    state = json.loads(tokenizer.to_str())
    state["model"]["merges"] = [" ".join(merge) for merge in state["model"]["merges"]]
    old = Tokenizer.from_str(json.dumps(state))
    assert used_ids(old, CORPUS) == used_ids(tokenizer, CORPUS)


def test_what_cannot_be_trimmed_is_refused() -> None:
    tokenizer = tokenizer_of("WordPiece")
    ids = used_ids(tokenizer, CORPUS)
    with pytest.raises(ValueError, match=r"Expected strictly increasing ids, but got \[2, 1\]"):
        trim_tokenizer(tokenizer, [2, 1])
    with pytest.raises(ValueError, match=r"Expected the ids to hold 0, the added token '\[UNK\]'"):
        trim_tokenizer(tokenizer, ids[1:])
    with pytest.raises(TypeError, match=r"Expected a tokenizers.Tokenizer or a fast tokenizer .*but got str"):
        used_ids("bert", CORPUS)
    plain = Tokenizer(models.WordPiece({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="Expected the ids to hold that of the unknown token"):
        trim_tokenizer(plain, [1])


# The model


def ids_in(*values: Any) -> set[int]:
    return {int(i) for t in output_tensors(values) if not t.is_floating_point() for i in t.unique()}


@pytest.mark.parametrize("name", ["LSTM", "BERT", "RoBERTa", "DistilBERT", "GPT-2", "Llama", "T5", "BART"])
def test_the_smaller_model_answers_in_new_ids(name: str) -> None:
    example = MODELS[name]
    model = example.model().double()
    args, kwargs = double(example.args), double(example.kwargs or {})
    structures = discover(model, args, kwargs, kinds=("vocab",), prove=True)
    assert {s.tier for s in structures} == {"native"}
    ids = sorted(ids_in(args, kwargs) | {0, 1, 2, 3} | {17, 100})
    plan = PruningPlan.of(model, structures, {s.name: ids for s in structures})
    small = copy.deepcopy(model)
    report = apply_plan(small, plan, verify=(args, kwargs))
    assert report.error is not None and report.error < 1e-12
    assert report.parameters_after < report.parameters_before
    number = {old: new for new, old in enumerate(ids)}

    def renumbered(value: Any) -> Any:
        is_ids = isinstance(value, Tensor) and not value.is_floating_point() and int(value.max()) > 1
        return value.clone().apply_(number.__getitem__) if is_ids else value

    new = call(small, [renumbered(a) for a in args], {k: renumbered(v) for k, v in kwargs.items()})
    old = [t[..., ids] if t.shape[-1] == 101 else t for t in call(model, args, kwargs)]
    assert error(new, old) < 1e-12


def test_it_goes_with_every_other_kind() -> None:
    example = MODELS["BERT"]
    model, kwargs = example.model(), example.kwargs or {}
    structures = discover(model, example.args, kwargs, kinds=("head", "ffn", "hidden", "vocab"), prove=True)
    ids = sorted(ids_in(example.args, kwargs) | {0, 1, 2, 3})
    kept = {s.name: ids if s.kind == "vocab" else range(0, s.units, 2) for s in structures}
    plan = PruningPlan.of(model, structures, kept)
    report = apply_plan(model, plan, verify=(example.args, kwargs))
    assert report.error is not None and report.error < 1e-12
    again = PruningPlan.from_json(report.plan.to_json())
    replayed = example.model()
    apply_plan(replayed, again)
    for one, other in zip(model.parameters(), replayed.parameters(), strict=True):
        assert torch.equal(one, other)


class Tagger(nn.Module):
    def __init__(self, padding: int | None = 7) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 6, padding_idx=padding), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.embed(ids))


class Computed(Tagger):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 1)


def test_padding_follows_and_must_stay() -> None:
    model, ids = Tagger(), torch.tensor([[2, 5, 7, 9]])
    (vocabulary,) = discover(model, (ids,), kinds=("vocab",), prove=True)
    dense = model(ids)
    plan = PruningPlan.of(model, [vocabulary], {"embed.vocab": (2, 5, 7, 9)})
    lost = PruningPlan.of(model, [vocabulary], {"embed.vocab": (2, 5, 9)})
    with pytest.raises(SurgeryError, match=r"Expected the padding id 7 of 'embed.weight' to be kept"):
        apply_plan(copy.deepcopy(model), lost, unverified=True)
    lacking = PruningPlan.of(model, [vocabulary], {"embed.vocab": (2, 5, 7)})
    with pytest.raises(SurgeryError, match=r"only ids that 'embed.vocab' keeps, but it uses \[9\]"):
        apply_plan(copy.deepcopy(model), lacking, verify=((ids,), {}))
    apply_plan(model, plan, verify=((ids,), {}))
    assert model.embed.padding_idx == 2
    assert torch.equal(model(torch.tensor([[0, 1, 2, 3]])), dense)


def test_computed_ids_stay_with_the_reason() -> None:
    structures = discover(Computed(None), (torch.tensor([[2, 5]]),), kinds=("vocab",))
    assert not structures
    model, ids = Tagger(), torch.tensor([[2, 5]])
    assert "vocab" not in {s.kind for s in discover(model, (ids,))}  # not among the default kinds


def test_a_budget_does_not_choose_ids() -> None:
    model, ids = Tagger(), torch.tensor([[2, 5]])
    structures = discover(model, (ids,), kinds=("ffn", "vocab"))
    with pytest.raises(ValueError, match=r"but got the vocabulary 'embed.vocab': which ids a corpus needs"):
        make_plan(model, structures, params=0.5)
