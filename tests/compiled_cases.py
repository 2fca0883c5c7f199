"""Which models do the compile, export and training tests use? A tiny one of each family, and its inputs."""

import torch

import pyfused

FAMILIES = ("gpt2", "albert", "t5", "fnet")


def backbone(name, dtype=torch.float32, dropout=0.0, **options):
    """A tiny backbone of a family, with seeded weights large enough to matter."""
    torch.manual_seed(3)
    sizes = {"vocabulary_size": 61, "num_layers": 2, "hidden_dim": 24, "intermediate_dim": 40, "dropout": dropout}
    if name != "fnet":
        sizes["num_heads"] = 4
    if name == "albert":
        sizes |= {"num_layers": 3, "embedding_dim": 12, "num_inner_repetitions": 2}
    if name == "t5":
        sizes["activation"] = "gelu_new"  # smooth: a relu's gradient jumps where rounding changes a sign
    else:
        sizes["max_sequence_length"] = 48
    kind = {
        "gpt2": pyfused.GPT2Backbone,
        "albert": pyfused.AlbertBackbone,
        "t5": pyfused.T5Backbone,
        "fnet": pyfused.FNetBackbone,
    }[name]
    model = kind(**{**sizes, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif name != "t5":
                parameter.mul_(8.0)  # a spread of 0.02 leaves every score near 0 and would hide a wrong mask
    return model.to(dtype)


def inputs(name, batch, length, masked=True, seed=0):
    """A batch's inputs, as a dict; T5's target is two tokens longer than its source."""
    new = torch.Generator().manual_seed(1000 * seed + 50 * batch + length)
    ids = torch.randint(61, (batch, length), generator=new)
    mask = torch.rand(batch, length, generator=new) > 0.3 if masked else None
    if name == "gpt2":
        return {"token_ids": ids, "padding_mask": mask}
    if name == "t5":
        target = torch.randint(61, (batch, length + 2), generator=new)
        target_mask = torch.rand(batch, length + 2, generator=new) > 0.3 if masked else None
        return {
            "encoder_token_ids": ids,
            "encoder_padding_mask": mask,
            "decoder_token_ids": target,
            "decoder_padding_mask": target_mask,
        }
    segments = torch.randint(2, (batch, length), generator=new)
    found = {"token_ids": ids, "segment_ids": segments}
    return found if name == "fnet" else {**found, "padding_mask": mask}


def results(found):
    """A model's outputs as a tuple of tensors."""
    return (found,) if isinstance(found, torch.Tensor) else tuple(found.values())


def loss_of(found):
    """A scalar that depends on every element of every output, with uneven weights; a mean over the batch's rows."""
    total = torch.zeros((), dtype=torch.float64)
    for out in results(found):
        rows = out.double().flatten(1)
        total = total + (rows @ torch.linspace(-1.0, 1.0, rows.shape[1], dtype=torch.float64)).mean()
    return total


def gradients(model, found):
    """{parameter name: gradient} of loss_of(found); clears the model's .grad before and after."""
    model.zero_grad()
    loss_of(found).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads
