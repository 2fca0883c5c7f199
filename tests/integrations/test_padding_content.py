"""Do padding's values stay there? NaN in a fused model's padded embeddings changes no bit of real tokens' outputs."""

import pytest
import torch
from fused_pairs import padded
from torch import nn

import pyfused
from pyfused.testing import running

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 61, "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40}


def gpt2():
    sizes = {"vocab_size": 61, "n_layer": 2, "n_head": 4, "n_embd": 24, "n_positions": 48}
    return transformers.GPT2Model(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def albert():
    return transformers.AlbertModel(transformers.AlbertConfig(**SIZES, embedding_size=24), add_pooling_layer=False)


def t5():
    """The decoder's output: its cross-attention reads the encoder's states, which are NaN at padding."""
    sizes = {"vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    return transformers.T5Model(transformers.T5Config(**sizes))


class TorchLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)

    def forward(self, inputs_embeds, attention_mask):
        padding = attention_mask == 0
        y = self.layer(inputs_embeds, src_key_padding_mask=padding)
        return {"last_hidden_state": self.attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [gpt2, albert, t5, TorchLayers], ids=lambda f: f.__name__)
def test_fused(family, side, backend):
    torch.manual_seed(3)
    model = family().eval()
    assert pyfused.fuse_(model).replaced
    mask = padded(3, 13, 61, side)[1]
    embeddings = torch.randn(3, 13, 24)
    more = {"decoder_input_ids": torch.randint(2, 61, (3, 9))} if family is t5 else {}
    found = []
    for junk in (0.0, torch.nan, torch.inf):
        given = embeddings.masked_fill(mask[..., None] == 0, junk)
        with running(backend, strict=False):
            hidden = model(inputs_embeds=given, attention_mask=mask, **more)["last_hidden_state"]
        found.append(hidden if family is t5 else hidden[mask.bool()])
    assert found[0].isfinite().all()
    for hidden in found[1:]:
        assert torch.equal(hidden, found[0])
