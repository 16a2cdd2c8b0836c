"""Which positions count: the response shift, and the selection of rows by mask.

Letters: B batch, L positions, n selected rows, F features (width or vocabulary).
"""

import torch
from torch import Tensor


def response_mask(labels: Tensor, *, shift: bool = True, ignore_index: int = -100) -> Tensor:
    """Mark the positions whose *prediction* is a target.

    A causal model predicts the token at t+1 from position t. The first response token is
    therefore judged at the last position of the prompt, and the last position of a sequence
    predicts nothing. This function is the one place where that shift is made.

    With ``mask = response_mask(labels)``, the tokens to be predicted at the selected positions
    are ``labels.roll(-1, dims=-1)[mask]``.

    Args:
        labels: (B, L) or (L,) integer token ids; ``ignore_index`` where there is no target.
        shift: True: labels stand where their tokens stand (labels[t] is the token at t), as in
            transformers. False: labels are shifted already (labels[t] is the token at t+1).
        ignore_index: the label that marks a position without a target.

    Returns:
        Boolean mask of labels' shape. With ``shift`` it is True at t when labels[t+1] is a
        target, so its last column is always False.

    Raises:
        TypeError: labels aren't an integer tensor.
        ValueError: labels have no dimension.

    Example:
        >>> labels = torch.tensor([[-100, -100, 7, 9]])  # two prompt tokens, two response tokens
        >>> response_mask(labels)
        tensor([[False,  True,  True, False]])
    """
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"labels: expected an integer tensor of token ids, got {labels.dtype}; "
            f"pass labels with ignore_index ({ignore_index}) where there is no target"
        )
    if labels.ndim == 0:
        raise ValueError("labels: expected shape (B, L) or (L,), got a scalar; add a dimension")
    is_target = labels != ignore_index
    if not shift:
        return is_target
    mask = torch.zeros_like(is_target)
    mask[..., :-1] = is_target[..., 1:]
    return mask


def check_rows(name: str, rows: Tensor) -> None:
    """Raise unless ``rows`` is a floating tensor of shape (n, F) or (B, L, F)."""
    if rows.ndim not in (2, 3):
        raise ValueError(
            f"{name}: expected shape (n, F) or (B, L, F), got {tuple(rows.shape)}; "
            "flatten other leading dimensions first"
        )
    if not rows.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {rows.dtype}")


def _check_mask(name: str, mask: Tensor, of: str, rows: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{name}: expected a boolean tensor, got {mask.dtype}; pass {name}.bool() if nonzero "
            "means selected"
        )
    if mask.shape != rows.shape[:-1]:
        raise ValueError(
            f"{name}: expected the leading shape of {of} {tuple(rows.shape[:-1])}, "
            f"got {tuple(mask.shape)}; one boolean per position"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
def selected(rows: Tensor, mask: Tensor) -> Tensor:
    """The rows where the mask is True; their number depends on data, which breaks a graph."""
    return rows[mask]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
def _check_counts(mask: Tensor, teacher_mask: Tensor) -> None:
    counts, teacher_counts = mask.sum(-1), teacher_mask.sum(-1)
    if counts.shape != teacher_counts.shape or not torch.equal(counts, teacher_counts):
        raise ValueError(
            "teacher_mask: expected as many selected positions per sequence as mask "
            f"{counts.tolist()}, got {teacher_counts.tolist()}; positions are compared one to one"
        )


def _select(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows.flatten(0, -2) if mask is None else selected(rows, mask)


def select_pair(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    teacher_mask: Tensor | None,
    *,
    names: tuple[str, str],
) -> tuple[Tensor, Tensor]:
    """Select the rows that student and teacher are compared on, one to one.

    Args:
        student: (B, L, F) or (n, F).
        teacher: (B, L', F') or (n', F'). L' may differ from L only with masks. (n, F') beside a
            masked student (B, L, F): the selected rows already.
        mask: student positions, boolean, the leading shape of ``student``; None: all.
        teacher_mask: teacher positions, boolean, the leading shape of ``teacher``; None: those of
            ``mask``.
        names: what the caller calls ``student`` and ``teacher``, for the messages.

    Returns:
        Student rows (n, F) and teacher rows (n, F'); the i-th rows belong together.

    Raises:
        TypeError: a mask isn't boolean, or a tensor isn't floating point.
        ValueError: shapes don't fit, or a sequence's selected positions differ in number.
    """
    student_name, teacher_name = names
    check_rows(student_name, student)
    check_rows(teacher_name, teacher)
    if student.ndim == 3 and teacher.ndim == 2 and mask is not None and teacher_mask is None:
        _check_mask("mask", mask, student_name, student)
        rows = selected(student, mask)
        if len(rows) != len(teacher):
            raise ValueError(
                f"{teacher_name}: expected the {len(rows)} rows that mask selects, got "
                f"{len(teacher)}; give the same positions that the cache was made of"
            )
        return rows, teacher
    if student.ndim != teacher.ndim:
        raise ValueError(
            f"{teacher_name}: expected as many dimensions as {student_name} ({student.ndim}), "
            f"got {teacher.ndim}; give both as (n, F) or both as (B, L, F), or the rows that mask "
            "selects as (n, F)"
        )
    if mask is not None:
        _check_mask("mask", mask, student_name, student)
    if teacher_mask is None:
        if student.shape[:-1] != teacher.shape[:-1]:
            raise ValueError(
                f"{teacher_name}: expected the leading shape of {student_name} "
                f"{tuple(student.shape[:-1])}, got {tuple(teacher.shape[:-1])}; pass mask and "
                "teacher_mask to say which positions belong together"
            )
        return _select(student, mask), _select(teacher, mask)
    _check_mask("teacher_mask", teacher_mask, teacher_name, teacher)
    if mask is None:
        mask = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    _check_counts(mask, teacher_mask)
    return _select(student, mask), _select(teacher, teacher_mask)
