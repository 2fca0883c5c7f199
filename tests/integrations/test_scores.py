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


S = "scores = torch.matmul(q, k.transpose(-1, -2))"
P = "probabilities = F.softmax(scores, dim=-1)"
C = "context = torch.matmul(probabilities, v)"
R = "return context"
LEFT = {
    "reads the scores": (S, P, "return torch.matmul(probabilities, v) + scores.sum()"),
    "reads the probabilities": (S, P, C, "return context * probabilities.amax()"),
    "reads them beside the product": (S, P, C + " * probabilities.amax()", R),
    "brings its sum along": (
        "scores = mask.baddbmm(batch1=q, batch2=k, beta=1.0, out=None)", P, "context = torch.bmm(probabilities, v)", R,
    ),
    "over another dimension": (S, "probabilities = F.softmax(scores, dim=-2)", C, R),
    "another softmax": (S, "probabilities = nn.Softmax(dim=-2)(scores)", C, R),
    "subtracts": (S, "scores = scores - 1.0 / scores", "context = torch.matmul(F.softmax(scores, dim=-1), v)", R),
    "chooses another number": (
        S, "least = torch.finfo(scores.dtype).min", "least = least * 0.0", "scores = torch.where(mask, scores, least)", P, C, R,
    ),
    "chooses the others": (S, "scores = torch.where(mask, torch.finfo(scores.dtype).min, scores)", P, C, R),
    "scales in one case": (S, "if self.size > 3:", "    scores = scores / 2.0", P, C, R),
    "changes the queries": (S, "q = q * 2.0", P, C, "return context + q"),
    "changes the scale": (S + " * scale", "scale = 7.0", P, C, "return context + scale"),
    "hides by a number": (S, "scores = scores.masked_fill(mask != 0, -1.0)", P, C, R),
    "keeps the probabilities": ("global kept", S, "kept = F.softmax(scores, dim=-1)", "context = torch.matmul(kept, v)", R),
    "drops twice": (S, P, *["probabilities = self.dropout(probabilities)"] * 2, C, R),
}  # fmt: skip


HEAD = """import torch
import torch.nn.functional as F
from torch import nn
class Written(Usual):
    def forward(self, q, k, v, mask=None, scale=0.5):
        """


def written(path, *statements):
    """A class with these statements, in a file: they are read from there."""
    path.write_text(HEAD + "\n        ".join(statements))
    made = {}
    exec(compile(path.read_text(), path, "exec"), globals(), made)
    return made["Written"]


@pytest.mark.parametrize("name", LEFT)
def test_other_statements_are_left(name, tmp_path):
    kind = written(tmp_path / "left.py", *LEFT[name])
    assert read(source_of(kind.forward)) is None
    assert isinstance(by_hand._attention(kind()), str)
    assert read(source_of(written(tmp_path / "taken.py", S, P, C, R).forward))


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
