"""The image recipe: reading, augmentation, both fits on tiny models, and the command line."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

datasets = pytest.importorskip("datasets", reason="needs the extra `recipes`")
image_module = pytest.importorskip("PIL.Image", reason="needs the extra `recipes`")

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402 (after the skip)
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from lightning_compress import token_runtime, tokens_off  # noqa: E402
from recipes import image_classification as recipe  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
]

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--width=16", "--depth=2", "--heads=4", "--batch_size=32", "--macs=0.5", "--start=0.0", "--at=0.5"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 20 images of different sizes and formats: mostly red, green or blue, with noise."""
    folder = tmp_path_factory.mktemp("photographs")
    draw = torch.Generator().manual_seed(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir()
        for number in range(20):
            pixels = torch.randint(0, 100, (10 + number, 12, 3), generator=draw, dtype=torch.uint8)
            pixels[..., channel] += 150
            ending = ("png", "JPG")[number % 2]
            image_module.fromarray(pixels.numpy()).save(folder / name / f"{number:02}.{ending}")
        (folder / name / "notes.txt").write_text("no image")
    return folder


def run(*arguments: str) -> dict:
    return recipe.main(recipe.parser().parse_args([*TINY, *arguments]))


# Data


def test_digits_are_split_by_class_and_the_seed_decides() -> None:
    train, test = recipe.read("digits", "", "", seed=0)
    assert (len(train[0]), len(test[0])) == (1257, 540)
    shares = Counter(test[1])
    assert all(shares[c] == pytest.approx(0.3 * count, abs=1) for c, count in Counter([*train[1], *test[1]]).items())
    assert recipe.read("digits", "", "", seed=0)[1][1] == test[1] != recipe.read("digits", "", "", seed=1)[1][1]


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    _, test = recipe.read("digits", "", "", seed=0)
    pixels = torch.stack([image for image, _ in recipe.Images(test, 8, "L")])
    ours = sorted(tuple(p) for p in ((pixels + 1) * 127.5 / 15).round().int().flatten(1).tolist())
    everything = Counter(tuple(p) for p in load_digits().data.astype(int).tolist())
    assert pixels.shape == (540, 1, 8, 8) and pixels.dtype == torch.float32 and pixels.min() == -1
    assert not Counter(ours) - everything


def test_a_folder_of_classes(photographs: Path) -> None:
    train, test = recipe.read(str(photographs), "", "", seed=0)
    assert (len(train[0]), len(test[0])) == (42, 18)
    assert Counter(test[1]) == {0: 6, 1: 6, 2: 6}
    assert not {str(p) for p in train[0]} & {str(p) for p in test[0]}
    for split in (train, test):
        for (pixels, label), path in zip(recipe.Images(split, 8, "RGB"), split[0], strict=True):
            assert pixels.shape == (3, 8, 8)
            # in the order of the alphabet: blue, green, red
            assert pixels.mean(dim=(1, 2)).argmax() == 2 - label and path.parent.name == ("blue", "green", "red")[label]


def test_a_folder_with_train_and_test(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(photographs, target_is_directory=True)
    for name in ("red", "blue"):
        (tmp_path / "test" / name).mkdir(parents=True)
        image_module.new("RGB", (8, 8)).save(tmp_path / "test" / name / "a.png")
    train, test = recipe.read(str(tmp_path), "", "", seed=0)
    assert (len(train[0]), len(test[0])) == (60, 2)
    assert test[1] == [0, 2]  # the numbers of the training classes, green has no test image


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def split(names: list[str]) -> datasets.Dataset:
        pictures = [image_module.new("L", (8, 8), 10 * n) for n in range(len(names))]
        features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=["a", "b"]))
        return datasets.Dataset.from_dict({"picture": pictures, "kind": names}, features=features)

    hub = datasets.DatasetDict(train=split(["a", "b", "b"]), validation=split(["b", "a"]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)
    train, test = recipe.read("owner/name", "picture", "kind", seed=0)
    assert (train[1], test[1]) == ([0, 1, 1], [1, 0])
    pixels, label = recipe.Images(train, 4, "L")[2]
    assert pixels.shape == (1, 4, 4) and label == 1
    torch.testing.assert_close(pixels, torch.full((1, 4, 4), 20 / 127.5 - 1))
    with pytest.raises(
        ValueError, match=r"Expected columns \['image'\] in 'owner/name', but it has \['picture', 'kind'\]"
    ):
        recipe.read("owner/name", "image", "kind", seed=0)


@pytest.mark.parametrize("labels, expected", [(["cat", "ant", "cat"], [1, 0, 1]), ([7, 3, 7], [1, 0, 1])])
def test_labels_of_the_hub_are_numbered(
    monkeypatch: pytest.MonkeyPatch, labels: list[int | str], expected: list[int]
) -> None:
    def split(labels: list[int | str]) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"image": [b""] * len(labels), "label": labels})

    hub = datasets.DatasetDict(train=split(labels), test=split(labels[1:]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)
    assert [split[1] for split in recipe.read("name", "image", "label", seed=0)] == [expected, expected[1:]]
    hidden = type(labels[0])(-1)
    hub["test"] = split([hidden, hidden])  # the labels of a competition's test set are kept back
    with pytest.raises(ValueError, match=rf"Expected labels of 'name' among .*, but got {{{hidden!r}}} in 'test'"):
        recipe.read("name", "image", "label", seed=0)


def test_shifts_move_whole_images() -> None:
    image = torch.arange(2 * 6 * 5.0).view(1, 2, 6, 5)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2), mode="replicate")[0]
    allowed = {(r, c): padded[:, r : r + 6, c : c + 5] for r in range(5) for c in range(5)}
    seen = set()
    for moved in recipe.shifted(image.expand(400, -1, -1, -1), 2):
        (offset,) = [o for o, expected in allowed.items() if torch.equal(moved, expected)]
        seen.add(offset)
    assert seen == set(allowed)
    assert torch.equal(recipe.shifted(image, 0), image)


