"""How was the bundled preset fnet_tiny_en made? Trains it from scratch by masked-token prediction, on a CPU (see tiny_en.py).

    python examples/train_fnet_tiny_en.py --text kjv.txt --provider pyfused --save pyfused/presets/fnet_tiny_en

A batch's windows have one length, which changes from batch to batch: each length has its own Fourier transform. In a window,
tokens after the end of a chapter are segment 1. There is no dropout, so the two runs are comparable step by step. The preset
leaves out the head, and there is no pooler, because nothing would train it.
"""

import tempfile

import masked_tokens as masked
import torch
from tiny_en import adamw, arguments, chapters, save, split, tokenizer_of, train, write_curve

import pyfused

VOCABULARY = 2048  # at most: a short text has fewer pieces
CONFIG = {
    "num_layers": 4,
    "hidden_dim": 128,
    "intermediate_dim": 512,
    "max_sequence_length": 64,
    "num_segments": 2,
    "dropout": 0.0,
    "pooler": False,
}
TOKENS, SHORTEST, LONGEST, PEAK_RATE = 1024, 8, 64, 2e-3  # tokens per batch; tokens per window


def segments(ids: torch.Tensor) -> torch.Tensor:
    """(B, S): 0 up to the first [SEP], then 1."""
    ends = ids == masked.SEP
    return (ends.cumsum(1) - ends.long()).clamp(max=1)


def make_model(provider: str, vocabulary: int):
    """(backbone, function from ids to hidden states, token embedding); both providers start from the same weights."""
    torch.manual_seed(0)
    backbone = pyfused.FNetBackbone(vocabulary_size=vocabulary, **CONFIG)
    if provider == "pyfused":

        def hidden(ids):
            return backbone(token_ids=ids, segment_ids=segments(ids))["sequence_output"]

        return backbone, hidden, backbone.token_embedding.weight
    from transformers import FNetModel

    with tempfile.TemporaryDirectory() as directory:
        backbone.save_to_preset(directory)
        model = FNetModel.from_pretrained(directory, add_pooling_layer=False)

    def hidden_of(ids):
        return model(ids, token_type_ids=segments(ids)).last_hidden_state

    return model, hidden_of, model.embeddings.word_embeddings.weight


def main() -> None:
    given = arguments(__doc__.split("\n")[0], "fnet_tiny_en", 4000)
    documents = chapters(given.text)
    training, held_out = split(documents)
    tokenizer = tokenizer_of(given.tokenizer, lambda: masked.train_tokenizer(training, VOCABULARY))
    train_tokens, held_tokens = masked.encode(tokenizer, training), masked.encode(tokenizer, held_out)
    print(f"{len(documents)} chapters, {len(train_tokens)} training tokens, {len(held_tokens)} held out", flush=True)
    vocabulary = tokenizer.get_vocab_size()
    model, hidden, embedding = make_model(given.provider, vocabulary)
    head = masked.Head(CONFIG["hidden_dim"], CONFIG["hidden_dim"], vocabulary)

    def logits_of(batch):
        return head(batch.chosen(hidden(batch.ids)), embedding)

    def loss_of(tokens):
        def loss(generator):
            length = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=generator))
            batch = masked.draw(tokens, vocabulary, TOKENS // length, length, generator)
            return masked.loss_of(logits_of(batch), batch)

        return loss

    both = torch.nn.ModuleList([model, head])
    optimiser = adamw(both, PEAK_RATE)
    curve = train(given.provider, both, loss_of(train_tokens), loss_of(held_tokens), given.steps, optimiser)
    write_curve(given.curve, curve)
    rows = TOKENS // LONGEST
    print(masked.evaluate(logits_of, held_tokens, train_tokens, vocabulary, rows, LONGEST), flush=True)
    if given.save:
        save(model, tokenizer, given.save, **masked.NAMED)


if __name__ == "__main__":
    main()
