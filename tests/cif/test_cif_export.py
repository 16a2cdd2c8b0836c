"""torch.compile, torch.export, ONNX and autocast, at other sizes than those traced."""

import pytest
import torch

from cif import CIF, cif
from cif.prefix import ONE, fixed_point_prefix, row_totals, scale_prefix

SIZES = [(3, 30), (2, 9), (5, 200)]  # the first one is traced
# torch's own code calls what is deprecated, and the exporter warns of axes with one name.
QUIET = pytest.mark.filterwarnings("ignore")


def inputs(batch, frames, width=8):
    torch.manual_seed(batch)
    hidden, alphas = torch.randn(batch, frames, width), torch.rand(batch, frames)
    mask = torch.arange(frames) < torch.randint(frames // 2, frames + 1, (batch, 1))
    return hidden, alphas, mask, torch.randint(0, frames // 3, (batch,))


def function_step(hidden, alphas, mask, targets):
    out = cif(hidden, alphas, attention_mask=mask, target_lengths=targets, max_tokens=20)
    free = cif(hidden, alphas, attention_mask=mask, tail="threshold", max_tokens=20)
    return *out[:5], *free[:5]


class LayerStep(torch.nn.Module):
    """The layer with a fixed length of the output and without the fields that hold nothing."""

    def __init__(self, head, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = CIF(8, alpha_head=head, output_size=5, **options)

    def forward(self, hidden, mask):
        return tuple(self.layer(hidden, mask, max_tokens=20))


def compare(compiled, step, leaves, arguments):
    """Equal results, and equal gradients of those that have any."""
    grads = []
    results = compiled(*arguments), step(*arguments)
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=2e-5)
    for result in results:
        loss = sum(out.square().sum() for out in result if out.requires_grad)
        grads.append(torch.autograd.grad(loss, leaves))
    for mine, plain in zip(*grads, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-3)


def check_compiled(step, backend, sizes=SIZES):
    torch.compiler.reset()  # what other tests have compiled of the same code would be tried first
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for number, size in enumerate(sizes):
        hidden, alphas, mask, targets = inputs(*size)
        if isinstance(step, torch.nn.Module):
            leaves = [hidden.requires_grad_(), *step.parameters()]
            arguments = hidden, mask
        else:
            leaves = [hidden.requires_grad_(), alphas.requires_grad_()]
            arguments = hidden, alphas, mask, targets
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            compare(compiled, step, leaves, arguments)


def test_the_function_compiles_once_for_all_sizes():
    check_compiled(function_step, "eager")


def test_the_layer_compiles_once_for_all_sizes():
    check_compiled(LayerStep("conv"), "eager")


@QUIET
@pytest.mark.slow
def test_the_function_compiles_to_code():
    check_compiled(function_step, "inductor")


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize("head", ["last_channel", "conv", "mlp"])
def test_the_layer_compiles_to_code(head):
    # torch compiles a convolution for one size, and small matrix products apart from large ones
    check_compiled(LayerStep(head), "inductor", SIZES[:1] if head == "conv" else SIZES[::2])


def axes(count):
    batch, frames = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("frames", min=2)
    return tuple({0: batch, 1: frames} for _ in range(count))


@QUIET
@pytest.mark.parametrize("head", ["last_channel", "conv"])
def test_torch_export_for_all_sizes(head):
    step = LayerStep(head, tail="threshold").eval()
    hidden, _, mask, _ = inputs(*SIZES[0])
    program = torch.export.export(step, (hidden, mask), dynamic_shapes=axes(2)).module()
    for size in [*SIZES, (1, 7)]:
        hidden, _, mask, _ = inputs(*size)
        for mine, plain in zip(program(hidden, mask), step(hidden, mask), strict=True):
            assert torch.equal(mine, plain)


class DenseFunction(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, hidden, alphas, mask):
        return cif(
            hidden, alphas, attention_mask=mask, max_tokens=20, backend="dense", **self.options
        )[:5]


class Prefix(torch.nn.Module):
    def forward(self, alphas):
        prefix = fixed_point_prefix(alphas, 0.9)
        counts = row_totals(prefix) // ONE
        return prefix, scale_prefix(prefix, counts)


def onnx_session(model, arguments, folder):
    """Export with the number of rows and frames left open; return a function of tensors."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, names = folder / "cif.onnx", [f"input{i}" for i in range(len(arguments))]
    torch.onnx.export(
        model.eval(),
        arguments,
        dynamo=True,
        dynamic_shapes=axes(len(arguments)),
        input_names=names,
        verbose=False,
    ).save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)

    def run(*tensors):
        feeds = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
        return [torch.from_numpy(out) for out in session.run(None, feeds)]

    return run


@QUIET
def test_onnx_counts_in_the_same_integers(tmp_path):
    """The int64 sum, the float64 rounding and the shifts are those of torch, beyond 2**53 too."""
    run = onnx_session(Prefix(), (torch.rand(3, 30),), tmp_path)
    for frames, scale in ((1, 1.0), (30, 0.01), (4000, 1.0), (4000, 9.0)):
        alphas = torch.rand(2, frames) * scale
        plain = Prefix()(alphas)
        for mine, other in zip(run(alphas), plain, strict=True):
            assert torch.equal(mine, other)
    assert plain[0].max() > 2**54


@QUIET
def test_onnx_fires_bitwise_as_torch_does(tmp_path):
    model = DenseFunction(tail="round", threshold=0.9)
    run = onnx_session(model, inputs(*SIZES[0])[:3], tmp_path)
    for size in [*SIZES, (1, 7), (2, 3000)]:
        arguments = inputs(*size)[:3]
        for scale in (0.05, 1.0, 2.7):
            hidden, alphas, mask = arguments
            mine = run(hidden, alphas * scale, mask)
            plain = model(hidden, alphas * scale, mask)
            torch.testing.assert_close(mine[0], plain[0], rtol=1e-5, atol=1e-5)
            for a, b in zip(mine[1:], plain[1:], strict=True):
                assert torch.equal(a, b)


def check_layer_in_onnx(head, tail, folder):
    step = LayerStep(head, tail=tail, backend="dense")
    run = onnx_session(step, inputs(*SIZES[0])[::2], folder)
    for size in [*SIZES, (1, 7)]:
        arguments = inputs(*size)[::2]
        with torch.no_grad():
            mine, plain = run(*arguments), step(*arguments)
        assert torch.equal(mine[1], plain[1])
        for a, b in zip(mine, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@QUIET
def test_onnx_runs_the_layer(tmp_path):
    check_layer_in_onnx("conv", "threshold", tmp_path)


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize("tail", ["round", "threshold", "drop", "keep"])
@pytest.mark.parametrize("head", ["last_channel", "conv", "mlp"])
def test_onnx_runs_every_layer(head, tail, tmp_path):
    check_layer_in_onnx(head, tail, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["last_channel", "conv", "mlp"])
def test_autocast_around_the_layer(head, dtype):
    step = LayerStep(head, tail="threshold")
    hidden, _, mask, _ = inputs(3, 60)
    with torch.autocast("cpu", dtype=dtype):
        out = step.layer(hidden.requires_grad_(), mask, target_lengths=torch.tensor([9, 0, 4]))
        assert out.hidden_states.dtype == dtype  # the projection's
        assert out.alpha_sum.dtype == out.alphas.dtype == torch.float32
        loss = out.hidden_states.float().square().sum() + out.alpha_sum.sum()
    loss.backward()
    grads = [hidden.grad.clone(), *(p.grad.clone() for p in step.parameters())]
    hidden.grad = None
    step.zero_grad()
    full = step.layer(hidden, mask, target_lengths=torch.tensor([9, 0, 4]))
    assert torch.equal(full.lengths, out.lengths)
    (full.hidden_states.square().sum() + full.alpha_sum.sum()).backward()
    for mine, plain in zip(grads, [hidden.grad, *(p.grad for p in step.parameters())], strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, plain, rtol=0.05, atol=0.03 * float(plain.abs().max()))