# Bad input


@pytest.mark.parametrize("folders, images", [([], 0), (["only"], 2), (["one", "two"], 0)])
def test_a_folder_without_two_classes_is_named(tmp_path: Path, folders: list[str], images: int) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
        for number in range(images):
            image_module.new("L", (8, 8)).save(tmp_path / name / f"{number}.png")
    with pytest.raises(ValueError, match=rf"of at least two classes in sub-folders of .*but got {images} images in"):
        recipe.read(str(tmp_path), "", "", seed=0)


def test_an_unknown_dataset_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ValueError, match="Expected 'digits', a folder or a dataset of the hub, but got 'digit': no network"
    ):
        recipe.read("digit", "image", "label", seed=0)


@pytest.mark.parametrize(
    "option, message",
    [
        ("--patch=3", "Expected patch to be at least 2 and to divide size=8, but got 3"),
        ("--patch=1", "Expected patch to be at least 2 and to divide size=8, but got 1"),
        ("--heads=3", "Expected heads to divide width=16, but got 3"),
        ("--macs=1.5", "Expected macs"),
        ("--regularizer=lasso", "lasso"),
    ],
)
def test_bad_options(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(option)


# Both fits


def test_a_folder_of_photographs_is_compressed(
    photographs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    options = ("--color", "--epochs=6", "--batch_size=8", f"--results={file}", f"--maps={tmp_path / 'maps'}")
    comparison = run(f"--data={photographs}", *options)
    assert set(comparison["kept"]) == {
        "at most 1.0 points of accuracy lost",
        "at least 2.5 times fewer MACs",
        "at least 1.8 times faster",
        "error of the removal at most 1e-6",
    }
    report = comparison["report"]
    assert report["macs_kept"] == pytest.approx(0.5, abs=0.02)
    assert 0 <= report["error"] <= 1e-6
    assert comparison["kept"]["error of the removal at most 1e-6"]
    assert (
        comparison["accuracy_percent"]["dense"] >= 90
    )  # one channel is brighter than the others: no model should fail
    assert not comparison["kept"]["at least 2.5 times fewer MACs"]  # half of them were to stay
    assert comparison["macs_ratio"] < 2.5
    printed = capsys.readouterr().out
    for title in ("test accuracy, %", "MACs of an image", "ms for a batch of 64", "error of the removal"):
        assert title in printed
    assert "MISSED  at least 2.5 times fewer MACs" in printed
    page = (tmp_path / "maps" / "report.html").read_text()
    assert str(tmp_path / "maps" / "report.html") in printed
    assert "Logged metrics over training" in page and "model.blocks.0.attention.qkv.weight" in page
    assert json.loads(file.read_text()) == json.loads(json.dumps(comparison))


def test_the_reported_macs_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {}

    def measured(models: dict, *args: object, **kwargs: object) -> dict:
        modules.update(models)
        return measure_latency(models, *args, **{**kwargs, "repeats": 1})

    measure_latency = recipe.measure_latency
    monkeypatch.setattr(recipe, "measure_latency", measured)
    report = run("--epochs=1")["report"]
    for name, macs in zip(("dense", "compressed"), report["macs"], strict=True):
        # of the attention cores the counter sees into the plain one only
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            modules[name].eval()(torch.zeros(1, 1, 8, 8))
        assert counter.get_total_flops() / 2 == macs


@pytest.mark.parametrize("tokens", [[], ["--tokens=0.8"]], ids=["structures", "and tokens"])
def test_a_model_of_transformers_is_compressed(photographs: Path, tmp_path: Path, tokens: list[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=16, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    comparison = run(
        f"--data={photographs}",
        f"--pretrained={tmp_path / 'model'}",
        "--color",
        "--size=16",
        "--epochs=2",
        "--batch_size=8",
        "--distill=0.5",
        "--start=0.2",
        f"--picture={tmp_path / 'picture.png'}",
        *tokens,
    )
    assert comparison["report"]["macs_kept"] == pytest.approx(0.5, abs=0.02)
    assert {s["kind"] for s in comparison["report"]["structures"]} == {"head", "ffn"}
    assert ("tokens" in comparison) == (tmp_path / "picture.png").exists() == bool(tokens)


# Tokens


class Drawn(SimpleNamespace):
    """What a run with `--tokens` came to: comparison, figure, file, modules, arguments and result of `tokens_left`."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    pytest.importorskip("matplotlib", reason="needs the extra `recipes`")
    from matplotlib.figure import Figure

    found = Drawn(file=tmp_path_factory.mktemp("tokens") / "folder" / "picture.png")
    measure_latency, tokens_left, savefig = recipe.measure_latency, recipe.tokens_left, Figure.savefig

    def measured(models: dict, *args: object, **kwargs: object) -> dict:
        found.modules = models
        return measure_latency(models, *args, **{**kwargs, "repeats": 1})

    def left(*args: object) -> recipe.Tokens:
        found.arguments, found.tokens = args, tokens_left(*args)
        return found.tokens

    def saved(figure: Figure, *args: object, **kwargs: object) -> None:
        found.figure = figure
        savefig(figure, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "measure_latency", measured)
        patch.setattr(recipe, "tokens_left", left)
        patch.setattr(Figure, "savefig", saved)
        found.comparison = run("--epochs=3", "--depth=3", "--tokens=0.5", f"--picture={found.file}")
    return found


def test_the_layers_of_the_tokens_are_those_that_the_runtime_counted(drawn: Drawn) -> None:
    _, test = recipe.read("digits", "", "", seed=0)
    images = torch.stack([pixels for pixels, _ in recipe.Images(test, 8, "L")])
    module = drawn.modules["compressed"].eval()
    (runtime,) = filter(None, map(token_runtime, module.modules()))
    layers = []
    for batch in images.split(256):
        with torch.no_grad():
            module(batch)
        rows = [[0] * 16 for _ in batch]
        for positions, shown in runtime.counts.present:  # of each layer
            for row in range(len(batch)):
                for slot, token in enumerate(range(16) if positions is None else positions[row].tolist()):
                    rows[row][token] += 1 if shown is None else int(shown[row, slot])
        layers += rows
    assert drawn.tokens.layers.tolist() == layers
    assert drawn.tokens.layers.min() == 1 and drawn.tokens.layers.max() == 3
    shares = [sum(through > layer for row in layers for through in row) / (540 * 16) for layer in range(3)]
    assert drawn.comparison["tokens"]["kept_per_layer"] == pytest.approx(shares) and shares[0] == 1 > shares[2]


def test_the_macs_with_tokens_are_those_that_torch_counts(drawn: Drawn) -> None:
    """Image by image, because rows of a batch are padded to the longest."""
    module, pruning, testing, macs = drawn.arguments
    some = torch.utils.data.Subset(testing.dataset, range(30))
    tokens = recipe.tokens_left(module, pruning, torch.utils.data.DataLoader(some, 16), macs)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for pixels, _ in some:
            module(pixels[None])
    counted = counter.get_total_flops() / 2 / 30
    # a layer that decides has its scores to sum over the queries, which is not counted as a part of the model
    assert tokens.macs <= counted <= tokens.macs + 2 * 16 * 16
    macs = drawn.comparison["report"]["macs"]
    assert drawn.comparison["macs_ratio"] == pytest.approx(macs[0] / drawn.tokens.macs)
    assert drawn.comparison["tokens"]["macs_ratio"] == pytest.approx(macs[1] / drawn.tokens.macs)
    assert drawn.comparison["tokens"]["relative_macs"] == pytest.approx(0.5, abs=0.03)


def test_with_all_tokens_the_model_is_the_same_without_its_runtime(drawn: Drawn) -> None:
    images, module = torch.rand(8, 1, 8, 8), drawn.modules["compressed"].eval()
    with torch.no_grad():
        pruned, whole = module(images), drawn.modules["all tokens"].eval()(images)
        with tokens_off():
            torch.testing.assert_close(whole, module(images), rtol=0, atol=0)
    assert not torch.equal(pruned, whole)


def test_the_picture_shades_each_patch_by_its_layers(drawn: Drawn) -> None:
    _, test = recipe.read("digits", "", "", seed=0)
    (legend,) = drawn.figure.legends
    named = {
        text.get_text(): patch.get_facecolor() for text, patch in zip(legend.texts, legend.legend_handles, strict=True)
    }
    assert list(named) == ["left at layer 1", "left at layer 2", "stayed"]
    colours = {name: tuple(colour) for name, colour in named.items()}
    assert len(set(colours.values())) == 3 and colours["stayed"][3] == 0
    assert len(drawn.figure.axes) == 20  # two images of each digit
    for place, axis in enumerate(drawn.figure.axes):
        number = [n for n, label in enumerate(test[1]) if label == place % 10][place // 10]
        plain, below, shades = (image.get_array() for image in axis.images)
        expected = recipe.Images(test, 8, "L")[number][0][0]
        for shown in (plain, below):
            torch.testing.assert_close(torch.tensor(shown).view(8, 8) * 2 - 1, expected)
        for patch, through in enumerate(drawn.tokens.layers[number].tolist()):
            left = colours["stayed" if through == 3 else f"left at layer {through}"]
            colour = tuple(shades[patch // 4, patch % 4])
            assert colour == pytest.approx(left) or colour[3] == left[3] == 0


def test_the_picture_is_a_png(drawn: Drawn) -> None:
    with image_module.open(drawn.file) as picture:
        assert picture.format == "PNG" and 900 <= picture.width <= 1100 and 400 <= picture.height <= 600
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 30
    assert 5_000 < drawn.file.stat().st_size < 150_000


def test_patches_come_after_other_tokens() -> None:
    layers = torch.tensor([[9, 9, 1, 2, 3, 4], [9, 9, 5, 6, 7, 8]])
    assert recipe.patches(layers).tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert recipe.patches(layers[:, 2:]).tolist() == recipe.patches(layers).tolist()


def test_without_matplotlib_it_says_so_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(recipe, "read", lambda *_: pytest.fail("it went on"))
    with pytest.raises(
        ImportError,
        match=r"Expected 'matplotlib' .* for the picture of --tokens.*pip install 'lightning-compress\[recipes\]'",
    ):
        run("--tokens")


def test_tokens_are_off_unless_asked_for(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("tokens: 0.5\n")
    parse = recipe.parser().parse_args
    assert [parse(a).tokens for a in ([], ["--tokens=0.7"], [f"--config={config}"])] == [None, 0.7, 0.5]
    assert 0 < parse(["--tokens"]).tokens < 1
    with pytest.raises(ValueError, match="Expected macs"):
        run("--tokens=1.5")


# From the command line


@pytest.mark.parametrize("arguments, status", [(["--check"], 1), ([], 0)])
def test_check_fails_where_a_bound_is_missed(
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {photographs}\ncolor: true\nepochs: 1\nmacs: 0.9\n")
    script = str(ROOT / "recipes" / "image_classification.py")
    monkeypatch.setattr(sys, "argv", [script, *TINY, f"--config={config}", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    assert stop.value.code == status
    assert "MISSED  at least 2.5 times fewer MACs" in capsys.readouterr().out


def test_the_picture_in_the_documentation_is_small() -> None:
    file = ROOT / "docs" / "pictures" / "digits_tokens.png"
    with image_module.open(file) as picture:
        assert picture.format == "PNG" and min(picture.size) > 200
    assert file.stat().st_size < 150_000
