"""Fourier transforms and matrix decompositions mix the positions of some dimensions and leave the others alone."""

from __future__ import annotations

from lightning_compress.discovery import axes
from lightning_compress.discovery.rules.registry import Call, Dims, rule


@rule("_fft_c2c", "_fft_r2c", "_fft_c2r")
def fourier(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Every frequency depends on every position of the transformed dimensions."""
    reason = "it is transformed to frequencies or back"
    dims = trace.dims(call.inputs[0])
    made = trace.pinned(call.outputs[0], reason)
    over = call.dims()
    for i in over:
        axes.pin(dims[i], reason)
    return [[made[i] if i in over else axis for i, axis in enumerate(dims)]]


MATRICES = (
    "linalg_pinv linalg_inv_ex linalg_matrix_exp linalg_cholesky_ex _linalg_solve_ex _linalg_svd _linalg_eigh "
    "linalg_qr linalg_solve_triangular linalg_lu_factor_ex _linalg_det _linalg_slogdet cholesky_inverse cholesky_solve "
    "triangular_solve _linalg_eigvals linalg_eig linalg_lu linalg_householder_product"
).split()


@rule("_linalg_check_errors")
def check(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Raises for a singular matrix, and depends on nothing else."""
    return []


@rule(*MATRICES)
def matrices(trace, call: Call) -> list[Dims]:  # type: ignore[no-untyped-def]
    """Decompositions, inverses and solutions of batches of matrices: rows and columns stay, batches pass through."""
    reason = f"it is a dimension of a matrix in {call.name.strip('_')}"
    rank = call.inputs[0].dim()
    batch: Dims = [None] * (rank - 2)
    for tensor in call.inputs:
        dims = trace.dims(tensor)
        same = tensor.dim() == rank and tensor.shape[:-2] == call.inputs[0].shape[:-2]
        for i, axis in enumerate(dims):
            if same and i < rank - 2:
                axes.unify(batch[i], axis)
                batch[i] = axis if batch[i] is None else batch[i]
            else:
                axes.pin(axis, reason)
    results: list[Dims] = []
    for output in call.outputs:
        made = trace.pinned(output, reason)
        if output.shape[: len(batch)] == call.inputs[0].shape[: len(batch)]:
            made[: len(batch)] = batch
        else:
            for axis in batch:
                axes.pin(axis, reason)
        results.append(made)
    return results
