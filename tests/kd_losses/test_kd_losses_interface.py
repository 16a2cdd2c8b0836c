"""Errors that name what, expected, got, remedy; the modules; the quantity loss by hand; README."""

import re
from inspect import signature
from pathlib import Path

import pytest
import torch

import kd_losses
from kd_losses import (
    CIFQuantityLoss,
    LinearCrossEntropyLoss,
    LinearKLDivLoss,
    cif_quantity_loss,
    kl_div_with_logits,
    linear_cross_entropy,
    linear_kl_div,
    response_mask,
)

README = Path(__file__).parents[2] / "src" / "kd_losses" / "README.md"
TYPES = ("Backend", "Divergence", "Reduction")
X, W = torch.randn(2, 3, 4), torch.randn(7, 4)
ON = torch.ones(2, 3, dtype=torch.bool)
Y = torch.zeros(2, 3, dtype=torch.int64)
SOME = torch.tensor([[True, False, True], [True, True, True]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: linear_kl_div(X, W, X, reduction="avg"), ValueError, "reduction: .*'avg'"),
        (lambda: linear_kl_div(X, W, X, temperature=0), ValueError, "temperature: .*got 0"),
        (
            lambda: linear_kl_div(X, W, X, temperature=float("nan")),
            ValueError,
            "temperature: .*got nan",
        ),
        (
            lambda: linear_kl_div(X, W, X, reduction="sum", num_items=3),
            ValueError,
            "num_items: .*'sum'",
        ),
        (
            lambda: linear_kl_div(X, W, X, num_items=torch.ones(2)),
            ValueError,
            r"num_items: .*\(2,\)",
        ),
        (lambda: linear_kl_div(X, W, X, mask=ON.long()), TypeError, "mask: .*int64"),
        (lambda: linear_kl_div(X, W, X, mask=ON[:1]), ValueError, r"mask: .*\(1, 3\)"),
        (
            lambda: linear_kl_div(X, W, X, mask=SOME, teacher_mask=SOME.flip(0)),
            ValueError,
            r"teacher_mask: .*\[2, 3\], got \[3, 2\]",
        ),
        (
            lambda: linear_kl_div(X, W, X[:, :2], mask=ON),
            ValueError,
            r"teacher_input: .*\(2, 2\); pass mask and teacher_mask",
        ),
        (lambda: linear_kl_div(X, W, X[0]), ValueError, "teacher_input: .*as many dimensions"),
        (lambda: linear_kl_div(X[0, 0], W, X[0, 0]), ValueError, r"input: .*\(4,\)"),
        (lambda: linear_kl_div(Y, W, X), TypeError, "input: .*int64"),
        (lambda: linear_kl_div(X, W[:, :3], X), ValueError, r"linear_weight: .*\(V, 4\)"),
        (
            lambda: linear_kl_div(X, W, X[..., :3]),
            ValueError,
            r"teacher_linear_weight: .*\(V, 3\) to fit teacher_input",
        ),
        (
            lambda: linear_kl_div(X, W, X, linear_bias=torch.zeros(4)),
            ValueError,
            r"linear_bias: .*\(7,\)",
        ),
        (
            lambda: linear_kl_div(X, W.bfloat16(), X),
            TypeError,
            "input and linear_weight: .*float32 and torch.bfloat16",
        ),
        (
            lambda: linear_kl_div(X, W, X, torch.randn(9, 4)),
            ValueError,
            "teacher_linear_weight: .*7 entries, got 9; pass vocab_size",
        ),
        (lambda: linear_kl_div(X, W, X, vocab_size=8), ValueError, "vocab_size: .*1 to 7"),
        (lambda: linear_kl_div(X, W, X, softcap=0), ValueError, "^softcap: .*got 0"),
        (lambda: linear_kl_div(X, W, X, teacher_softcap=-1), ValueError, "^teacher_softcap: .*-1"),
        (lambda: linear_kl_div(X, W, X, chunk_size=0), ValueError, "chunk_size: .*got 0"),
        (
            lambda: kl_div_with_logits(X, X[..., :3]),
            ValueError,
            "teacher_logits: .*4 entries, got 3",
        ),
        (lambda: kl_div_with_logits(X, X, vocab_size=0), ValueError, "vocab_size: .*got 0"),
        (lambda: linear_cross_entropy(X, W, Y.int()), TypeError, "target: .*int32"),
        (lambda: linear_cross_entropy(X, W, Y[:1]), ValueError, r"target: .*\(1, 3\)"),
        (lambda: linear_cross_entropy(X, W, Y + 7), ValueError, "target: .*0 to 6 .*got 7 to 7"),
        (lambda: linear_cross_entropy(X, W, Y - 1), ValueError, "target: .*got -1 to -1"),
        (lambda: response_mask(ON), TypeError, "labels: .*bool"),
        (lambda: response_mask(X), TypeError, "labels: .*float32"),
        (lambda: response_mask(torch.tensor(3)), ValueError, "labels: .*scalar"),
        (lambda: cif_quantity_loss(X[0, 0], Y[0]), ValueError, r"alpha_sum .*\(4,\) and \(3,\)"),
        (lambda: cif_quantity_loss(Y[0], Y[0]), TypeError, "alpha_sum: .*int64"),
        (lambda: cif_quantity_loss(X[0, 0], X[0, 0], mode="mse"), ValueError, "mode: .*'mse'"),
    ],
)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_quantity_loss_by_hand():
    alpha_sum, length = torch.tensor([3.0, 8.0, 0.5]), torch.tensor([4, 5, 0])
    relative = cif_quantity_loss(alpha_sum, length, reduction="none")
    assert relative.tolist() == pytest.approx([0.25, 0.6, 0.5])
    assert cif_quantity_loss(alpha_sum, length).item() == pytest.approx(1.35 / 3)
    assert cif_quantity_loss(alpha_sum, length, mode="absolute").item() == pytest.approx(4.5 / 3)
    # 300.5 isn't a bfloat16: the difference must be taken in float32
    half = torch.tensor([300.0], dtype=torch.bfloat16, requires_grad=True)
    loss = cif_quantity_loss(half, torch.tensor([300.5]), mode="absolute")
    assert loss.dtype == torch.float32
    assert loss.item() == 0.5
    loss.backward()
    assert half.grad.item() == -1


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (LinearKLDivLoss, linear_kl_div),
        (LinearCrossEntropyLoss, linear_cross_entropy),
        (CIFQuantityLoss, cif_quantity_loss),
    ],
)
def test_modules_take_every_argument_of_their_functions(module, function):
    def defaults(*callables):
        parameters = [p for call in callables for p in signature(call).parameters.values()]
        return {p.name: p.default for p in parameters}

    assert defaults(module, module().forward) == defaults(function)


