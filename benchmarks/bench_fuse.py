"""transformers' models with random weights before and after pyfused.fuse_: T5 1.1, ALBERT and FNet base, GPT-2 124M."""

import copy

import torch

import pyfused
from pyfused.bench import Case

CACHED = 128


def before_and_after(model, device):
    """The model as transformers makes it, and a fused copy."""
    before = model.to(device).eval()
    after = copy.deepcopy(before)
    pyfused.fuse_(after)
    return {"transformers": before, "pyfused": after}


def exact(model, call):
    """The call's result by a copy of the model in float64."""
    return lambda: call(copy.deepcopy(model).double())


def encoders():
    """Name, model, and the shape of its token ids."""
    import transformers as hf

    sizes = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}
    yield "T5 base encoder", hf.T5EncoderModel(hf.T5Config(**sizes, feed_forward_proj="gated-gelu")), (1, 512)
    base = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    yield "ALBERT base", hf.AlbertModel(hf.AlbertConfig(**base, hidden_dropout_prob=0.0)), (8, 128)
    yield "FNet base", hf.FNetModel(hf.FNetConfig()), (2, 512)


def cases(device):
    import transformers as hf

    torch.manual_seed(0)
    with torch.inference_mode():
        for name, model, shape in encoders():
            ids = torch.randint(1000, shape, device=device)
            models = before_and_after(model, device)
            yield Case(
                f"{name}, {shape[0]} x {shape[1]}",
                {n: lambda m=m, ids=ids: m(ids).last_hidden_state for n, m in models.items()},
                exact(models["transformers"], lambda m, ids=ids: m(ids).last_hidden_state),
                baseline="transformers",
                seconds=20.0,
            )

        models = before_and_after(hf.GPT2LMHeadModel(hf.GPT2Config()), device)
        ids = torch.randint(1000, (1, CACHED), device=device)
        yield Case(
            f"GPT-2 124M, prompt of {CACHED}",
            {n: lambda m=m: m(ids, use_cache=True).logits for n, m in models.items()},
            exact(models["transformers"], lambda m: m(ids).logits),
            baseline="transformers",
            seconds=20.0,
        )
        caches = {n: m(ids, use_cache=True).past_key_values for n, m in models.items()}

        def token(name):
            logits = models[name](ids[:, :1], past_key_values=caches[name], use_cache=True).logits
            caches[name].crop(-1)
            return logits

        yield Case(
            f"GPT-2 124M, one token after {CACHED}",
            {n: lambda n=n: token(n) for n in models},
            exact(models["transformers"], lambda m: m(torch.cat((ids, ids[:, :1]), 1)).logits[:, -1:]),
            baseline="transformers",
            seconds=10.0,
        )
