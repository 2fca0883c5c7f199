"""Which statements are read as attention by hand, and which are left alone?"""

import math

import pytest
import torch
import torch.nn.functional as F
from fused_pairs import counted
from torch import nn

from pyfused.integrations.transformers import by_hand
from pyfused.integrations.transformers.scores import by_hand as read
from pyfused.integrations.transformers.statements import source_of


class Usual(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout, self.size, self.extra, self.p = nn.Dropout(0.0), 4, None, 0.0

    def forward(self, q, k, v, mask=None, wanted=False):
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores = scores / math.sqrt(self.size)
        if mask is not None:
            scores = scores + mask
        probabilities = F.softmax(scores, dim=-1)
        probabilities = self.dropout(probabilities)
        context = torch.matmul(probabilities, v)
        return (context, probabilities) if wanted else (context,)


class InOtherWords(Usual):
    def forward(self, q, k, v, mask=None):
        scores = q @ k.transpose(2, 3) / self.size
        scores += torch.arange(5).view(1, 1, 1, 5) * 0.1
        if self.extra is not None:
            scores = self.extra(scores)
        if mask is not None:
            scores = scores.masked_fill(mask != 0, torch.finfo(scores.dtype).min)
        scores = torch.softmax(scores.float(), -1).type_as(q)
        scores = nn.functional.dropout(scores, p=self.p, training=self.training)
        context = (scores @ v).transpose(1, 2)
        return context.transpose(1, 2)


class Flat(Usual):
    num_heads = 2

    def forward(self, q, k, v, mask=None):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2) / self.size)
        if scores.size() != (q.shape[0], q.shape[1], k.shape[1]):
            raise ValueError(f"{scores.size()}")
        if mask is not None:
            scores = scores.view(-1, 2, scores.size(-2), scores.size(-1)) + mask
            scores = torch.max(scores, torch.full((), torch.finfo(scores.dtype).min, dtype=scores.dtype))
            scores = scores.view(-1, scores.size(-2), scores.size(-1))
        if scores.dtype == torch.float16:
            weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(torch.float16)
        else:
            weights = F.softmax(scores, dim=-1)
        context = torch.bmm(weights, v)
        return context.view(-1, 2, q.shape[1], v.shape[2])


class ScalesTheMask(Usual):
    def forward(self, q, k, v, mask=None):
        scores = torch.matmul(q, k.transpose(-1, -2))
        if mask is not None:
            scores = scores + mask
        scores = scores + torch.arange(5).view(1, 1, 1, 5) * 0.1
        scores = scores / self.size
        probabilities = nn.Softmax(dim=-1)(scores)
        context = torch.matmul(probabilities, v)
        return context


class Chooses(Usual):
    """Behind the mask of one query nothing is left."""

    def forward(self, q, k, v, mask=None):
        scores = torch.matmul(q, k.transpose(-1, -2))
        visible = torch.ones(3, 5, dtype=torch.bool).tril(1)
        least = torch.finfo(scores.dtype).min
        least = torch.tensor(least, dtype=scores.dtype, device=scores.device)
        scores = torch.where(visible, scores, least)
        if mask is not None:
            scores = scores + mask
        probabilities = F.softmax(scores, dim=-1)
        context = torch.matmul(probabilities, v)
        return context


class ReadsTheScores(Usual):
    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2))
        probabilities = F.softmax(scores, dim=-1)
        return torch.matmul(probabilities, v) + scores.sum()


class ReadsTheProbabilities(Usual):
    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2))
        probabilities = F.softmax(scores, dim=-1)
        context = torch.matmul(probabilities, v)
        return context * probabilities.amax()


class ReadsThemBesideTheProduct(Usual):
    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2))
        probabilities = F.softmax(scores, dim=-1)
        context = torch.matmul(probabilities, v) * probabilities.amax()
        return context


class BringsItsSumAlong(Usual):
    def forward(self, q, k, v, mask):
        scores = mask.baddbmm(batch1=q, batch2=k, beta=1.0, out=None)
        probabilities = F.softmax(scores, dim=-1)
        context = torch.bmm(probabilities, v)
        return context


