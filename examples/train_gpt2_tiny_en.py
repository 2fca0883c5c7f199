"""How was the bundled preset gpt2_tiny_en made? Trains it from scratch on public-domain English, on a CPU (see tiny_en.py).

    python examples/train_gpt2_tiny_en.py --text kjv.txt --provider pyfused --save pyfused/presets/gpt2_tiny_en
    python examples/train_gpt2_tiny_en.py --text kjv.txt --provider torch
    python examples/train_gpt2_tiny_en.py --plot

There is no dropout, so the two runs are comparable step by step.
"""

import tempfile

import torch
import torch.nn.functional as F
from tiny_en import adamw, arguments, chapters, save, split, tokenizer_of, train, write_curve

import pyfused

END = "<|endoftext|>"
CONFIG = {
    "vocabulary_size": 2048,
    "num_layers": 4,
    "num_heads": 4,
    "hidden_dim": 160,
    "intermediate_dim": 640,
    "max_sequence_length": 256,
    "dropout": 0.0,
}
BATCH, LENGTH, PEAK_RATE = 8, 256, 2e-3


def train_tokenizer(documents: list[str], vocabulary_size: int):
    """Byte-level BPE like GPT-2's but smaller, trained on the documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer, documents: list[str]) -> torch.Tensor:
    """One row of token ids with all documents, each ended by the end-of-text token."""
    end = tokenizer.token_to_id(END)
    return torch.tensor([t for e in tokenizer.encode_batch(documents) for t in [*e.ids, end]])


def batch(tokens: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets), each (BATCH, LENGTH): random windows, targets one token ahead."""
    starts = torch.randint(len(tokens) - LENGTH - 1, (BATCH,), generator=generator)
    windows = tokens[starts[:, None] + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


def make_model(provider: str):
    """(module, function from token ids to logits); both providers start from the same weights."""
    torch.manual_seed(0)
    backbone = pyfused.GPT2Backbone(**CONFIG)
    if provider == "pyfused":
        mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)

        def logits(ids):
            hidden = backbone(token_ids=ids, padding_mask=mask[: len(ids)])
            return backbone.token_embedding(hidden, reverse=True)

        return backbone, logits
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as directory:
        backbone.save_to_preset(directory)
        model = GPT2LMHeadModel.from_pretrained(directory)
    return model, lambda ids: model(ids, use_cache=False).logits


def main() -> None:
    given = arguments(__doc__.split("\n")[0], "gpt2_tiny_en", 1500)
    documents = chapters(given.text)
    training, held_out = split(documents)
    tokenizer = tokenizer_of(given.tokenizer, lambda: train_tokenizer(training, CONFIG["vocabulary_size"]))
    train_tokens, held_tokens = encode(tokenizer, training), encode(tokenizer, held_out)
    print(f"{len(documents)} chapters, {len(train_tokens)} training tokens, {len(held_tokens)} held out", flush=True)
    model, logits = make_model(given.provider)

    def loss_of(tokens):
        def loss(generator):
            ids, targets = batch(tokens, generator)
            return F.cross_entropy(logits(ids).flatten(0, 1), targets.flatten())

        return loss

    curve = train(
        given.provider, model, loss_of(train_tokens), loss_of(held_tokens), given.steps, adamw(model, PEAK_RATE)
    )
    write_curve(given.curve, curve)
    if given.save:
        end = tokenizer.token_to_id(END)
        save(model, tokenizer, given.save, bos_token_id=end, eos_token_id=end)


if __name__ == "__main__":
    main()
