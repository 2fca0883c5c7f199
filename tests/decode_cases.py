"""Which plans and steps reach every path of decode's kernels? Random ones, without a model."""

import torch

from pyfused.decode_plan import DecodeLayer, DecodePlan, DecodeStep, Matrix, Norm
from pyfused.weight_format import FORMATS

VOCABULARY = 203


def made(new, rows, keys, **options):
    """A plan of two layers and a step that can be repeated: it writes the same places again. `new` is operator_calls.Numbers.

    options: hidden, heads, kv_heads, head_size, inner: sizes. relative: T5's bias. gated, rms, bias: as a plan says.
    integers: the format of the weights, "int8" or "int4". columns: the layers' weights are stored transposed.
    sources: with cross-attention to `source_length` keys each. uneven: each row has its own place. mask: hide some keys.
    """
    given = {"hidden": 96, "heads": 4, "kv_heads": 4, "head_size": 24, "inner": 160, "source_length": 70} | options
    hidden, heads, kv_heads, d = (given[name] for name in ("hidden", "heads", "kv_heads", "head_size"))
    has = {name: bool(given.get(name)) for name in ("relative", "gated", "rms", "bias", "sources", "uneven", "mask", "columns")}

    def matrix(n, k, columns=has["columns"]):
        bias = new(n, scale=0.3) if has["bias"] else None
        weight = new(k, n, scale=k**-0.5).t() if columns else new(n, k, scale=k**-0.5)
        if "integers" not in given:
            return Matrix(weight, bias)
        integers, scale = FORMATS[given["integers"]].quantized(weight)
        return Matrix(integers, bias, scale)

    def norm():
        return Norm(1 + new(hidden, scale=0.2), None if has["rms"] else new(hidden, scale=0.2), 1e-5)

    def layer():
        found = DecodeLayer(
            norm(), matrix(heads * d, hidden), matrix(kv_heads * d, hidden), matrix(kv_heads * d, hidden),
            matrix(hidden, heads * d), norm(), matrix(given["inner"], hidden), matrix(hidden, given["inner"]),
            scale=d**-0.5,
        )  # fmt: skip
        if has["gated"]:
            found = found._replace(gate=matrix(given["inner"], hidden))
        if has["sources"]:
            cross = {"cross_query": matrix(heads * d, hidden), "cross_output": matrix(hidden, heads * d)}
            found = found._replace(cross_norm=norm(), cross_scale=d**-0.5, **cross)
        return found

    layers, tokens = (layer(), layer()), matrix(VOCABULARY, hidden, False)._replace(bias=None)
    plan = DecodePlan(
        layers, tokens, tokens, norm(), heads, kv_heads, d, has["rms"], "gelu_tanh",
        position_embedding=Matrix() if has["relative"] else Matrix(new(keys + 9, hidden)),
        bias_table=new(16, heads) if has["relative"] else None, max_distance=40,
    )  # fmt: skip
    device, capacity = new.device, keys + 9
    places = (
        torch.tensor([(keys - 1) * (row + 1) // rows for row in range(rows)], device=device) if has["uneven"] else None
    )
    sources = given.get("sources", 0)
    step = DecodeStep(
        tokens=torch.arange(rows, device=device) * 17 % VOCABULARY,
        places=places,
        position_ids=None,
        mask=new.mask(rows, keys) if has["mask"] else None,
        place=keys - 1,
        most=keys,
        caches=[new(rows, kv_heads, capacity, d) for _ in range(4)],
        cross=[new(sources, heads, given["source_length"], d) for _ in range(4)] if sources else [],
        cross_mask=new.mask(sources, given["source_length"]) if sources else None,
        choose=True,
    )
    return plan, step


def written(step):
    """The new keys and values of a step."""
    rows = torch.arange(len(step.tokens), device=step.tokens.device)
    places = step.places if step.places is not None else torch.full_like(rows, step.place)
    return [t[rows, :, places] for t in step.caches]


# (rows, keys), options
CASES = {
    "one row": ((1, 300), {"bias": True}),
    "short": ((2, 1), {"bias": True, "hidden": 51, "heads": 3, "kv_heads": 1, "head_size": 17, "inner": 77}),
    "uneven": ((3, 150), {"bias": True, "uneven": True, "mask": True, "kv_heads": 2}),
    "int8": ((4, 40), {"integers": "int8", "bias": True, "head_size": 64, "hidden": 1040, "inner": 48}),
    "relative": ((8, 90), {"relative": True, "rms": True, "gated": True, "sources": 2, "inner": 1100, "uneven": True}),
    "wide head": (
        (1, 200),
        {"rms": True, "heads": 1, "kv_heads": 1, "head_size": 136, "sources": 1, "source_length": 300},
    ),
    "columns": ((1, 70), {"columns": True, "bias": True, "hidden": 104, "head_size": 26, "inner": 1104}),
    "odd columns": (
        (3, 20),
        {"columns": True, "bias": True, "hidden": 51, "heads": 3, "kv_heads": 1, "head_size": 17, "inner": 277},
    ),
    "gated columns": (
        (8, 40),
        {"columns": True, "relative": True, "rms": True, "gated": True, "sources": 2, "inner": 1096, "uneven": True},
    ),
    # With the first, all that csrc/cuda has a kernel of its own for: see Form in decode_product.cuh.
    "plain columns": ((2, 70), {"columns": True, "bias": True, "inner": 1104}),
    "own sources": ((3, 40), {"relative": True, "rms": True, "gated": True, "sources": 3, "inner": 200}),
    "grouped": ((5, 70), {"heads": 6, "kv_heads": 1, "head_size": 8, "gated": True, "integers": "int8", "mask": True}),
}
