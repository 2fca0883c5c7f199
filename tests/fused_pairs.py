"""What do the tests of fused transformers models compare with? The same weights unfused, in the same dtype and in float64."""

import copy

import draws
import torch
from torch import nn

import pyfused


class Trio:
    """One model three times: fused, plain, and plain in float64 (the truth).

    dtype None keeps the model's. options: fuse_'s. `vary` moves norms and biases away from ones and zeros, so that a missing
    one shows.
    """

    def __init__(self, model, dtype=torch.float32, **options):
        self.plain = vary(model).eval()
        self.plain = self.plain if dtype is None else self.plain.to(dtype)
        self.truth = copy.deepcopy(self.plain).double()
        self.fused = copy.deepcopy(self.plain)
        self.report = pyfused.fuse_(self.fused, **options)
        self.first = None  # the weights of the first draw

    @property
    def models(self):
        return self.fused, self.plain, self.truth

    def outputs(self, **inputs):
        """The three outputs by name, each a dict of tensors."""
        return [tensors(model(**like(model, inputs))) for model in self.models]

    def check(self, live=None, **inputs):
        """Applies the tolerance rule to every tensor of the output; `live` (B, S) picks the rows to compare."""

        def once():
            with torch.no_grad():
                fused, plain, truth = self.outputs(**inputs)
            assert fused.keys() == plain.keys() == truth.keys()
            for name in fused:
                assert fused[name].dtype == plain[name].dtype, name
            truth = {name: t.double() for name, t in truth.items()}  # transformers' losses may be float32
            return {name: [rows(t[name], live) for t in (fused, plain, truth)] for name in fused}

        return self._judge(once)

    def check_gradients(self, loss, **inputs):
        """Applies the tolerance rule to the gradients of all parameters; `loss` maps an output to a number."""

        def once():
            for model in self.models:
                model.zero_grad()
                loss(model(**like(model, inputs))).backward()
            fused, plain, truth = (
                {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
                for model in self.models
            )
            assert fused.keys() == plain.keys() == truth.keys()
            return {name: [fused[name], plain[name], truth[name]] for name in fused}

        return self._judge(once)

    def check_autocast(self, **inputs):
        """Outputs have the plain model's dtype. Outputs and gradients meet the tolerance rule."""

        def once():
            found = []
            for model in self.models:
                model.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=model is not self.truth):
                    output = model(**like(model, inputs)).last_hidden_state
                output.double().square().mean().backward()
                found.append([output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
            assert found[0][0].dtype == found[1][0].dtype
            assert {len(tensors) for tensors in found} == {len(found[0])}
            return dict(enumerate(zip(*found)))

        return self._judge(once)

    def _judge(self, once):
        """The models are small, so the rule judges several draws of the weights. Returns the first draw's fused results."""
        first = {}

        def moved():
            if first:
                self._move_weights()
            compared = once()
            first.update({name: fused for name, (fused, _, _) in compared.items() if name not in first})
            for name, (fused, plain, _) in compared.items():
                assert fused.is_floating_point() or torch.equal(fused, plain), name
            return {name: found for name, found in compared.items() if found[0].is_floating_point()}

        draws.check(moved)
        return first

    def _move_weights(self):
        """Away from the first ones, not from the last: weights that wander grow, and one draw would decide alone."""
        with torch.no_grad():
            self.first = self.first or [p.clone() for p in self.fused.parameters()]
            for first, fused, plain, truth in zip(self.first, *(model.parameters() for model in self.models)):
                fused.copy_(first * (1 + 0.1 * torch.randn_like(first)))
                plain.copy_(fused)
                truth.copy_(fused)


class Doubled(nn.Linear):
    """Stands for LoRA and quantised layers, which replace a layer after fuse_."""

    def forward(self, x):
        return 2 * super().forward(x)


def check_changed_child(trio, block_of, place, **inputs):
    """A child of a block, replaced if it is a linear layer and then hooked, is called by all three models.

    block_of: model -> the block.
    """
    seen = []

    def hook(module, args, output):
        seen.append(module)
        return (1.5 * output[0], *output[1:]) if isinstance(output, tuple) else 1.5 * output

    for model in trio.models:
        block = block_of(model)
        child = block.get_submodule(place)
        if isinstance(child, nn.Linear):
            sizes = child.in_features, child.out_features, child.bias is not None
            other = Doubled(*sizes, dtype=child.weight.dtype)
            other.load_state_dict(child.state_dict())
            block.set_submodule(place, other)
        block.get_submodule(place).register_forward_hook(hook)
    trio.check(**inputs)
    assert len(set(seen)) == 3


def check_dropout(trio, **inputs):
    """Means over many equal rows differ from the plain model's no more than two plain means do; p = 0 is exact."""
    with torch.no_grad():
        still = trio.fused(**inputs).last_hidden_state[0]
        means = [model.train()(**inputs).last_hidden_state.mean(0) for model in (trio.fused, trio.plain, trio.plain)]
    noise = (means[1] - means[2]).std()
    assert (means[0] - means[1]).std() < 1.5 * noise
    assert noise < (means[0] - still).abs().max()  # dropout was on
    for module in trio.fused.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif type(module).__name__ == "T5Attention":
            module.dropout = 0.0
    with torch.no_grad():
        assert torch.equal(trio.fused(**inputs).last_hidden_state[0], still)


def check_same_in_training(fused, plain, *args, **options):
    """With the same random numbers."""
    outputs = []
    for module in (fused.train(), plain.train()):
        torch.manual_seed(0)
        outputs.append(module(*args, **options))
    torch.testing.assert_close(*outputs)


def check_resized(trio, size, **inputs):
    """A larger vocabulary, whose new rows are the same in all three models."""
    for model in trio.models:
        torch.manual_seed(0)
        old, width = model.get_input_embeddings().weight.shape
        model.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[old:] = torch.randn(size - old, width).to(model.dtype)
    trio.check(**inputs)


def counted(monkeypatch, file, *names):
    """Counts the calls of the named functions in one of pyfused's files from now on."""
    counts = dict.fromkeys(names, 0)

    def counting(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(file, name, counting(name, getattr(file, name)))
    return counts


def gradients(model, loss, reentrant):
    """The parameters' gradients with checkpointing: the backward computes each layer again."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.zero_grad()
    loss(model).backward()
    model.gradient_checkpointing_disable()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def vary(model):
    """Adds noise to vectors (norms, biases), which are ones and zeros at first."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def like(model, inputs):
    """The inputs with floats in the model's dtype and caches copied."""

    def one(x):
        if isinstance(x, torch.Tensor):
            return x.to(model.dtype) if x.is_floating_point() else x
        if isinstance(x, tuple):
            return tuple(one(item) for item in x)
        return copy.deepcopy(x)

    return {name: one(x) for name, x in inputs.items()}


def tensors(output, prefix=""):
    """Every tensor of an output, caches too, by its path."""
    if isinstance(output, torch.Tensor):
        return {prefix or "output": output}
    if output is None or isinstance(output, (int, float, str)):
        return {}
    if hasattr(output, "self_attention_cache"):
        output = {"self": output.self_attention_cache, "cross": output.cross_attention_cache}
    elif hasattr(output, "layers"):
        output = [(layer.keys, layer.values) for layer in output.layers]
    items = output.items() if hasattr(output, "items") else enumerate(output)
    return {name: t for key, value in items for name, t in tensors(value, f"{prefix}.{key}".strip(".")).items()}


def rows(tensor, live):
    if live is not None and tensor.dim() >= 3 and tensor.shape[:2] == live.shape:
        return tensor[live.bool()]
    return tensor


def padded(batch, length, vocabulary, side="right", seed=0):
    """Token ids (B, S) and the mask; each sample is shorter than the one before, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    for i in range(batch):
        gone = i * length // (2 * batch)
        if gone:
            mask[i, slice(0, gone) if side == "left" else slice(length - gone, None)] = 0
    return ids * mask, mask
