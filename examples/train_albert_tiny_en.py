"""How was the bundled preset albert_tiny_en made? Trains it from scratch as ALBERT was, on a CPU (see tiny_en.py).

    python examples/train_albert_tiny_en.py --text kjv.txt --provider pyfused --save pyfused/presets/albert_tiny_en

Trains two tasks at once (Lan et al. 2019, arXiv:1909.11942, section 3.1): to predict masked tokens (masked_tokens.py), and to
tell whether a window's halves, segments 0 and 1 of [CLS] one [SEP] other [SEP], are in order. The preset leaves out the heads
of both tasks. It also leaves out the pooler, which feeds the second head: in so few steps that head stays at chance (49.5% of
held-out windows), so the pooled output would mean nothing.

There is no dropout, so two providers are comparable step by step. The one layer is applied once at first and twice later. Its
weights are shared, so depth can grow at any time.
"""

import math
import tempfile

import masked_tokens as masked
import torch
import torch.nn.functional as F
from tiny_en import adamw, arguments, chapters, save, split, tokenizer_of, train, write_curve
from torch import Tensor, nn

import pyfused

HALF = 62  # tokens in each half
LENGTH = 2 * HALF + 2  # of masked_tokens.py's windows; a second [SEP] is added
VOCABULARY = 2048  # at most: a short text has fewer pieces
CONFIG = {
    "num_layers": 2,
    "num_heads": 4,
    "embedding_dim": 64,
    "hidden_dim": 160,
    "intermediate_dim": 640,
    "max_sequence_length": LENGTH + 1,  # every position is trained
    "dropout": 0.0,
}
BATCH, PEAK_RATE = 6, 1.5e-3
ALONE = 0.4  # share of steps with one application: with two from the start, the model learns only frequencies
ORDER_WEIGHT = 0.1  # the second task's weight: it learns from 6 windows a step, the first from 114 tokens


