"""recipes/plain-distillation on tiny random models; the Trainer's count of items."""

import importlib.util
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[2] / "recipes" / "plain-distillation" / "distil.py"
# torch's and the Trainer's own, on a machine without a GPU
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("distil", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer of some words, texts, a wide teacher and a narrow student with a padded head."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models")
    words = ["<eos>", *["the", "a", "cat", "dog", "sees", "hears", "big", "small"]]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<eos>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>")
    for name, width, padded in (("teacher", 32, 9), ("student", 16, 12)):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=2, vocab_size=padded, eos_token_id=0, bos_token_id=None,
            # a teacher that is sure of what it says
            initializer_range=0.3 if name == "teacher" else 0.02,
            pad_token_id=0, tie_word_embeddings=name == "student",
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    # what the teacher says itself: then KL and cross entropy pull the same way
    teacher = transformers.AutoModelForCausalLM.from_pretrained(folder / "teacher")
    made, lines = torch.Generator().manual_seed(1), []
    for first in range(1, 9):
        ids = torch.tensor([[first]])
        for _ in range(first):
            with torch.no_grad():
                chances = teacher(ids).logits[:, -1, 1:].softmax(-1)
            ids = torch.cat([ids, 1 + torch.multinomial(chances, 1, generator=made)], dim=1)
        lines.append(" ".join(words[i] for i in ids[0]))
    (folder / "texts.txt").write_text("\n".join(lines))
    return folder


def distil(script, world, output, *options):
    script.main(
        str(world / "teacher"), str(world / "student"), str(world / "texts.txt"), str(output),
        "--report_to", "none", "--use_cpu", "True", "--disable_tqdm", "True",
        "--save_strategy", "no", "--lr_scheduler_type", "constant", *options,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_pretrained(output)


def kl(world, student):
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "teacher")
    teacher = transformers.AutoModelForCausalLM.from_pretrained(world / "teacher")
    total = 0.0
    with torch.no_grad():
        for line in (world / "texts.txt").read_text().splitlines():
            ids = tokenizer(line, return_tensors="pt").input_ids
            log_p, log_q = (m(ids).logits[..., :9].log_softmax(-1) for m in (teacher, student))
            total += (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return total


def test_the_student_comes_closer_to_its_teacher(script, world, tmp_path):
    before = transformers.AutoModelForCausalLM.from_pretrained(world / "student")
    after = distil(
        script, world, tmp_path, "--learning_rate", "1e-2", "--max_steps", "60",
        "--per_device_train_batch_size", "8",
    )  # fmt: skip
    assert kl(world, after) < 0.7 * kl(world, before)


def test_accumulation_in_the_trainer_equals_one_big_batch(script, world, tmp_path):
    """num_items_in_batch divides once: no gradient is scaled again by the number of parts."""
    options = (
        "--optim",
        "sgd",
        "--learning_rate",
        "0.5",
        "--max_steps",
        "1",
        "--max_grad_norm",
        "0",
    )
    weights = []
    for size, parts in ((8, 1), (2, 4)):
        after = distil(
            script, world, tmp_path / str(size), *options, "--per_device_train_batch_size",
            str(size), "--gradient_accumulation_steps", str(parts),
        )  # fmt: skip
        weights.append(torch.cat([p.flatten() for p in after.parameters()]).detach())
    before = transformers.AutoModelForCausalLM.from_pretrained(world / "student")
    start = torch.cat([p.flatten() for p in before.parameters()]).detach()
    assert (weights[0] - start).norm() > 0.01
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_the_script_is_short():
    code = [line for line in SCRIPT.read_text().splitlines() if line.strip()]
    assert len(code) <= 40
