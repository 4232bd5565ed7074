"""What the runs of the translation benchmark do to the model:

ssl, shs     group lasso and structured Hoyer square on lines of matrices, chosen by a strategy of TPrune; at 0.4
             of the fit whole units (Q/K dims, V/O dims, FFN units) leave until so many percent of the weights of
             the prunable matrices are gone; the rest is fine-tuning
  -fine        encoder: Q, K, V, FFN1 by output units, O, FFN2 by input units; decoder: Q, K; only these lose units
  -coarse      the same in the decoder as in the encoder
  -naive       output and input units of all matrices
  -taylor      units ranked by first-order importance instead of norms
  -kd          with half of the loss from the dense model's answers
  -small, -large   the literal penalty in the loss at the strengths of TPrune, in place of proximal steps whose
             strength the target sets
heads        the baseline: whole heads by group lasso, ranked by first-order importance, the same schedule
units        whole heads and feed-forward units likewise: what this library does unless it is told otherwise
heads-units  the same, but each feed-forward part keeps 15/16 (of 20 percent) or 9/16 (of 45) of its units, so that
             most or half of what goes are heads, which take more time than other units with as many MACs
binary, stochasticB, lsq2
             weights trained as integers; -report and -code are the literal forms of the second study, from the
             first step on; of the others a growing part of the elements is quantized, all from 0.4 of the fit on;
             -nearest rounds at random for 0.7 of the fit, then as in evaluation, -early for 0.4; -groups is -early
             with a scale for 64 elements in place of a row
  -taught    any of these with half of the loss from the answers of `longer`
bssl         block-wise group lasso, nothing removed; norms of the lines of all blocks go to results/.../maps
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lightning_compress import Binary, Stochastic

SPARSITIES = (45, 20, 30, 10, 60)  # percent of the weights of the prunable matrices, in the order in which they are run
STRENGTHS = {"ssl": {"small": 1e-5, "large": 5e-5}, "shs": {"small": 1e-4, "large": 1e-3}}  # TPrune's, in the loss
REGULARIZERS = {"ssl": "group_lasso", "shs": "hoyer_square"}
PULLS = {"square": (1.0, 0.3), "slab": (1.0,)}  # strengths of the proximal form
FFN_FLOORS = {20: 15 / 16, 45: 9 / 16}  # of the feed-forward units, where heads have to go: by percent of the weights
GRADUAL: dict[str, Any] = {"start": 0.05, "full_at": 0.4}
NEAREST_AT = {"nearest": 0.7, "early": 0.4}
TAUGHT: dict[str, Any] = {"distillation": 0.5, "teacher": "longer"}
QUERIES_KEYS_VALUES = ("*self_attn", "*multihead_attn")  # their packed weights: without the output projection


@dataclass(frozen=True)
class Variant:
    """What a run does to the model."""

    study: str
    sparsity: int = 0  # percent
    strategy: str = ""  # of TPrune, "heads", "units" or "heads-units"
    regularizer: str = ""
    strength: float | None = None  # None: what the target needs
    importance: str = "norm"
    distillation: float = 0.0  # weight of a teacher's answers in the loss
    teacher: str = ""  # the finished run that teaches; none: the model as it was before it lost anything
    quantization: dict[str, Any] = field(default_factory=dict)  # arguments of the callback
    scale_free: bool = False  # logits divided by 25 d, which weights of +1 and -1 need
    block: str = ""  # of BSSL
    mode: str = "proximal"


def tprune_variants() -> Iterator[tuple[str, Variant]]:
    """All that is compared at one sparsity before the next one."""

    def variant(method: str, strategy: str, percent: int, **more: Any) -> Variant:
        return Variant("tprune", percent, strategy, REGULARIZERS[method], **more)

    for percent in SPARSITIES:
        for method, strategy in (("ssl", "coarse"), ("shs", "coarse"), ("ssl", "fine")):
            if strategy == "coarse" or percent < 57:  # all units of `fine` but one of each structure are 57 %
                yield f"{method}-{strategy}-{percent}-taylor", variant(method, strategy, percent, importance="taylor")
        if percent < 32:  # all heads but one of each attention
            yield f"heads-{percent}", variant("ssl", "heads", percent, importance="taylor")
        if percent == 20:
            yield f"heads-{percent}-taught", variant("ssl", "heads", percent, importance="taylor", **TAUGHT)
        if percent in (20, 45):
            yield f"units-{percent}", variant("ssl", "units", percent, importance="taylor")
            yield f"heads-units-{percent}", variant("ssl", "heads-units", percent, importance="taylor")
            for method, strategy in (("ssl", "fine"), ("ssl", "coarse"), ("ssl", "naive"), ("shs", "fine")):
                yield f"{method}-{strategy}-{percent}", variant(method, strategy, percent)
    for method, strengths in STRENGTHS.items():
        for name, strength in strengths.items():
            yield f"{method}-fine-45-{name}", variant(method, "fine", 45, strength=strength, mode="loss")
    yield "ssl-coarse-45-taylor-kd", variant("ssl", "coarse", 45, importance="taylor", distillation=0.5)


def quantization_variants() -> Iterator[tuple[str, Variant]]:
    def variant(weights: Any, modules: Any, scale_free: bool = False, more: Any = None, **when: Any) -> Variant:
        settings = {"weights": weights, "modules": modules, **when}
        return Variant("quantization", quantization=settings, scale_free=scale_free, **(more or {}))

    literal = Binary.of_the_report()
    yield "binary-all", variant("binary", None, **GRADUAL)
    yield "binary-all-report", variant(literal, None, scale_free=True)
    yield "binary-attention", variant("binary", "attention", **GRADUAL)
    yield "binary-attention-report", variant(literal, "attention", scale_free=True)
    yield "lsq2-attention", variant("lsq2", "attention", **GRADUAL)
    for bits in (8, 4, 3, 2, 1):
        when = {} if bits == 8 else GRADUAL
        yield f"stochastic{bits}-attention", variant(Stochastic(bits, norm="mse"), "attention", **when)
        if bits == 3:  # seven levels, which that study calls two bits, as it does not count the sign
            continue
        if bits <= 2:
            levels = Stochastic(bits, norm="mse")
            for name, moment in NEAREST_AT.items():
                yield f"stochastic{bits}-attention-{name}", variant(levels, "attention", nearest_at=moment, **when)
            if bits == 2:
                grouped = Stochastic(bits, norm="mse", scope="group:64")
                early = NEAREST_AT["early"]
                yield f"stochastic{bits}-attention-groups", variant(grouped, "attention", nearest_at=early, **when)
            taught = variant(levels, "attention", more=TAUGHT, nearest_at=NEAREST_AT["nearest"], **when)
            yield f"stochastic{bits}-attention-nearest-taught", taught
        yield f"stochastic{bits}-attention-report", variant(Stochastic.of_the_report(bits), "attention")
        yield f"stochastic{bits}-attention-code", variant(Stochastic.of_the_code(bits), QUERIES_KEYS_VALUES)
    tables = ("attention", "embedding")
    yield "stochastic8-tables", variant(Stochastic(8, norm="mse"), tables)
    yield "stochastic8-tables-report", variant(Stochastic.of_the_report(8), tables)
    yield "stochastic8-tables-code", variant(Stochastic.of_the_code(8), (*QUERIES_KEYS_VALUES, "embedding"))


def bssl_variants() -> Iterator[tuple[str, Variant]]:
    for block, pulls in PULLS.items():
        for pull in pulls:
            yield f"bssl-{block}-{pull:g}", Variant("bssl", block=block, strength=pull)
    for name, strength in STRENGTHS["ssl"].items():
        yield f"bssl-square-loss-{name}", Variant("bssl", block="square", strength=strength, mode="loss")


VARIANTS: dict[str, Variant] = {
    "dense": Variant("dense"),
    "longer": Variant("dense"),
    **dict(tprune_variants()),
    **dict(quantization_variants()),
    **dict(bssl_variants()),
}