class OverAnotherDimension(Usual):
    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2))
        probabilities = F.softmax(scores, dim=-2)
        context = torch.matmul(probabilities, v)
        return context


class Subtracts(Usual):
    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores = scores - 1.0 / scores
        context = torch.matmul(F.softmax(scores, dim=-1), v)
        return context


class ChoosesAnotherNumber(Usual):
    def forward(self, q, k, v, visible):
        scores = torch.matmul(q, k.transpose(-1, -2))
        least = torch.finfo(scores.dtype).min
        least = least * 0.0
        scores = torch.where(visible, scores, least)
        probabilities = F.softmax(scores, dim=-1)
        context = torch.matmul(probabilities, v)
        return context


class ChoosesTheOthers(Usual):
    def forward(self, q, k, v, visible):
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores = torch.where(visible, torch.finfo(scores.dtype).min, scores)
        probabilities = F.softmax(scores, dim=-1)
        context = torch.matmul(probabilities, v)
        return context


class AnotherSoftmax(Usual):
    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2))
        probabilities = nn.Softmax(dim=-2)(scores)
        context = torch.matmul(probabilities, v)
        return context


class ScalesInOneCase(Usual):
    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2))
        if self.size > 3:
            scores = scores / 2.0
        probabilities = F.softmax(scores, dim=-1)
        context = torch.matmul(probabilities, v)
        return context


class ChangesTheQueries(Usual):
    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2))
        q = q * 2.0
        probabilities = F.softmax(scores, dim=-1)
        context = torch.matmul(probabilities, v)
        return context + q


class ChangesTheScale(Usual):
    def forward(self, q, k, v, scale=0.5):
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        scale = 7.0
        probabilities = F.softmax(scores, dim=-1)
        context = torch.matmul(probabilities, v)
        return context + scale


class HidesByANumber(Usual):
    def forward(self, q, k, v, mask):
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores = scores.masked_fill(mask != 0, -1.0)
        probabilities = F.softmax(scores, dim=-1)
        context = torch.matmul(probabilities, v)
        return context


class KeepsTheProbabilities(Usual):
    def forward(self, q, k, v):
        global kept
        scores = torch.matmul(q, k.transpose(-1, -2))
        kept = F.softmax(scores, dim=-1)
        context = torch.matmul(kept, v)
        return context


class DropsTwice(Usual):
    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-1, -2))
        probabilities = F.softmax(scores, dim=-1)
        probabilities = self.dropout(probabilities)
        probabilities = self.dropout(probabilities)
        context = torch.matmul(probabilities, v)
        return context


LEFT = [
    ReadsTheScores,
    ReadsTheProbabilities,
    OverAnotherDimension,
    Subtracts,
    ChoosesAnotherNumber,
    ChoosesTheOthers,
    AnotherSoftmax,
    ScalesInOneCase,
    ChangesTheQueries,
]
LEFT += [
    ReadsThemBesideTheProduct,
    BringsItsSumAlong,
    ChangesTheScale,
    HidesByANumber,
    KeepsTheProbabilities,
    DropsTwice,
]


@pytest.mark.parametrize("kind", LEFT)
def test_other_statements_are_left(kind):
    assert read(source_of(kind.forward)) is None
    assert isinstance(by_hand._attention(kind()), str)


@pytest.mark.parametrize("kind", [Usual, InOtherWords, Flat, ScalesTheMask, Chooses])
@pytest.mark.parametrize("masked", [False, True])
def test_statements_that_are_taken(kind, masked, monkeypatch):
    counts = counted(monkeypatch, by_hand, "attend")
    module = kind().eval()
    forward = by_hand._attention(module)
    q, k, v = (torch.randn(2, 2, n, 4) for n in (3, 5, 5))
    hidden = torch.tensor([[0.0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]).view(2, 1, 1, 5)
    given = hidden if kind is InOtherWords else hidden * torch.finfo(torch.float32).min
    given = given.expand(2, 1, 3, 5) if masked else None
    expected = module(q, k, v, given)
    torch.testing.assert_close(forward(module, q, k, v, given), expected)
    assert counts == {"attend": 1}
