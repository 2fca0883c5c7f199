"""Which models do the float16 tests use? T5 with Flan-T5's residual stream of 99,000, FNet with sums beyond 65,504."""

import torch

from pyfused import FNetBackbone, T5Backbone

STREAM = 99_000.0


def flan_like(gated=True, tied=False, layers=3):
    """A float32 T5 with weights that float16 holds exactly. One feature of the residual stream reaches 99,000 after the first
    layer of each stack. Its terms have one sign: a sum that cancels would leave only rounding errors."""
    model = T5Backbone(
        97, layers, 4, 48, 96, key_value_dim=12, use_gated_activation=gated, activation="relu",
        tie_embedding_weights=tied, dtype="float32",
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                spread = 1.0 if "embedding" in name else 0.5 * parameter.shape[1] ** -0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
        for side, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
            for norm in [module for module in stack.modules() if hasattr(module, "eps")]:
                norm.weight[3] = 0.01  # training makes the norm's weight of such a feature small
            feed_forward = stack.layers[0].feed_forward
            if gated:
                feed_forward.up.weight.copy_(feed_forward.gate.weight)
            feed_forward.outer.weight[3].abs_()
            for _ in range(3):
                states = model(**inputs_of(), return_hidden_states=True)[f"{side}_hidden_states"]
                feed_forward.outer.weight[3] *= STREAM / states[1][..., 3].max()
        model.half().float()
    return model


def inputs_of(rows=3, source=21, target=9):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, source, dtype=torch.bool)
    mask[1, 9:] = False
    return {
        "encoder_token_ids": torch.randint(97, (rows, source), generator=generator),
        "encoder_padding_mask": mask,
        "decoder_token_ids": torch.randint(97, (rows, target), generator=generator),
        "decoder_padding_mask": None,
    }


def fnet_with_large_sums():
    """A float32 FNet whose hidden states share an offset, as real texts' do. Summed over positions and features it is large."""
    model = FNetBackbone(97, 2, 512, 64, max_sequence_length=512, dtype="float32").eval()
    with torch.no_grad():
        model.projection.bias.fill_(0.5)
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def off(actual, truth):
    """The relative error of a tensor: norm of the difference over norm of the truth."""
    return ((actual.double() - truth.double()).norm() / truth.double().norm()).item()
