"""How probable a difference in BLEU is if both models translate equally well."""

from __future__ import annotations

from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

TRIALS, RESAMPLES = 10_000, 1000  # in which translations of two models change places; of the sentences of a test set


def significance(translations: list[str], reference: list[str], texts: list[str]) -> dict[str, float]:
    """How probable so large a difference in BLEU is if it does not matter from which model a translation comes.

    Returns:
        `p`, two-sided, by approximate randomization (Riezler and Maxwell 2005), and `interval`, half of the 95 %
        interval of the BLEU of `translations` by the choice of sentences (bootstrap).
    """
    systems = [("reference", reference), ("run", translations)]
    test = PairedTest(systems, {"BLEU": BLEU()}, [texts], "ar", n_samples=TRIALS, n_ar_confidence=RESAMPLES)
    result = test()[1]["BLEU"][1]
    # which counts differences that are larger, and none is where all translations are the same
    return {"p": 1.0 if translations == reference else float(result.p_value), "interval": float(result.ci)}
