"""The public names: all there, and usable without Lightning."""

import subprocess
import sys

import pytest

import lightning_compress


@pytest.mark.parametrize("name", lightning_compress.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    thing = getattr(lightning_compress, name)
    assert name in dir(lightning_compress)
    if callable(thing):
        assert (thing.__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Pruner'"):
        _ = lightning_compress.Pruner


def test_lightning_is_imported_with_the_first_callback_only() -> None:
    code = (
        "import sys, lightning_compress as lc\n"
        "names = [n for n in lc.__all__ if n not in lc._CALLBACKS]\n"
        "[getattr(lc, n) for n in names]\n"
        "assert 'lightning' not in sys.modules and 'pytorch_lightning' not in sys.modules\n"
        "lc.Distillation\n"
        "assert 'lightning' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=lightning_compress.__path__[0] + "/..")