def test_modules_equal_their_functions():
    options = {
        "softcap": 3.0,
        "teacher_softcap": 0.5,
        "temperature": 2.0,
        "scale_by_temperature_squared": True,
        "reduction": "sum",
        "vocab_size": 5,
        "chunk_size": 2,
    }
    biases = {"linear_bias": torch.randn(7), "teacher_linear_bias": torch.randn(7)}
    masks = {"mask": SOME, "teacher_mask": SOME}
    teacher, teacher_weight = torch.randn(2, 3, 4), torch.randn(7, 4)
    args = (X, W, teacher, teacher_weight)
    expected = linear_kl_div(*args, **biases, **masks, **options)
    assert torch.equal(LinearKLDivLoss(**options)(*args, **biases, **masks), expected)
    assert torch.equal(
        LinearKLDivLoss()(*args, num_items=9, **masks), linear_kl_div(*args, num_items=9, **masks)
    )

    options = {
        "softcap": 0.7,
        "ignore_index": 0,
        "temperature": 3.0,
        "reduction": "none",
        "chunk_size": 1,
    }
    target, bias = torch.tensor([[0, 1, 2], [3, 0, 5]]), torch.randn(7)
    expected = linear_cross_entropy(X, W, target, linear_bias=bias, vocab_size=6, **options)
    module = LinearCrossEntropyLoss(vocab_size=6, **options)
    assert torch.equal(module(X, W, target, linear_bias=bias), expected)
    assert torch.equal(
        LinearCrossEntropyLoss()(X, W, target, num_items=4),
        linear_cross_entropy(X, W, target, num_items=4),
    )

    alpha_sum, length = torch.rand(3), torch.tensor([1, 2, 3])
    assert torch.equal(
        CIFQuantityLoss(mode="absolute", reduction="none")(alpha_sum, length),
        cif_quantity_loss(alpha_sum, length, mode="absolute", reduction="none"),
    )
    assert torch.equal(
        CIFQuantityLoss()(alpha_sum, length, num_items=9),
        cif_quantity_loss(alpha_sum, length, num_items=9),
    )


def test_modules_show_their_options_and_hold_no_parameters():
    for module in (LinearKLDivLoss(temperature=2.0), LinearCrossEntropyLoss(), CIFQuantityLoss()):
        assert not module.state_dict()
        assert "reduction='mean'" in repr(module)
    assert "temperature=2.0" in repr(LinearKLDivLoss(temperature=2.0))


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        linear_kl_div(X, W, X, W, None)
    with pytest.raises(TypeError):
        response_mask(Y, False)


def test_the_docstring_example_runs():
    import doctest

    from kd_losses import selection

    result = doctest.testmod(selection)
    assert result.attempted == 2
    assert result.failed == 0


def test_the_readme_runs_and_names_everything():
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})
    for name in kd_losses.__all__:
        assert name in TYPES or f"`{name}" in text
