"""Which models do the tests of fused models' steps of one token use?"""

import copy

import torch
import transformers as hf
from hf_cases import GPT2, T5, livened
from transformers.cache_utils import EncoderDecoderCache

import pyfused

T5 = {**T5, "decoder_start_token_id": 0, "eos_token_id": None}
GPT2 = {**GPT2, "eos_token_id": None, "bos_token_id": None}
MAKE = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt2, other options": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True, n_inner=40, activation_function="relu")
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "t5 gated": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False, relative_attention_max_distance=20)
    ),
}


def pair(name="gpt2"):
    plain = livened(MAKE[name]())
    fused = copy.deepcopy(plain)
    pyfused.fuse_(fused)
    return plain, fused


def prompt(model, ids, cache=None):
    if not model.config.is_encoder_decoder:
        return model(ids, past_key_values=cache, use_cache=True)
    source = torch.arange(3, 9).expand(ids.shape[0], -1)
    return model(source, decoder_input_ids=ids, past_key_values=cache, use_cache=True)


def parts(cache):
    return (
        (cache.self_attention_cache, cache.cross_attention_cache)
        if isinstance(cache, EncoderDecoderCache)
        else (cache,)
    )


def tensors(cache):
    return [t for part in parts(cache) for layer in part.layers for t in (layer.keys, layer.values)]
