"""A made-up language for the translation recipe: the verb comes last, the adjective behind its noun."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

WORDS = {
    "the": "da",
    "a": "un",
    "cat": "mirl",
    "dog": "bofka",
    "bird": "tvip",
    "sees": "lumet",
    "likes": "harbet",
    "red": "rösh",
    "old": "vank",
    "big": "gro",
}


def sentence(draw: random.Random) -> tuple[str, str]:
    """An English sentence of five to seven words and its translation."""

    def phrase() -> tuple[list[str], list[str]]:
        article, noun = draw.choice(["the", "a"]), draw.choice(["cat", "dog", "bird"])
        adjective = [draw.choice(["red", "old", "big"])] if draw.random() < 0.5 else []
        return [article, *adjective, noun], [article, noun, *adjective]

    subject, other = phrase(), phrase()
    verb = draw.choice(["sees", "likes"])
    english = [*subject[0], verb, *other[0]]
    return f"{' '.join(english)}.", f"{' '.join(WORDS[word] for word in [*subject[1], *other[1], verb])}."


def write(folder: Path, counts: dict[str, int]) -> Path:
    """Parallel files `NAME.en` and `NAME.de` of so many sentences; those of `train` compressed."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in counts.items():
        for language, lines in zip(
            ("en", "de"), zip(*(sentence(draw) for _ in range(count)), strict=True), strict=True
        ):
            text = "".join(f"{line}\n" for line in lines).encode()
            if name == "train":
                (folder / f"{name}.{language}.gz").write_bytes(gzip.compress(text))
            else:
                (folder / f"{name}.{language}").write_bytes(text)
    return folder
