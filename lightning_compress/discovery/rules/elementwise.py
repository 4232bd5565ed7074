"""Operations that act on every element by itself, and factories of new tensors."""

from __future__ import annotations

from lightning_compress.discovery import axes
from lightning_compress.discovery.axes import Axis
from lightning_compress.discovery.rules.registry import Call, Dims, rule

# Operations whose tag does not say that they are pointwise.
ELEMENTWISE = (
    "elementwise clone _to_copy to alias detach contiguous masked_fill where copy fill zero lift_fresh lift_fresh_copy "
    "zeros_like ones_like full_like empty_like rand_like randn_like native_dropout dropout bernoulli uniform normal "
    "gelu silu _conj view_as_real nan_to_num _unsafe_masked_fill complex polar _prelu_kernel rrelu_with_noise "
    "floor_divide "
    "hardswish leaky_relu_backward threshold_backward sigmoid_backward tanh_backward gelu_backward silu_backward "
    "elu_backward softplus_backward hardtanh_backward hardswish_backward hardsigmoid_backward mish_backward "
    "log_sigmoid_forward log_sigmoid_backward"
).split()


@rule(*ELEMENTWISE, "view_as_complex")
def elementwise(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Inputs are broadcast together: axes at the same place are the same axis."""
    if call.name == "view_as_real":  # a new last dimension of real and imaginary part
        return [[*trace.dims(call.inputs[0]), Axis(2, ["it holds real and imaginary parts"])]]
    if call.name == "view_as_complex":
        *dims, parts = trace.dims(call.inputs[0])
        axes.pin(parts, "it holds real and imaginary parts")
        return [dims]
    if not call.inputs:
        return [trace.pinned(output, "it is made of constants") for output in call.outputs]
    if call.name in ("add", "add_", "sub", "sub_"):
        trace.note_bias(call.inputs)
    return [trace.broadcast(call.inputs, output.shape) for output in call.outputs]


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "scalar_tensor",
    "empty_strided",
    "new_empty_strided",
)
def uniform_factory(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """All positions of a constant tensor are alike, so its axes are free.

    Initial states of recurrent networks, masks of ones.
    """
    return [trace.fresh(output) for output in call.outputs]