def train_tokenizer(documents: list[str]):
    """masked_tokens.py's tokenizer with ALBERT's normalisation, which drops case and accents."""
    from tokenizers import normalizers

    steps = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    steps += [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    normal = normalizers.Sequence(steps)
    tokenizer = masked.train_tokenizer([normal.normalize_str(document) for document in documents], VOCABULARY)
    tokenizer.normalizer = normal
    return tokenizer


def order(batch: masked.Batch, generator: torch.Generator) -> tuple[masked.Batch, Tensor]:
    """(the batch with [SEP] between halves and some windows' halves swapped, which ones were swapped (B,))."""
    swapped = torch.rand(len(batch.ids), generator=generator) < 0.5
    first, second = batch.ids[:, 1:-1].chunk(2, 1)
    first, second = torch.where(swapped[:, None], second, first), torch.where(swapped[:, None], first, second)
    start, end = batch.ids[:, :1], batch.ids[:, -1:]
    ids = torch.cat([start, first, end, second, end], 1)
    in_second = (batch.places > HALF) ^ swapped[:, None]
    places = (batch.places - 1) % HALF + 1 + in_second * (HALF + 1)
    return masked.Batch(ids, places, batch.targets), swapped


class Pretraining(nn.Module):
    """A backbone of either provider with the heads of both tasks."""

    def __init__(self, backbone: nn.Module, vocabulary: int):
        super().__init__()
        self.backbone = backbone
        self.head = masked.Head(CONFIG["hidden_dim"], CONFIG["embedding_dim"], vocabulary)
        self.order = nn.Linear(CONFIG["hidden_dim"], 2)
        nn.init.normal_(self.order.weight, 0.0, 0.02)
        nn.init.zeros_(self.order.bias)

    def deepen(self, layers: int) -> None:
        """Applies the shared layer `layers` times from now on."""
        if isinstance(self.backbone, pyfused.AlbertBackbone):
            changed = pyfused.AlbertBackbone.from_config(self.backbone.get_config() | {"num_layers": layers})
            for name, module in self.backbone.named_children():
                setattr(changed, name, module)
            self.backbone = changed
        else:
            self.backbone.config.num_hidden_layers = self.backbone.encoder.config.num_hidden_layers = layers

    def forward(self, batch: masked.Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, K, V) of the chosen tokens and (B, 2) of "in order" and "swapped"."""
        segments = (torch.arange(batch.ids.shape[1]) > HALF + 1).long().expand_as(batch.ids)
        if isinstance(self.backbone, pyfused.AlbertBackbone):
            out = self.backbone(token_ids=batch.ids, segment_ids=segments, padding_mask=None)
            hidden, pooled, embedding = out["sequence_output"], out["pooled_output"], self.backbone.token_embedding
        else:
            out = self.backbone(batch.ids, token_type_ids=segments)
            hidden, pooled, embedding = out[0], out[1], self.backbone.get_input_embeddings()
        return self.head(batch.chosen(hidden), embedding.weight), self.order(pooled)


@torch.no_grad()
def initialise(backbone: pyfused.AlbertBackbone) -> None:
    """Makes a few thousand steps enough. Matrices and tables get a spread of 1 / sqrt(width), which keeps a vector's size.
    Positions are sines of many frequencies, so "the token before" is the same rotation everywhere. Each head's queries and
    keys start with that rotation and look one or two tokens to one side. Training may change all of it."""
    for parameter in backbone.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    table, projection = backbone.position_embedding.weight, backbone.projection.weight
    (length, narrow), wide = table.shape, projection.shape[0]
    rates = (torch.arange(narrow // 2) + 0.5) * (2 * math.pi / narrow)
    angles = torch.arange(length)[:, None] * rates
    table.copy_(0.2 * torch.cat([angles.sin(), angles.cos()], 1))
    frame, _ = torch.linalg.qr(torch.randn(wide, narrow))
    projection.copy_(frame * math.sqrt(wide / narrow))
    attention = backbone.layers[0][0].attention
    query, key, _ = attention.query_key_value.weight.view(3, attention.num_heads, attention.head_size, wide)
    chosen = torch.linspace(0, narrow // 2 - 1, attention.head_size // 2).round().long()
    sine, cosine = (2.0 * math.sqrt(narrow / wide) * frame.t()[chosen + start] for start in (0, narrow // 2))
    for head, offset in enumerate((-1, 1, -2, 2)):
        turn = offset * rates[chosen, None]
        key[head] = torch.cat([sine, cosine])
        query[head] = torch.cat([turn.cos() * sine + turn.sin() * cosine, turn.cos() * cosine - turn.sin() * sine])


def make_model(provider: str, vocabulary: int) -> Pretraining:
    """Both providers start from the same weights."""
    torch.manual_seed(0)
    backbone = pyfused.AlbertBackbone(vocabulary_size=vocabulary, **CONFIG)
    initialise(backbone)
    model = Pretraining(backbone, vocabulary)
    if provider == "torch":
        from transformers import AlbertModel

        with tempfile.TemporaryDirectory() as directory:
            backbone.save_to_preset(directory)
            model.backbone = AlbertModel.from_pretrained(directory)
    return model


def without_pooler(model: pyfused.AlbertBackbone) -> pyfused.AlbertBackbone:
    """The preset's model; see the head of this file."""
    bare = pyfused.AlbertBackbone.from_config(model.get_config() | {"pooler": False})
    for name, module in model.named_children():
        if name != "pooler":
            setattr(bare, name, module)
    return bare


def main() -> None:
    given = arguments(__doc__.split("\n")[0], "albert_tiny_en", 3600)
    documents = chapters(given.text)
    training, held_out = split(documents)
    tokenizer = tokenizer_of(given.tokenizer, lambda: train_tokenizer(training))
    train_tokens, held_tokens = masked.encode(tokenizer, training), masked.encode(tokenizer, held_out)
    print(f"{len(documents)} chapters, {len(train_tokens)} training tokens, {len(held_tokens)} held out", flush=True)
    vocabulary = tokenizer.get_vocab_size()
    model = make_model(given.provider, vocabulary)

    def loss_of(tokens):
        def loss(generator):
            batch, swapped = order(masked.draw(tokens, vocabulary, BATCH, LENGTH, generator), generator)
            logits, orders = model(batch)
            return masked.loss_of(logits, batch) + ORDER_WEIGHT * F.cross_entropy(orders, swapped.long())

        return loss

    depths = iter([1] * round(ALONE * given.steps) + [CONFIG["num_layers"]] * given.steps)
    training_loss, depth = loss_of(train_tokens), 0

    def deepening_loss(generator):
        nonlocal depth
        if (wanted := next(depths)) != depth:
            depth = wanted
            model.deepen(depth)
        return training_loss(generator)

    with torch.no_grad():  # the bias starts at the frequencies, so training need not learn them
        counts = torch.bincount(train_tokens, minlength=vocabulary) + 1.0
        model.head.bias.copy_((counts / counts.sum()).log())
    optimiser = adamw(model, PEAK_RATE)
    curve = train(given.provider, model, deepening_loss, loss_of(held_tokens), given.steps, optimiser)
    write_curve(given.curve, curve)
    generator, orders = torch.Generator().manual_seed(4), []

    def logits_of(batch):
        batch, swapped = order(batch, generator)
        logits, found = model(batch)
        orders.append((found.argmax(-1) == swapped).double().mean().item())
        return logits

    print(masked.evaluate(logits_of, held_tokens, train_tokens, vocabulary, BATCH, LENGTH))
    print(f"held out: order of two halves, accuracy {sum(orders) / len(orders):.1%}")
    if given.save:
        save(without_pooler(model.backbone), tokenizer, given.save, **masked.NAMED)


if __name__ == "__main__":
    main()
