"""Does transformers' FNet compute the same after fuse_, with every head, option and dtype?"""

import copy
import functools

import pytest
import torch
from fused_pairs import Trio, check_changed_child, check_dropout, check_resized, counted, gradients, vary

import pyfused
from pyfused import notices
from pyfused.notices import FallbackWarning
from pyfused.own_forward import is_fused
from pyfused.testing.tolerance import assert_close

transformers = pytest.importorskip("transformers")
from pyfused.integrations.transformers import fnet as fnet_integration  # noqa: E402
from pyfused.integrations.transformers import shaped  # noqa: E402

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 40, "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
}  # fmt: skip
HEADS = [
    "FNetModel", "FNetForPreTraining", "FNetForMaskedLM", "FNetForNextSentencePrediction", "FNetForSequenceClassification",
    "FNetForTokenClassification", "FNetForQuestionAnswering", "FNetForMultipleChoice",
]  # fmt: skip
LAYERS = ("FNetBasicFourierTransform", "FNetBasicOutput", "FNetOutput", "FNetLayer")


def fnet(head="FNetModel", **options):
    return getattr(transformers, head)(transformers.FNetConfig(**{**SIZES, **options}))


def ids(length=13, shape=(3,)):
    return torch.randint(2, 61, (*shape, length))


def test_report():
    trio = Trio(fnet())
    kinds = {entry.kind for entry in trio.report.replaced}
    assert kinds == {*LAYERS, "LayerNorm"}
    assert trio.report.left == ()
    assert [name for name, _ in trio.fused.named_modules()] == [name for name, _ in trio.plain.named_modules()]


@pytest.mark.parametrize("head", HEADS)
def test_heads(head):
    shape = (2, 3) if head == "FNetForMultipleChoice" else (3,)
    trio = Trio(fnet(head, num_labels=2))
    x = ids(shape=shape)
    outputs = trio.check(input_ids=x, token_type_ids=torch.randint(0, 4, x.shape), output_hidden_states=True)
    assert sum(name.startswith("hidden_states") for name in outputs) == 4


def test_what_runs(monkeypatch):
    """Each of three layers runs one mixing, one norm with a residual and one feed-forward; checkpointing runs them again."""
    trio, own = Trio(fnet()), counted(monkeypatch, fnet_integration, "fourier_mix", "layer_norm")
    usual = counted(monkeypatch, shaped, "ffn", "linear")
    trio.fused(ids())
    assert own | usual == {"fourier_mix": 3, "ffn": 3, "layer_norm": 3, "linear": 0}
    gradients(trio.fused, lambda model: model(ids()).last_hidden_state.sum(), reentrant=False)
    assert own | usual == {"fourier_mix": 9, "ffn": 9, "layer_norm": 9, "linear": 0}


def test_embeddings_positions_and_tuples():
    trio = Trio(fnet())
    trio.check(inputs_embeds=torch.randn(2, 7, 24))
    trio.check(input_ids=ids(), position_ids=torch.arange(13).flip(0)[None])
    trio.check(input_ids=ids(length=1))
    assert isinstance(trio.fused(ids(), return_dict=False), tuple)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu", "gelu_pytorch_tanh", "mish"])
def test_activations(activation):
    trio = Trio(fnet(hidden_act=activation))
    trio.check(input_ids=ids())
    reasons = {entry.note for entry in trio.report.left}
    assert reasons == ({"the kernels do not have the activation MishActivation"} if activation == "mish" else set())


def test_bfloat16_which_torch_fft_refuses():
    """The truth is float64; plain PyTorch in bfloat16 computes the transform in float32."""
    trio = Trio(fnet(), torch.bfloat16)
    x = ids()
    with pytest.raises(RuntimeError, match="BFloat16"):
        trio.plain(x)
    for transform in (layer.fourier.self for layer in trio.plain.encoder.layer):
        transform.fourier_transform = lambda h: torch.fft.fftn(h.float(), dim=(1, 2)).real.bfloat16()
    trio.check(input_ids=x)


def test_float64_stays_torchs():
    model = vary(fnet()).double().eval()
    before = model(ids := torch.randint(0, 61, (2, 9))).last_hidden_state
    pyfused.fuse_(model)
    assert torch.equal(model(ids).last_hidden_state, before)


@pytest.mark.parametrize("chunk", [0, 1, 4])
def test_chunked_feed_forward(chunk):
    Trio(fnet(chunk_size_feed_forward=chunk)).check(input_ids=ids(length=12))


def test_tpu_option_stays_and_says_so():
    notices._said.clear()
    with pytest.warns(FallbackWarning, match="use_tpu_fourier_optimizations"):
        trio = Trio(fnet(use_tpu_fourier_optimizations=True, tpu_short_seq_length=13))
    assert not is_fused(trio.fused.encoder.layer[0].fourier.self)
    assert is_fused(trio.fused.encoder.layer[0].output)
    x = ids()
    truth = copy_of_fft(trio.plain).double()
    assert_close(*(model(x).last_hidden_state for model in (trio.fused, trio.plain, truth)))


def copy_of_fft(model):
    model = copy.deepcopy(model)
    for layer in model.encoder.layer:
        layer.fourier.self.fourier_transform = functools.partial(torch.fft.fftn, dim=(1, 2))
    return model


def test_a_transform_changed_later_is_used():
    trio = Trio(fnet())
    for model in trio.models:
        model.encoder.layer[1].fourier.self.fourier_transform = lambda h: torch.fft.fft2(0.5 * h)
    trio.check(input_ids=ids())


@pytest.mark.parametrize("place", ["intermediate.dense", "output.dense", "output.dropout", "output.LayerNorm"])
def test_children_replaced_or_hooked_later(place):
    check_changed_child(Trio(fnet()), lambda m: m.encoder.layer[0], place, input_ids=ids())


def test_gradients_and_checkpointing():
    trio, x = Trio(fnet("FNetForMaskedLM")), ids()
    weights = torch.randn(3, 13, 61)
    expected = trio.check_gradients(lambda output: (output.logits * weights.to(output.logits.dtype)).sum(), input_ids=x)
    for reentrant in (True, False):
        checkpointed = gradients(trio.fused, lambda model: (model(x).logits * weights).sum(), reentrant)
        assert all(torch.equal(checkpointed[name], expected[name]) for name in expected)


def test_autocast():
    Trio(fnet()).check_autocast(input_ids=ids())


def test_dropout():
    torch.manual_seed(0)
    trio = Trio(fnet(hidden_dropout_prob=0.1, num_hidden_layers=1))
    check_dropout(trio, input_ids=ids(shape=(1,)).repeat(512, 1))


def test_filter_unfuse_and_files(tmp_path):
    trio = Trio(fnet(), filter_fn=lambda name, module: "layer.1" not in name and name != "encoder.layer.2")
    assert not any(is_fused(m) for m in trio.fused.encoder.layer[1].modules())
    trio.check(input_ids=ids())
    x = ids()
    trio.fused.save_pretrained(tmp_path)
    again = transformers.FNetModel.from_pretrained(tmp_path)
    assert torch.equal(again(x).last_hidden_state, trio.plain(x).last_hidden_state)
    assert torch.equal(pyfused.unfuse_(trio.fused)(x).last_hidden_state, trio.plain(x).last_hidden_state)


def test_resized_embeddings():
    check_resized(Trio(fnet("FNetForMaskedLM")), 70, input_ids=ids() + 8)
