"""Do sentence-transformers models give the same embeddings after fuse_(model, skip_padding=True), with nothing else changed?"""

import copy
import functools

import pytest
import torch
import transformers as hf
from fused_pairs import vary
from hf_cases import BERT, T5, VOCABULARY, livened
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel

import pyfused
from pyfused.integrations.transformers import padding
from pyfused.testing import assert_close

ENCODERS = {
    "BERT": lambda: hf.BertModel(hf.BertConfig(**BERT), add_pooling_layer=False),
    "MPNet": lambda: hf.MPNetModel(hf.MPNetConfig(**BERT), add_pooling_layer=False),
    "T5": lambda: hf.T5EncoderModel(hf.T5Config(**T5)),
}
WORDS = (7, 1, 14, 3, 3, 11, 6, 2, 20, 5, 9)  # in each text
BATCH = 4


@functools.cache
def tokenizer():
    """Words w4, w5, ... with [CLS] and [SEP] around a text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(len(special), VOCABULARY))])}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special))
    inputs = ["input_ids", "attention_mask"]
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, model_input_names=inputs, **names)


def texts():
    generator = torch.Generator().manual_seed(3)
    return [" ".join(f"w{i}" for i in torch.randint(4, VOCABULARY, (n,), generator=generator).tolist()) for n in WORDS]


@pytest.fixture(scope="module", params=ENCODERS)
def files(request, tmp_path_factory):
    """An encoder's directory, as sentence-transformers loads one."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    vary(livened(ENCODERS[request.param]())).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def unsorted(model):
    """The embeddings of the texts in batches as they come; `encode` sorts them by length."""
    with torch.no_grad():
        batches = [texts()[i : i + BATCH] for i in range(0, len(WORDS), BATCH)]
        return torch.cat([model(model.preprocess(batch))["sentence_embedding"] for batch in batches])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings(files, pooling, monkeypatch):
    encoder = Transformer(str(files))
    plain = SentenceTransformer(modules=[encoder, Pooling(32, pooling_mode=pooling)], device="cpu")
    truth, fused = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    pyfused.fuse_(fused, skip_padding=True)
    counts, packed = [], padding.Packing.pack
    monkeypatch.setattr(
        padding.Packing, "pack", lambda self, x: counts.append(packed(self, x).shape[1]) or packed(self, x)
    )

    def encode(model):
        return model.encode(texts(), batch_size=BATCH, convert_to_tensor=True)

    for embed in (encode, unsorted):
        counts.clear()
        found, expected, exact = embed(fused), embed(plain), embed(truth)
        assert found.shape == (len(WORDS), 32)
        assert_close(found, expected, exact, embed.__name__)
        assert sum(counts) == sum(WORDS) + 2 * len(WORDS)  # the real tokens alone, once for the whole encoder
