"""What do the masked-token examples share? The tokeniser, batches with masked tokens, the head, the loss and its baseline.

Masked-token prediction is BERT's training task (Devlin et al. 2019, arXiv:1810.04805, section 3.1). It chooses 15% of each
window's tokens; 80% of these become [MASK], 10% a random token and 10% stay. The model predicts the original tokens. A window
is [CLS], tokens, [SEP]. All windows have one length and one number of chosen tokens, so shapes never change.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPECIAL = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4
PAD, UNKNOWN, CLS, SEP, MASK = range(len(SPECIAL))
NAMED = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP}  # as in config.json
CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1


def train_tokenizer(documents: list[str], vocabulary: int):
    """A SentencePiece unigram model with ALBERT's and FNet's special tokens; `vocabulary` ids at most."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    special = [AddedToken(name, special=True, normalized=False) for name in SPECIAL]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=special, unk_token=SPECIAL[UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(SPECIAL[index], index) for index in (CLS, SEP)],
    )
    return tokenizer


def encode(tokenizer, documents: list[str]) -> Tensor:
    """One row of token ids with all documents, each ended by [SEP]."""
    found = tokenizer.encode_batch(documents, add_special_tokens=False)
    return torch.tensor([t for e in found for t in [*e.ids, SEP]])


@dataclass(frozen=True)
class Batch:
    """ids (B, S) with masked tokens; places (B, K) of the chosen tokens; targets (B, K), the chosen tokens' own ids."""

    ids: Tensor
    places: Tensor
    targets: Tensor

    def chosen(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, S, D) -> those of the chosen tokens, (B, K, D)."""
        return hidden.gather(1, self.places[..., None].expand(-1, -1, hidden.shape[-1]))


def draw(tokens: Tensor, vocabulary: int, rows: int, length: int, generator: torch.Generator) -> Batch:
    """A batch of random windows of `tokens`, B = rows and S = length."""
    starts = torch.randint(len(tokens) - length + 3, (rows,), generator=generator)
    windows = tokens[starts[:, None] + torch.arange(length - 2)]
    ids = F.pad(F.pad(windows, (1, 0), value=CLS), (0, 1), value=SEP)
    order = torch.rand(ids.shape, generator=generator).masked_fill(ids < len(SPECIAL), 2.0).argsort(1)
    places = order[:, : max(1, round(CHOSEN * length))].sort(1).values
    targets = ids.gather(1, places)
    kind = torch.rand(places.shape, generator=generator)
    drawn = torch.randint(len(SPECIAL), vocabulary, places.shape, generator=generator)
    put = torch.where(kind < MASKED, MASK, torch.where(kind < MASKED + RANDOM, drawn, targets))
    return Batch(ids.scatter(1, places, put), places, targets)


class Head(nn.Module):
    """BERT's head: logits = norm(gelu(W h + b)) E^T + c, with the token embedding E (V, width). It trains with the model
    but is not saved in the preset."""

    def __init__(self, hidden_dim: int, width: int, vocabulary: int):
        super().__init__()
        self.dense, self.norm = nn.Linear(hidden_dim, width), nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.normal_(self.dense.weight, 0.0, 0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """hidden (..., hidden_dim), embedding (V, width) -> (..., V)."""
        x = self.norm(F.gelu(self.dense(hidden), approximate="tanh"))
        return F.linear(x, embedding, self.bias)


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of the chosen tokens, in nats. logits (B, K, V)."""
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


@torch.no_grad()
def evaluate(logits_of, tokens: Tensor, training: Tensor, vocabulary: int, rows: int, length: int) -> str:
    """Held-out loss and accuracy in one line, beside a baseline that knows only the tokens' frequencies.

    logits_of: Batch -> (B, K, V). tokens, training: held-out and training tokens.
    """
    counts = torch.bincount(training[training >= len(SPECIAL)], minlength=vocabulary) + 1.0
    frequencies = (counts / counts.sum()).log()
    generator = torch.Generator().manual_seed(3)
    sums, batches = torch.zeros(4, dtype=torch.float64), 64
    for _ in range(batches):
        batch = draw(tokens, vocabulary, rows, length, generator)
        logits = logits_of(batch)
        right = (logits.argmax(-1) == batch.targets).double().mean()
        frequent = (frequencies.argmax() == batch.targets).double().mean()
        sums += torch.stack(
            [loss_of(logits, batch).double(), right, -frequencies[batch.targets].double().mean(), frequent]
        )
    loss, right, unigram, frequent = (sums / batches).tolist()
    return f"held out: loss {loss:.3f}, accuracy {right:.1%}; by frequency alone: loss {unigram:.3f}, accuracy {frequent:.1%}"
