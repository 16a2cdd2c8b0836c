"""Three-way numerics: float64 truth, plain low-precision torch, and ours.

Letters: n rows, H width, V vocabulary.
"""

import pytest
import torch
from torch.nn import functional as F

from kd_losses import kl_div_with_logits, linear_cross_entropy, linear_kl_div

# Ours may err as much as plain torch in the same dtype, plus this fraction of the truth.
TOLERANCE = {
    torch.float64: 1e-12,  # a few hundred roundings of 1e-16
    torch.float32: 2e-6,  # sums over V = 1,003 in another order
    torch.bfloat16: 4e-3,  # one rounding of the result to 8 bits
    torch.float16: 2e-3,  # one rounding of the result to 11 bits, and a subnormal or two
}
DTYPES = list(TOLERANCE)
N, H, V = 37, 24, 1003


def problem(dtype, closeness=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = (0.4 * torch.randn(V, H, generator=generator)).to(dtype)
    teacher = torch.randn(N, H, generator=generator).to(dtype)
    student = (teacher + closeness * torch.randn(N, H, generator=generator)).to(dtype)
    return student, weight, teacher


def plain_kl(student, weight, teacher, temperature, bias=None, teacher_bias=None):
    log_q = torch.log_softmax(F.linear(student, weight, bias) / temperature, dim=-1)
    log_p = torch.log_softmax(F.linear(teacher, weight, teacher_bias) / temperature, dim=-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / len(student)


def value_and_gradient(function, student):
    student = student.clone().requires_grad_()
    value = function(student)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach().double(), gradient.double()


def error(got, truth):
    return ((got - truth).norm() / truth.norm()).item()


def assert_no_worse(ours, plain, truth, dtype):
    for ours_part, plain_part, truth_part in zip(ours, plain, truth, strict=True):
        allowed = error(plain_part, truth_part) + TOLERANCE[dtype]
        assert error(ours_part, truth_part) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("shared", [True, False], ids=["shared head", "two heads"])
def test_linear_kl_div_errs_no_more_than_plain_torch(dtype, temperature, shared):
    student, weight, teacher = problem(dtype)
    truth = value_and_gradient(
        lambda h: plain_kl(h, weight.double(), teacher.double(), temperature), student.double()
    )
    plain = value_and_gradient(lambda h: plain_kl(h, weight, teacher, temperature), student)
    ours = value_and_gradient(
        lambda h: linear_kl_div(
            h,
            weight,
            teacher,
            None if shared else weight.clone(),
            temperature=temperature,
            chunk_size=8,
        ),
        student,
    )
    assert_no_worse(ours, plain, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biases_count_on_both_sides(dtype):
    student, weight, teacher = problem(dtype)
    biases = [torch.randn(V, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (1, 2)]
    truth = value_and_gradient(
        lambda h: plain_kl(
            h, weight.double(), teacher.double(), 2.0, *[bias.double() for bias in biases]
        ),
        student.double(),
    )
    plain = value_and_gradient(lambda h: plain_kl(h, weight, teacher, 2.0, *biases), student)
    for teacher_weight in (None, weight.clone()):
        ours = value_and_gradient(
            lambda h, teacher_weight=teacher_weight: linear_kl_div(
                h,
                weight,
                teacher,
                teacher_weight,
                linear_bias=biases[0],
                teacher_linear_bias=biases[1],
                temperature=2.0,
            ),
            student,
        )
        assert_no_worse(ours, plain, truth, dtype)


@pytest.mark.parametrize("kind", ["shared", "two heads", "trainable", "logits"])
def test_temperature_squared_multiplies_value_and_gradient(kind):
    student, weight, teacher = problem(torch.float64)

    def loss(h, **options):
        if kind == "logits":
            return kl_div_with_logits(h @ weight.T, teacher @ weight.T, temperature=3.0, **options)
        head = weight.clone().requires_grad_(kind == "trainable")
        teacher_weight = weight.clone() if kind == "two heads" else None
        return linear_kl_div(h, head, teacher, teacher_weight, temperature=3.0, **options)

    expected = value_and_gradient(
        lambda h: 9 * plain_kl(h, weight, teacher, temperature=3.0), student
    )
    ours = value_and_gradient(lambda h: loss(h, scale_by_temperature_squared=True), student)
    torch.testing.assert_close(ours, expected)


def test_float16_gradients_do_not_underflow():
    # p is about 1 / 20,000, its relative change 0.001: q - p is about 5e-8, too small for float16
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20_000, 8, generator=generator).half()
    teacher = (0.01 * torch.randn(4, 8, generator=generator)).half()
    student = (teacher + 3e-4 * torch.randn(4, 8, generator=generator)).half()
    truth = value_and_gradient(
        lambda h: plain_kl(h, weight.double(), teacher.double(), 1.0), student.double()
    )
    ours = value_and_gradient(lambda h: 1024 * linear_kl_div(h, weight, teacher), student)
    assert error(ours[1] / 1024, truth[1]) < 0.02


def test_a_shared_bias_belongs_to_both():
    student, weight, teacher = problem(torch.float64)
    bias = 3 * torch.randn(V, dtype=torch.float64)
    expected = value_and_gradient(lambda h: plain_kl(h, weight, teacher, 1.0, bias, bias), student)
    ours = value_and_gradient(
        lambda h: linear_kl_div(h, weight, teacher, linear_bias=bias, chunk_size=8), student
    )
    torch.testing.assert_close(ours, expected)
    assert not torch.allclose(ours[0], plain_kl(student, weight, teacher, 1.0))


def test_teacher_and_student_may_differ_in_width():
    student, weight, _ = problem(torch.float64)
    teacher = torch.randn(N, 2 * H, dtype=torch.float64)
    teacher_weight = 0.2 * torch.randn(V, 2 * H, dtype=torch.float64)
    expected = value_and_gradient(
        lambda h: kl_div_with_logits(h @ weight.T, teacher @ teacher_weight.T), student
    )
    ours = value_and_gradient(
        lambda h: linear_kl_div(h, weight, teacher, teacher_weight, chunk_size=5), student
    )
    torch.testing.assert_close(ours, expected)


def test_a_shared_head_keeps_small_gradients_in_bfloat16():
    # KL about 0.004: the logits' roundings are as large as what is to be learned
    student, weight, teacher = problem(torch.bfloat16, closeness=0.05)
    truth = value_and_gradient(
        lambda h: plain_kl(h, weight.double(), teacher.double(), 1.0), student.double()
    )
    plain = value_and_gradient(lambda h: plain_kl(h, weight, teacher, 1.0), student)
    ours = value_and_gradient(lambda h: linear_kl_div(h, weight, teacher), student)
    assert truth[0] < 0.01
    assert error(plain[1], truth[1]) > 0.1
    assert error(ours[1], truth[1]) < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_close_distributions_do_not_cancel(dtype):
    # KL is about 1e-7, where sum p (log p - log q) in float32 is mostly rounding
    student, weight, teacher = problem(dtype, closeness=3e-4 if dtype == torch.float32 else 5e-3)
    truth = value_and_gradient(
        lambda h: plain_kl(h, weight.double(), teacher.double(), 1.0), student.double()
    )
    ours = value_and_gradient(lambda h: linear_kl_div(h, weight, teacher), student)
    for ours_part, truth_part in zip(ours, truth, strict=True):
        assert error(ours_part, truth_part) < 0.03


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_div_with_logits_errs_no_more_than_plain_torch(dtype, temperature):
    student, weight, teacher = problem(dtype)
    logits, teacher_logits = student @ weight.T, teacher @ weight.T

    def plain(z, z_teacher):
        log_q = torch.log_softmax(z / temperature, dim=-1)
        log_p = torch.log_softmax(z_teacher / temperature, dim=-1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    assert_no_worse(
        value_and_gradient(
            lambda z: kl_div_with_logits(z, teacher_logits, temperature=temperature), logits
        ),
        value_and_gradient(lambda z: plain(z, teacher_logits), logits),
        value_and_gradient(lambda z: plain(z, teacher_logits.double()), logits.double()),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_cross_entropy_errs_no_more_than_plain_torch(dtype, temperature, with_bias):
    student, weight, _ = problem(dtype)
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1)).to(dtype)
    target = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2))
    target[::5] = -100

    def plain(h, dtype):
        logits = F.linear(h, weight.to(dtype), bias.to(dtype) if with_bias else None)
        return F.cross_entropy(logits / temperature, target)

    assert_no_worse(
        value_and_gradient(
            lambda h: linear_cross_entropy(
                h,
                weight,
                target,
                linear_bias=bias if with_bias else None,
                temperature=temperature,
                chunk_size=8,
            ),
            student,
        ),
        value_and_gradient(lambda h: plain(h, dtype), student),
        value_and_gradient(lambda h: plain(h, torch.float64), student.double()),
        dtype,
    )


def test_normalised_embeddings_as_a_head():
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(V, H, generator=generator), dim=-1)
    hidden_states = torch.randn(2, 9, H, generator=generator)
    target = torch.randint(0, V, (2, 9), generator=generator)

    def loss(function):
        return value_and_gradient(lambda h: function(F.normalize(h, dim=-1) * 30), hidden_states)

    ours = loss(lambda rows: linear_cross_entropy(rows, embeddings, target))
    plain = loss(
        lambda rows: F.cross_entropy((rows @ embeddings.T).flatten(0, 1), target.flatten())
    )
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_agrees_with_the_cpu(dtype):
    student, weight, teacher = problem(dtype)
    for teacher_weight in (None, weight.clone()):
        on_cpu = value_and_gradient(
            lambda h, w=teacher_weight: linear_kl_div(h, weight, teacher, w), student
        )
        on_cuda = value_and_gradient(
            lambda h, w=teacher_weight: linear_kl_div(
                h, weight.cuda(), teacher.cuda(), None if w is None else w.cuda()
            ),
            student.cuda(),
        )
        for cpu_part, cuda_part in zip(on_cpu, on_cuda, strict=True):
            assert error(cuda_part.cpu(), cpu_part) < 1e-5 + 10 * TOLERANCE[dtype]
