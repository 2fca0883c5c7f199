"""How was the bundled preset t5_tiny_en made? Trains it from scratch by span corruption, on a CPU (see tiny_en.py).

    python examples/train_t5_tiny_en.py --text kjv.txt --provider pyfused --save pyfused/presets/t5_tiny_en

Span corruption is T5's training task (Raffel et al. 2020, section 3.3.4). Sentinels <extra_id_k> replace one to four spans of
a window, 3 tokens on average. The target is each sentinel with the tokens it replaced, in order, and one more sentinel.
"""

import tempfile

import torch
import torch.nn.functional as F
from tiny_en import arguments, chapters, save, split, tokenizer_of, train, write_curve

import pyfused

PAD, END, UNKNOWN, SENTINELS = 0, 1, 2, 32
VOCABULARY = 2048  # at most: a short text has fewer pieces
CONFIG = {
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "hidden_dim": 128,
    "intermediate_dim": 256,
    "activation": "gelu_new",
    "use_gated_activation": True,
    "dropout": 0.0,
    "tie_embedding_weights": True,
}
BATCH, LENGTH, SPANS, SPAN, PEAK_RATE = 8, 64, 4, 3.0, 2e-2


def train_tokenizer(documents: list[str]):
    """A SentencePiece unigram model like T5's but smaller: pad, end, unknown, pieces, <extra_id_31> to <extra_id_0>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY - SENTINELS,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    sentinels = [AddedToken(f"<extra_id_{k}>", special=True, normalized=False) for k in reversed(range(SENTINELS))]
    tokenizer.add_special_tokens(sentinels)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
    )
    return tokenizer


def encode(tokenizer, documents: list[str]) -> torch.Tensor:
    """One row of token ids with all documents, each ended by the end token."""
    return torch.tensor([t for e in tokenizer.encode_batch(documents) for t in e.ids])


def corrupt(window: list[int], vocabulary: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """(source, target) of one window. Spans do not touch; their number, lengths and places are random."""
    spans = int(torch.randint(1, SPANS + 1, (), generator=generator))
    lengths = torch.poisson(torch.full((spans,), SPAN - 1.0), generator=generator).int().add(1).clamp(max=8).tolist()
    free = len(window) - sum(lengths) - (spans - 1)
    gaps = torch.sort(torch.randint(free + 1, (spans,), generator=generator)).values.tolist()
    source, target, end, moved = [], [], 0, 0
    for k, (gap, length) in enumerate(zip(gaps, lengths)):
        start = gap + moved
        sentinel = vocabulary - 1 - k
        source += [*window[end:start], sentinel]
        target += [sentinel, *window[start : start + length]]
        end, moved = start + length, moved + length + 1
    source += window[end:]
    return [*source, END], [*target, vocabulary - 1 - spans, END]


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def batch(tokens: torch.Tensor, vocabulary: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(sources padded with PAD, targets padded with -100) of BATCH random windows."""
    starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=generator)
    pairs = [corrupt(tokens[i : i + LENGTH].tolist(), vocabulary, generator) for i in starts.tolist()]
    return padded([source for source, _ in pairs], PAD), padded([target for _, target in pairs], -100)


def make_model(provider: str, vocabulary: int):
    """(module, function from sources and targets to logits); both providers start from the same weights."""
    torch.manual_seed(0)
    backbone = pyfused.T5Backbone(vocabulary_size=vocabulary, **CONFIG)
    if provider == "pyfused":

        def logits(source, target):
            shifted = F.pad(target[:, :-1].clamp(min=0), (1, 0), value=PAD)
            out = backbone(
                encoder_token_ids=source,
                encoder_padding_mask=source != PAD,
                decoder_token_ids=shifted,
                decoder_padding_mask=torch.ones_like(shifted),
            )
            return backbone.logits(out["decoder_sequence_output"])

        return backbone, logits
    from transformers import T5ForConditionalGeneration

    with tempfile.TemporaryDirectory() as directory:
        backbone.save_to_preset(directory)
        model = T5ForConditionalGeneration.from_pretrained(directory)
    return model, lambda source, target: model(source, attention_mask=source != PAD, labels=target).logits


def main() -> None:
    given = arguments(__doc__.split("\n")[0], "t5_tiny_en", 3500)
    documents = chapters(given.text)
    training, held_out = split(documents)
    tokenizer = tokenizer_of(given.tokenizer, lambda: train_tokenizer(training))
    train_tokens, held_tokens = encode(tokenizer, training), encode(tokenizer, held_out)
    print(f"{len(documents)} chapters, {len(train_tokens)} training tokens, {len(held_tokens)} held out", flush=True)
    vocabulary = tokenizer.get_vocab_size()
    model, logits = make_model(given.provider, vocabulary)

    def loss_of(tokens):
        def loss(generator):
            source, target = batch(tokens, vocabulary, generator)
            return F.cross_entropy(logits(source, target).flatten(0, 1), target.flatten(), ignore_index=-100)

        return loss

    # T5's own optimiser: its rate is relative to a parameter's size, and T5's sizes differ by a factor of hundreds. It scales
    # whole matrices, and pyfused keeps query, key and value in one: the providers differ after the first step.
    optimiser = torch.optim.Adafactor(model.parameters(), lr=PEAK_RATE)
    curve = train(given.provider, model, loss_of(train_tokens), loss_of(held_tokens), given.steps, optimiser)
    write_curve(given.curve, curve)
    if given.save:
        save(model, tokenizer, given.save, pad_token_id=PAD, eos_token_id=END)


if __name__ == "__main__":
    main()
