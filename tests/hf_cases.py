"""Which tiny transformers models do tests use, and how do they compare "pyfused" with "eager"?"""

import copy

import torch
import transformers as hf

from pyfused.testing.tolerance import assert_close

VOCABULARY = 50
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BERT = {**IDS, **WIDTHS, **NO_DROPOUT, "max_position_embeddings": 40}
DECODER = {**IDS, **WIDTHS, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
BART = {**IDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 40, "dropout": 0.0}
BART |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
DISTILBERT = {**IDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40}
T5 = {**IDS, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "dropout_rate": 0.0}

MODELS = {
    "bert": lambda **more: hf.BertModel(hf.BertConfig(**{**BERT, **more})),
    "roberta": lambda **more: hf.RobertaModel(hf.RobertaConfig(**{**BERT, **more})),
    "distilbert": lambda **more: hf.DistilBertModel(hf.DistilBertConfig(**DISTILBERT, **more)),
    "albert": lambda **more: hf.AlbertModel(hf.AlbertConfig(**{**BERT, "embedding_size": 16, **more})),
    "gpt2": lambda **more: hf.GPT2Model(hf.GPT2Config(**{**GPT2, **more})),
    "llama": lambda **more: hf.LlamaModel(hf.LlamaConfig(**{**DECODER, **more})),
    "mistral, window 4": lambda **more: hf.MistralModel(hf.MistralConfig(**DECODER, sliding_window=4, **more)),
    "mistral, window 32": lambda **more: hf.MistralModel(hf.MistralConfig(**DECODER, sliding_window=32, **more)),
    "bart": lambda **more: hf.BartModel(hf.BartConfig(**{**BART, **more})),
    "t5": lambda **more: hf.T5Model(hf.T5Config(**{**T5, **more})),
}


DECODERS = ["gpt2", "llama", "mistral, window 4", "mistral, window 32"]
ENCODERS = ["bert", "roberta", "distilbert", "albert"]


def livened(model):
    """Scales the weights so that the softmax is far from uniform; a fresh model attends to every key alike."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = p.dim() == 1 and name.endswith("weight")
            p.normal_(1.0 if norm else 0.0, 0.1 if p.dim() == 1 else 0.25)
    return model.eval()


def build(name, **more):
    return livened(MODELS[name](**more))


def tokens(*shape):
    return torch.randint(3, VOCABULARY, shape)


def padding(rows, length, side):
    """(rows, length) mask of ones; the first row has three padded tokens on that side, the second row has one."""
    mask = torch.ones(rows, length, dtype=torch.long)
    if side:
        for row, count in enumerate((3, 1)[:rows]):
            mask[row, slice(0, count) if side == "left" else slice(length - count, None)] = 0
    return mask


def in_double(inputs):
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}


def with_implementation(model, name):
    model.set_attn_implementation(name)
    return model


@torch.no_grad()
def check_against_eager(model, inputs, live=..., call=None, eager_inputs=None):
    """Judges the "pyfused" output by the tolerance rule. Plain is "eager"; the truth is "eager" in float64 ("sdpa" for models
    whose eager softmax is always float32).

    call: (model, inputs) -> the tensor to compare; live: an index of the rows to compare.
    """
    call = call or (lambda m, x: m(**x)[0])
    eager_inputs = eager_inputs or inputs
    exact = "sdpa" if model.config.model_type in ("llama", "mistral") else "eager"
    truth = call(with_implementation(copy.deepcopy(model).double(), exact), in_double(eager_inputs))
    plain = call(with_implementation(model, "eager"), eager_inputs)
    actual = call(with_implementation(model, "pyfused"), inputs)
    assert_close(actual[live], plain[live], truth[live])
    return actual
