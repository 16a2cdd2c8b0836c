"""Any chunking of a stream gives what the whole row gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cif import CIF, CIFState, cif, cif_stream

TAILS = ["threshold", "drop", "keep"]


def join(outputs, batch):
    """Put the tokens of all chunks of a row behind each other."""
    tokens = [torch.cat([o.hidden_states[b, : o.lengths[b]] for o in outputs]) for b in batch]
    times = [torch.cat([o.fire_times[b, : o.lengths[b]] for o in outputs]) for b in batch]
    return tokens, times


def check(outputs, whole, *, exact=True, atol=1e-6):
    batch, device = range(len(whole.lengths)), whole.lengths.device
    tokens, times = join(outputs, batch)
    assert sum(o.lengths for o in outputs).tolist() == whole.lengths.tolist()
    for out in outputs:
        position = torch.arange(out.hidden_states.shape[1], device=device)
        assert torch.equal(out.attention_mask, position < out.lengths[:, None])
        assert not out.hidden_states[~out.attention_mask].any()
        assert not out.fire_times[~out.attention_mask].any()
    for b in batch:
        count = int(whole.lengths[b])
        torch.testing.assert_close(tokens[b], whole.hidden_states[b, :count], rtol=1e-5, atol=atol)
        if exact:
            assert torch.equal(times[b], whole.fire_times[b, :count])
        else:
            torch.testing.assert_close(times[b], whole.fire_times[b, :count], rtol=0, atol=1e-3)
    if exact:
        assert torch.equal(outputs[-1].alpha_sum, whole.alpha_sum)


def feed(function, tensors, sizes, **options):
    """Call with chunks of the given sizes, the last one final."""
    outputs, state, start = [], None, 0
    for number, size in enumerate(sizes):
        chunk = {name: t[:, start : start + size] for name, t in tensors.items() if t is not None}
        out, state = function(**chunk, state=state, final=number == len(sizes) - 1, **options)
        outputs.append(out)
        start += size
    assert start == tensors["hidden_states"].shape[1]
    return outputs, state


@st.composite
def problems(draw):
    batch, sizes = (
        draw(st.integers(1, 3)),
        draw(st.lists(st.integers(0, 7), min_size=1, max_size=6)),
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    frames = sum(sizes)
    alphas = torch.rand(batch, frames) * draw(st.sampled_from([0.1, 0.9, 3.0]))
    if draw(st.booleans()):
        alphas = (alphas * 4).round() / 4  # ends of tokens, frames and chunks often meet
    hidden, mask = torch.randn(batch, frames, draw(st.integers(1, 4))), None
    if draw(st.booleans()):
        mask = torch.rand(batch, frames) < draw(st.sampled_from([0.2, 0.8]))
        hidden = hidden.masked_fill(~mask[..., None], float("nan"))
    options = {
        "threshold": draw(st.sampled_from([1.0, 0.5, 1.3])),
        "tail": draw(st.sampled_from(TAILS)),
        "tail_threshold": draw(st.sampled_from([0.25, 0.5, 1.0])),
    }
    return {"hidden_states": hidden, "alphas": alphas, "attention_mask": mask}, sizes, options


@settings(deadline=None, max_examples=150)
@given(problems(), st.booleans())
def test_any_chunking_is_the_whole_row(problem, told):
    tensors, sizes, options = problem
    whole = cif(**tensors, **options)
    told = {"max_tokens": whole.hidden_states.shape[1] + 1} if told else {}
    outputs, state = feed(cif_stream, tensors, sizes, **options, **told)
    check(outputs, whole, atol=3e-6)
    assert not any(kept.any() for kept in state[:5])  # ready for the next stream


@pytest.mark.parametrize("tail", TAILS)
def test_long_ragged_streams(tail):
    torch.manual_seed(0)
    hidden, alphas = torch.randn(16, 400, 8), torch.rand(16, 400) * torch.rand(16, 1)
    mask = torch.arange(400) < torch.randint(0, 401, (16, 1))  # rows end at different times
    tensors = {"hidden_states": hidden, "alphas": alphas, "attention_mask": mask}
    whole = cif(**tensors, tail=tail)
    for sizes in ([400, 0], [1] * 400, [7] * 57 + [1], [0, 399, 1]):
        outputs, _ = feed(cif_stream, tensors, sizes, tail=tail)
        check(outputs, whole, atol=3e-6)


def test_known_values():
    """A frame ends one token and makes two whole ones; the rest waits for the end."""
    first, state = cif_stream(torch.eye(3)[None, :1], torch.tensor([[0.5]]))
    assert first.lengths.tolist() == [0]
    assert state.rest.tolist() == [1 << 39]
    second, state = cif_stream(torch.eye(3)[None, 1:], torch.tensor([[2.75, 0.5]]), state)
    assert second.lengths.tolist() == [3]
    assert second.hidden_states[0].tolist() == [[0.5, 0.5, 0], [0, 1, 0], [0, 1, 0]]
    torch.testing.assert_close(second.fire_times[0], 1 + torch.tensor([0.5, 1.5, 2.5]) / 2.75)
    assert second.alpha_sum.tolist() == [3.75]
    assert state.partial.tolist() == [[0, 0.25, 0.5]]
    assert state.frames.tolist() == [3]
    last, state = cif_stream(torch.zeros(1, 0, 3), torch.zeros(1, 0), state, final=True)
    torch.testing.assert_close(last.hidden_states[0], torch.tensor([[0, 1 / 3, 2 / 3]]))
    assert last.fire_times.tolist() == [[3.0]]
    assert last.alpha_sum.tolist() == [3.75]
    assert state.frames.tolist() == [0]


def test_the_kernels_stream():
    pytest.importorskip("triton")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # there, in Triton's interpreter
    mask = torch.arange(24) < torch.tensor([[24], [7], [0]])
    tensors = {
        "hidden_states": torch.randn(3, 24, 5),
        "alphas": torch.rand(3, 24),
        "attention_mask": mask,
    }
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    whole = cif(**tensors, tail="keep", backend="torch")
    outputs, _ = feed(cif_stream, tensors, [5, 0, 12, 7], tail="keep", backend="triton")
    check(outputs, whole, atol=3e-6)


def test_rows_of_the_state_can_be_chosen():
    torch.manual_seed(0)
    hidden, alphas = torch.randn(3, 20, 4), torch.rand(3, 20)
    order = torch.tensor([2, 0, 0])
    _, state = cif_stream(hidden[:, :11], alphas[:, :11])
    chosen = CIFState(*(kept if kept is None else kept[order] for kept in state))
    mine, _ = cif_stream(hidden[order, 11:], alphas[order, 11:], chosen, final=True)
    other, _ = cif_stream(hidden[:, 11:], alphas[:, 11:], state, final=True)
    assert torch.equal(mine.hidden_states, other.hidden_states[order])
    assert torch.equal(mine.fire_times, other.fire_times[order])


def test_a_bad_alpha_shows_from_then_on_and_stays_in_its_row():
    torch.manual_seed(0)
    hidden, alphas = torch.randn(2, 12, 4), torch.rand(2, 12)
    alphas[0, :4] = alphas[0, 8:] = 0
    clean, _ = feed(cif_stream, {"hidden_states": hidden, "alphas": alphas}, [4, 4, 4, 0])
    alphas[0, 6] = float("nan")
    dirty, _ = feed(cif_stream, {"hidden_states": hidden, "alphas": alphas}, [4, 4, 4, 0])
    assert torch.equal(dirty[0].hidden_states, clean[0].hidden_states)
    for number in (1, 2, 3):
        assert dirty[number].lengths[0] == 1
        assert dirty[number].hidden_states[0, 0].isnan().all()
        assert dirty[number].alpha_sum.isnan().tolist() == [True, False]
        count = int(clean[number].lengths[1])
        assert dirty[number].lengths[1] == count
        assert torch.equal(
            dirty[number].hidden_states[1, :count], clean[number].hidden_states[1, :count]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    torch.manual_seed(0)
    hidden, alphas = torch.randn(2, 40, 5).to(dtype), torch.rand(2, 40)
    whole = cif(hidden, alphas, tail="threshold")
    outputs, state = feed(cif_stream, {"hidden_states": hidden, "alphas": alphas}, [13, 20, 7])
    assert outputs[0].hidden_states.dtype == dtype
    assert state.partial.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tokens, _ = join(outputs, range(2))
    for b in range(2):
        expected = whole.hidden_states[b, : whole.lengths[b]]
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(tokens[b], expected, rtol=2 * eps, atol=2 * eps)


def test_nothing_is_recorded_for_gradients():
    hidden = torch.randn(1, 9, 3, requires_grad=True)
    out, state = cif_stream(hidden, torch.rand(1, 9, requires_grad=True))
    assert not any(t.requires_grad for t in (*out[:5], *state[:5]))


HEADS = ["last_channel", "conv", "mlp"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("head", HEADS)
def test_the_layer_streams_what_it_gives_offline(head, kernel_size, masked):
    if head != "conv" and kernel_size != 3:
        return
    torch.manual_seed(0)
    layer = CIF(6, alpha_head=head, kernel_size=kernel_size, tail="threshold", output_size=4)
    hidden, mask = torch.randn(3, 40, 6), None
    if masked:
        mask = torch.arange(40) < torch.tensor([[40], [3], [25]])
        mask[0, 11:14] = False
        hidden = hidden.masked_fill(~mask[..., None], float("nan"))
    with torch.no_grad():
        whole = layer(hidden, mask)
    tensors = {"hidden_states": hidden, "attention_mask": mask}
    for sizes in ([40], [40, 0], [1] * 40, [2, 0, 1, 30, 7], [0, 0, 40]):
        outputs, _ = feed(layer.stream, tensors, sizes)
        # the head's own rounding may differ from one size of chunk to the other
        check(outputs, whole, exact=False, atol=1e-5)
        alphas = torch.cat([out.alphas for out in outputs], dim=1)
        torch.testing.assert_close(alphas, whole.alphas, rtol=0, atol=1e-6)


def test_the_layer_streams_without_noise_and_without_gradients():
    layer = CIF(4, alpha_noise=1.0, tail="keep")
    hidden = torch.randn(1, 9, 4)
    (mine, _), (other, _) = layer.stream(hidden), layer.stream(hidden)
    assert torch.equal(mine.hidden_states, other.hidden_states)
    assert not mine.hidden_states.requires_grad


def test_a_layer_trained_to_round_needs_another_tail():
    layer, hidden = CIF(4), torch.randn(1, 9, 4)
    with pytest.raises(ValueError, match=r'tail: "round" .*stream.*"threshold", "drop" or "keep"'):
        layer.stream(hidden)
    out, _ = layer.stream(hidden, tail="threshold", final=True)
    layer.tail = "threshold"
    with torch.no_grad():
        expected = layer(hidden)
    assert torch.equal(out.hidden_states, expected.hidden_states)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tail": "round"}, ValueError, r'tail: "round"'),
        ({"backend": "dense"}, ValueError, r'backend: "dense".*"auto"'),
        ({"hidden_states": torch.zeros(3, 5, 4)}, ValueError, r"alphas: "),
        ({"hidden_states": torch.zeros(2, 5, 7)}, ValueError, r"state: .*\(2, 7\).*got \(2, 4\)"),
        ({"attention_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"attention_mask: "),
        ({"max_tokens": -1}, ValueError, r"max_tokens: "),
    ],
)
def test_errors(change, error, message):
    arguments = {"hidden_states": torch.zeros(2, 5, 4), "alphas": torch.zeros(2, 5)}
    _, state = cif_stream(**arguments)
    with pytest.raises(error, match=message):
        cif_stream(**(arguments | {"state": state} | change))


def test_sums_of_many_chunks_are_bitwise_that_of_the_whole_row():
    generator = torch.Generator().manual_seed(2)
    # 14,000 tokens: float64 has 39 bits left for the rest, one too few
    alphas = torch.rand(1, 4000, generator=generator, dtype=torch.float64) * 5
    frames = torch.ones(1, 4000, 1, dtype=torch.float64)
    chunks = {"hidden_states": frames, "alphas": alphas}
    outputs, _ = feed(cif_stream, chunks, [40] * 100, threshold=0.7)
    whole = cif(frames, alphas, threshold=0.7, tail="threshold")
    assert torch.equal(outputs[-1].alpha_sum, whole.alpha_sum)


def test_a_layer_in_half_precision_streams_float32_alphas():
    layer = CIF(6, alpha_head="conv", tail="drop").bfloat16()
    waiting, _ = layer.stream(torch.randn(1, 1, 6).bfloat16())  # for the frame on its right
    assert waiting.alphas.shape == (1, 0)
    assert waiting.alphas.dtype == torch.float32
