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


def in_front(mask: Tensor) -> tuple[Tensor, Tensor]:
    """What a compiled graph, whose shapes are fixed, has in place of a selection.

    Returns:
        An order of the N flat positions, int64 (N,), in which the selected ones come first and
        otherwise nothing changes; and (N,) boolean, which of them in this order are selected.
    """
    valid, order = torch.sort(mask.flatten(), descending=True, stable=True)
    return order, valid


def _check_counts(mask: Tensor, teacher_mask: Tensor) -> Tensor:
    counts, teacher_counts = mask.sum(-1), teacher_mask.sum(-1)
    if counts.shape != teacher_counts.shape or not torch.equal(counts, teacher_counts):
        raise ValueError(
            "teacher_mask: expected as many selected positions per sequence as mask "
            f"{counts.tolist()}, got {teacher_counts.tolist()}; positions are compared one to one"
        )
    return mask.clone()


# an operator, or a graph would end where it looks at data; it returns what the graph goes on with
_checked_counts = torch.library.custom_op(
    "kd_losses::checked_counts", _check_counts, mutates_args=()
)


@_checked_counts.register_fake
def _(mask: Tensor, teacher_mask: Tensor) -> Tensor:
    return torch.empty_like(mask)


# torch gives the decorator no types
_check_counts_outside = torch.compiler.disable(_check_counts)


def pick(rows: Tensor, mask: Tensor | None, in_graph: bool) -> Tensor:
    """The selected of ``rows`` (..., F); with ``in_graph`` in front of all others."""
    if mask is None:
        return rows.flatten(0, -2)
    return rows.flatten(0, -2)[in_front(mask)[0]] if in_graph else selected(rows, mask)


def select_pair(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    teacher_mask: Tensor | None,
    *,
    names: tuple[str, str],
    in_graph: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Select the rows that student and teacher are compared on, one to one.

    Args:
        student: (B, L, F) or (n, F).
        teacher: (B, L', F') or (n', F'). L' may differ from L only with masks. (n, F') beside a
            masked student (B, L, F): the selected rows already.
        mask: student positions, boolean, the leading shape of ``student``; None: all.
        teacher_mask: teacher positions, boolean, the leading shape of ``teacher``; None: those of
            ``mask``.
        names: what the caller calls ``student`` and ``teacher``, for the messages.
        in_graph: True: the selected rows come first, with others behind them up to a number that
            doesn't depend on data, unless the teacher's are selected already.

    Returns:
        Student rows (n, F) and teacher rows (n, F'); the i-th rows belong together. And, boolean
        (n,), which of them are selected; None: all.

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
        return rows, teacher, None
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
        teacher_mask = mask
    else:
        _check_mask("teacher_mask", teacher_mask, teacher_name, teacher)
        if mask is None:
            mask = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
        if in_graph:
            mask = _checked_counts(mask, teacher_mask)
        else:
            _check_counts_outside(mask, teacher_mask)
    rows, teacher_rows = pick(student, mask, in_graph), pick(teacher, teacher_mask, in_graph)
    if mask is None or not in_graph:
        return rows, teacher_rows, None
    # no more can be selected than the shorter one has
    most = min(len(rows), len(teacher_rows))
    return rows[:most], teacher_rows[:most], in_front(mask)[1][:most]
