"""T5 1.1 base with random weights beside transformers: an encoder's pass over 512 tokens, and one generated token.

The token attends to 32 tokens before it and to 512 of the source. Floor of a token: the weights of the decoder and of the
logits, and the keys and values of the source, each read once.
"""

import tempfile

import numpy as np
import torch

import pyfused
from pyfused.bench import Case
from pyfused.models._t5_decoding import T5Decoding

from .peers import references

SOURCE, CACHED = 512, 32
SIZES = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}


def models(device, dtype):
    """The same random weights, which dtype holds, in transformers' model, in float32, and in pyfused's."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(**SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    theirs = T5ForConditionalGeneration(config).to(dtype).float()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        mine = pyfused.T5Backbone.from_preset(directory, device=device, dtype=dtype)
    return mine, theirs.to(device).eval()


def cases(device):
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    source = torch.randint(32128, (1, SOURCE), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            mine, theirs = models(device, dtype)
            ids, token = source.to(device), torch.zeros(1, dtype=torch.int64, device=device)
            encoder = theirs.get_encoder()

            def my_encoder(model=mine):
                return model.encode(encoder_token_ids=ids, encoder_padding_mask=None)

            def last_logits(model):
                """(1, V), without a cache."""
                written = token.expand(1, CACHED + 1)
                masks = {"encoder_padding_mask": None, "decoder_padding_mask": None}
                found = model(encoder_token_ids=ids, decoder_token_ids=written, **masks)
                return model.logits(found["decoder_sequence_output"][:, -1])

            def their_encoder():
                return encoder(ids).last_hidden_state

            label = str(dtype).removeprefix("torch.")
            matrices = sum(p.numel() for n, p in mine.encoder.named_parameters() if p.dim() == 2)
            yield Case(
                f"encoder, {SOURCE} tokens {label}",
                {"pyfused": my_encoder, "transformers float32": their_encoder},
                **references(mine, my_encoder),
                baseline="transformers float32",
                flops=2 * matrices * SOURCE,
                seconds=20.0,
            )

            decoding = T5Decoding(mine, (1, CACHED + 1, SOURCE))
            decoding.start([np.array(source[0])])
            past, states = EncoderDecoderCache(DynamicCache(), DynamicCache()), encoder(ids)
            for _ in range(CACHED - 1):
                decoding.step(token)
            for _ in range(CACHED):
                theirs(encoder_outputs=states, decoder_input_ids=token[:, None], past_key_values=past, use_cache=True)

            def my_token():
                decoding._cache.length = CACHED
                return decoding.step(token)

            def their_token():
                out = theirs(
                    encoder_outputs=states, decoder_input_ids=token[:, None], past_key_values=past, use_cache=True
                )
                past.self_attention_cache.crop(-1)
                return out.logits[:, -1]

            read = sum(p.numel() for n, p in mine.decoder.named_parameters() if ".key_value" not in n)
            read += mine.token_embedding.weight.numel() + 2 * 12 * SOURCE * 768
            yield Case(
                f"token, {CACHED} cached, source of {SOURCE} {label}",
                {"pyfused": my_token, "transformers float32": their_token},
                **references(mine, last_logits),
                baseline="transformers float32",
                bytes=read * token.new_empty(0, dtype=dtype).element_size(),
                seconds=10.0,
            )
