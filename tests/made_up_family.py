"""What does a new model family need? A made-up one in one file: embedding, norm, feed-forward network. See test_families."""

import torch

from pyfused.checkpoints.files import Options
from pyfused.checkpoints.layer_plans import ONLY_HF
from pyfused.checkpoints.options import SILENT
from pyfused.families import Family
from pyfused.generation.decoder import chosen
from pyfused.models.backbone import Backbone
from pyfused.models.dtypes import resolve_dtype
from pyfused.nn import Mlp, ReversibleEmbedding, RMSNorm

FAMILY = Family(
    name="bigram",
    backbone="made_up_family:BigramBackbone",
    checkpoint="made_up_family",
    decoding="made_up_family:BigramDecoding",
    adapters=None,
    keras_name="Bigram",
    kaggle_name="bigram",
    presets=(),
    hf_types=("bigram",),
    hf_classes={"Bigram": "bigram"},
    hf_options=frozenset({"bigram_width"}),
)


class BigramBackbone(Backbone):
    def __init__(self, vocabulary_size, hidden_dim, dtype=None):
        super().__init__()
        factory = {"dtype": resolve_dtype(dtype)}
        self._config = {"vocabulary_size": vocabulary_size, "hidden_dim": hidden_dim}
        self.token_embedding = ReversibleEmbedding(vocabulary_size, hidden_dim, **factory)
        self.norm = RMSNorm(hidden_dim, 1e-6, **factory)
        self.feed_forward = Mlp(hidden_dim, 2 * hidden_dim, "relu", **factory)

    def forward(self, inputs=None, **keywords):
        ids = (inputs or keywords)["token_ids"]
        return self.feed_forward(self.norm(self.token_embedding(ids)))

    def text_states(self, token_ids, padding_mask):
        return self(token_ids=token_ids)


class BigramDecoding:
    def __init__(self, model, shape, fixed=False):
        self.model = model

    @staticmethod
    def shape(prompts, max_new_tokens):
        return (len(prompts),)

    @staticmethod
    def check_room(model, prompts, max_new_tokens):
        pass

    def start(self, prompts):
        return self.step(torch.tensor([prompt[-1] for prompt in prompts]))

    def step(self, tokens, choose=False):
        logits = self.model.logits(self.model(token_ids=tokens))
        return chosen(logits, choose)

    def select(self, texts):
        pass


# How pyfused reads and writes its checkpoints, as pyfused/checkpoints/gpt2.py does for GPT-2.
HF_SAVED_PREFIX, HF_BUFFERS, HF_HEAD, HF_EMBEDDING, HF_COPIES, HF_BARE = "", (), None, "embedding.weight", (), ""
DEFAULTS, DEPTHS = {}, ()


def config_from_hf(raw, file):
    options = Options(raw, file)
    config = {"vocabulary_size": options.integer("vocab_size"), "hidden_dim": options.integer("bigram_width")}
    options.finish(SILENT)
    return config


def config_to_hf(config, dtype):
    sizes = {"vocab_size": config["vocabulary_size"], "bigram_width": config["hidden_dim"]}
    return {"model_type": "bigram", "architectures": ["BigramModel"], "dtype": dtype, **sizes}


def settle(config, entries):
    return config, entries


def name_tensors(tensors, config):
    vocabulary, width = config["vocabulary_size"], config["hidden_dim"]
    shapes = {
        "token_embedding.weight": ((vocabulary, width), "embedding.weight"),
        "norm.weight": ((width,), "norm.weight"),
        "feed_forward.inner.weight": ((2 * width, width), "up.weight"),
        "feed_forward.inner.bias": ((2 * width,), "up.bias"),
        "feed_forward.outer.weight": ((width, 2 * width), "down.weight"),
        "feed_forward.outer.bias": ((width,), "down.bias"),
    }
    for name, (shape, theirs) in shapes.items():
        tensors.whole(name, theirs, ONLY_HF, *shape)
