"""Losses at an early layer: the same as from the full pass, and no layer run in vain."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from blspkd.model.early_layer import check_layer, decoder_layers, watched_layer
from blspkd.model.objective import LossWeights, Objective
from blspkd.model.passes import Depth, read, read_prompt

NOTHING = dict.fromkeys(LossWeights.__dataclass_fields__, 0.0)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def _gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=4, n_head=2))


def _opt():
    config = OPTConfig(
        vocab_size=50,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    )
    return OPTForCausalLM(config)


def _neox():
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))


def _gemma3():
    """Sliding and full attention in turn, embeddings scaled."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=kinds)
    )


LANGUAGE_MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "opt": _opt,
}


@pytest.mark.parametrize("prompt_length", [0, 3])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_first_layers_alone_give_what_the_full_pass_gives(name, prompt_length):
    torch.manual_seed(0)
    model = LANGUAGE_MODELS[name]().eval()
    ids = torch.randint(2, 50, (2, 9))
    ids[1] = torch.cat([ids[0, :prompt_length], ids[1, prompt_length:]])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 7:] = False
    decoder = model.get_decoder()
    with torch.no_grad():
        expected = decoder(
            input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False
        )
        rest, real = model.get_input_embeddings()(ids[:, prompt_length:]), mask[:, prompt_length:]
        found = {}
        for stop in (True, False):
            depth = Depth(2, stop=stop)
            prompt = None
            if prompt_length:
                prompt = read_prompt(model, ids[:1, :prompt_length], depth)
            found[stop] = read(model, rest, real, prompt, prompt_length, depth)
    states = expected.hidden_states[2][:, prompt_length:][real]
    for reading in found.values():
        torch.testing.assert_close(reading.layer_output[real], states, atol=1e-6, rtol=1e-5)
    # the head reads the same whether the pass stopped there or went on, but not the last layer's
    torch.testing.assert_close(
        found[True].layer_readout[real], found[False].layer_readout[real], atol=1e-6, rtol=1e-5
    )
    last = expected.last_hidden_state[:, prompt_length:][real]
    torch.testing.assert_close(found[False].last[real], last, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found[True].last[real], last, atol=1e-3)
    assert torch.equal(found[True].last, found[True].layer_readout)


def test_what_the_head_reads_from_the_last_layer_is_what_it_reads():
    model = LANGUAGE_MODELS["llama"]().eval()
    embeds, mask = torch.randn(1, 5, 16), torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad():
        full = read(model, embeds, mask, None, 0)
        for stop in (True, False):
            deep = read(model, embeds, mask, None, 0, Depth(4, stop=stop))
            assert torch.equal(deep.last, full.last)
            assert torch.equal(deep.layer_readout, full.last)


def test_the_decoder_is_whole_again_whatever_happens():
    model = LANGUAGE_MODELS["llama"]()
    decoder = model.get_decoder()
    _, layers = decoder_layers(decoder)
    before = list(model.state_dict())

    def fail():
        with watched_layer(decoder, 2, stop=True):
            assert len(decoder.layers) == 2
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert decoder.layers is layers
    assert list(model.state_dict()) == before
    assert not any(layer._forward_hooks for layer in layers)


def test_layers_that_are_not_there_are_refused():
    decoder = LANGUAGE_MODELS["llama"]().get_decoder()
    with pytest.raises(ValueError, match=r"layers 1 to 4, got layer 5"):
        check_layer(decoder, 5)
    with pytest.raises(ValueError, match="expected 1"):
        Objective(LossWeights(), layer=0)
    with pytest.raises(ValueError, match="cosine, mse, got 'l1'"):
        Objective(LossWeights(), layer_distance="l1")
    with pytest.raises(ValueError, match="a layer to stop after"):
        Depth(stop=True)


def _objective(**weights):
    return Objective(LossWeights(**{**NOTHING, **weights}), temperature=2.0)


def test_the_losses_are_those_of_the_full_pass_hidden_states(model_and_batch):
    model, batch = model_and_batch
    with torch.no_grad():
        output = model(**batch, objective=_objective(layer_hidden=1, layer_kl=1))
        # the oracle: bare passes with all hidden states, and the losses written out
        speech = batch["speech_mask"]
        decoder = model.language_model.get_decoder()
        text = model.language_model.get_input_embeddings()(batch["input_ids"])
        heard = text.clone()
        heard[speech] = output.speech_vectors[output.adapter.attention_mask]
        states = []
        for embeds, mask in ((heard, speech), (text, None)):
            with model.plora_on(mask):
                states.append(
                    decoder(
                        inputs_embeds=embeds,
                        attention_mask=batch["attention_mask"].long(),
                        output_hidden_states=True,
                    ).hidden_states[1][speech]
                )
        cosine = 1 - F.cosine_similarity(*states, dim=-1)
        logits = [decoder.norm(one) @ model.head_weight().T / 2.0 for one in states]
        kl = F.kl_div(
            logits[0].log_softmax(-1), logits[1].log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
    torch.testing.assert_close(output.losses["layer_hidden"], cosine.mean(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.losses["layer_kl"], kl.mean(), atol=1e-5, rtol=1e-4)
    mse = Objective(_objective(layer_hidden=1).weights, layer_distance="mse")
    with torch.no_grad():
        found = model(**batch, objective=mse).losses["layer_hidden"]
    torch.testing.assert_close(found, F.mse_loss(*states), atol=1e-5, rtol=1e-4)


def test_losses_beside_those_of_the_last_layer_are_the_same(model_and_batch):
    model, batch = model_and_batch
    early = {"layer_hidden": 1.0, "layer_kl": 1.0}
    alone = model(**batch, objective=_objective(**early)).losses
    beside = model(**batch, objective=_objective(**early, input_kl=1, response_kl=1)).losses
    for name in early:
        torch.testing.assert_close(alone[name], beside[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["layer_hidden", "layer_kl"])
def test_no_later_layer_is_run_or_trained(model_and_batch, name):
    model, batch = model_and_batch
    model.train()
    runs = []
    layers = model.language_model.get_decoder().layers
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    output = model(**batch, objective=_objective(**{name: 1.0}))
    output.loss.backward()
    assert runs == [0, 0, 0]  # the prompt, the student, the teacher
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("adapter.") for n in trained)
    assert any(".layers.0." in n and "lora_" in n for n in trained)
    assert not any(".layers.1." in n for n in trained)
    runs.clear()
    model(**batch, objective=_objective(**{name: 1.0}, input_kl=1)).loss.backward()
    assert runs == [0, 1] * 3


def test_speech_that_reads_as_the_text_is_at_no_distance(hearing_the_text):
    model, batch = hearing_the_text
    output = model(**batch, objective=_objective(layer_hidden=1, layer_kl=1))
    assert output.losses["layer_hidden"] == 0
    assert output.losses["layer_kl"] == 0
