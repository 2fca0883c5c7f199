"""Does a call give exactly what its backbone takes, and is what it cannot do refused by name?"""

import subprocess
import sys

import pytest
import torch

import pyfused
from pyfused import Tokenizer
from pyfused.checkpoints import StreamDecoder
from pyfused.checkpoints.presets import bundled_presets

PRESETS = "gpt2_tiny_en", "albert_tiny_en", "t5_tiny_en", "fnet_tiny_en"
TEXTS = ["Jesus wept.", "And God said, Let there be light: and there was light."]


@pytest.fixture(scope="module", params=PRESETS)
def preset(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(preset):
    return Tokenizer.from_preset(preset)


def test_inputs_fit_the_backbone(preset, tokenizer):
    """Padded on the right, the first text's states are those of the text alone (FNet has no mask: texts of equal length)."""
    model = pyfused.Backbone.from_preset(preset)
    texts = TEXTS if preset != "fnet_tiny_en" else [TEXTS[0], TEXTS[0]]
    inputs, alone = tokenizer(texts), tokenizer(TEXTS[0])
    output = "sequence_output"
    if preset == "gpt2_tiny_en":
        both, one = model(**inputs), model(**alone)
        output = next(iter(both)) if isinstance(both, dict) else None
    elif preset == "t5_tiny_en":
        answers, labels = tokenizer.targets(["Light.", "He wept, and wept."])
        both = model(**inputs, **answers)
        one = model(**alone, **tokenizer.targets("Light.")[0])
        logits = model.logits(both["decoder_sequence_output"])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        assert torch.isfinite(loss)
        output = "encoder_sequence_output"
    else:
        both, one = model(**inputs), model(**alone)
    both, one = (both, one) if output is None else (both[output], one[output])
    assert both.shape[0] == 2
    torch.testing.assert_close(both[:1, : one.shape[1]], one, atol=1e-4, rtol=1e-4)


def test_pairs_and_special_tokens():
    albert, t5, gpt2 = (Tokenizer.from_preset(f"{name}_tiny_en") for name in ("albert", "t5", "gpt2"))
    a, b = (albert.encode(text, add_special_tokens=False) for text in TEXTS)
    found = albert([TEXTS[0]], pair=[TEXTS[1]])
    assert found["token_ids"].tolist() == [[albert.cls_token_id, *a, albert.sep_token_id, *b, albert.sep_token_id]]
    assert found["segment_ids"].tolist() == [[0] * (len(a) + 2) + [1] * (len(b) + 1)]
    assert found["padding_mask"].all()
    a, b = (t5.encode(text, add_special_tokens=False) for text in TEXTS)
    assert t5.encode(*TEXTS) == [*a, t5.eos_token_id, *b, t5.eos_token_id]
    assert gpt2.encode(*TEXTS) == gpt2.encode(TEXTS[0]) + gpt2.encode(TEXTS[1])


def test_names():
    albert, t5, gpt2, fnet = (Tokenizer.from_preset(f"{name}_tiny_en") for name in ("albert", "t5", "gpt2", "fnet"))
    for tokenizer in (albert, fnet):
        assert (tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token) == ("[CLS]", "[SEP]", "[MASK]")
        assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id) == (0, 1, 2)
        assert (tokenizer.sep_token_id, tokenizer.mask_token_id, tokenizer.end_token_id) == (3, 4, 3)
        assert tokenizer.sentinel_ids == ()
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id, t5.cls_token, t5.bos_token_id) == (0, 1, 2, None, None)
    assert t5.sentinel_ids == tuple(range(2047, 2015, -1))
    assert t5.token_to_id("<extra_id_0>") == t5.sentinel_ids[0]
    assert gpt2.bos_token == gpt2.eos_token == gpt2.unk_token == gpt2.pad_token == "<|endoftext|>"
    assert (gpt2.family, t5.family, albert.family, fnet.family) == ("gpt2", "t5", "albert", "fnet")
    assert gpt2.special_ids == {0}
    assert {*t5.sentinel_ids, 0, 1, 2} == t5.special_ids


def test_tokens_and_ids(preset, tokenizer):
    assert tokenizer.directory == bundled_presets()[preset]
    assert len(tokenizer) == tokenizer.vocabulary_size == 2048
    assert all(tokenizer.token_to_id(tokenizer.id_to_token(index)) == index for index in range(2048))
    assert preset in repr(tokenizer)
    with pytest.raises(ValueError, match="token is 'no such token'; the vocabulary of 2048 tokens does not have it"):
        tokenizer.token_to_id("no such token")
    for index in (-1, 2048):
        with pytest.raises(IndexError, match=f"token id {index} is not in the vocabulary of 2048 tokens"):
            tokenizer.id_to_token(index)
        with pytest.raises(IndexError, match=f"token id {index} is not"):
            tokenizer.decode([5, index])
        with pytest.raises(IndexError, match=f"token id {index} is not"):
            tokenizer.stream().push(index)
    ids = tokenizer.encode(TEXTS[0])
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(ids)
    assert isinstance(tokenizer.stream(), StreamDecoder)


def test_padding(preset, tokenizer):
    ids = next(iter(tokenizer("a")))
    assert tokenizer("a")[ids].shape == tokenizer(["a"])[ids].shape
    assert tokenizer([])[ids].shape == (0, 0)
    wide = tokenizer(TEXTS, padding="max_length", max_length=64)
    assert {tuple(tensor.shape) for tensor in wide.values()} == {(2, 64)}
    left, right = tokenizer(TEXTS, side="left"), tokenizer(TEXTS, side="right")
    short = len(tokenizer.encode(TEXTS[0]))
    assert left[ids][0, -short:].tolist() == right[ids][0, :short].tolist() == tokenizer.encode(TEXTS[0])
    assert (left[ids][0, :-short] == tokenizer.pad_token_id).all()
    equal = tokenizer([TEXTS[0], TEXTS[0]], padding=False)
    assert equal[ids].tolist() == [tokenizer.encode(TEXTS[0])] * 2
    meta = tokenizer(TEXTS, device="meta")
    assert {tensor.device.type for tensor in meta.values()} == {"meta"}
    with torch.device("meta"):
        assert tokenizer(TEXTS)[ids].device.type == "meta"


def test_targets():
    t5 = Tokenizer.from_preset("t5_tiny_en")
    inputs, labels = t5.targets(TEXTS)
    short, long = (t5.encode(text) for text in TEXTS)
    assert labels.tolist() == [short + [-100] * (len(long) - len(short)), long]
    assert inputs["decoder_token_ids"][1].tolist() == [0, *long[:-1]]
    assert inputs["decoder_padding_mask"].sum(1).tolist() == [len(short), len(long)]
    with pytest.raises(
        ValueError, match=r"targets are for a model with a decoder of its own, like T5; .* is for albert"
    ):
        Tokenizer.from_preset("albert_tiny_en").targets(TEXTS)


@pytest.mark.parametrize(
    "given, options, error, said",
    [
        (b"a", {}, TypeError, "texts is a bytes; it takes a str or a list of str"),
        (3, {}, TypeError, "texts is an int; it takes"),
        (["a", 3], {}, TypeError, r"texts\[1\] must be str, got int"),
        ("a", {"pair": ["b"]}, ValueError, "pair has 1 texts; it takes one for each of the 1 in texts"),
        (["a", "b"], {"pair": ["c"]}, ValueError, "pair has 1 texts; it takes one for each of the 2"),
        ("a", {"padding": "longest"}, ValueError, "padding is 'longest'; it takes True, False or 'max_length'"),
        ("a", {"padding": "max_length"}, ValueError, "max_length is None, and the tokeniser's files name no model_max"),
        ("a", {"truncation": "first"}, ValueError, "truncation is 'first'; it takes True, False, 'longest_first'"),
        ("a", {"truncation": True}, ValueError, "max_length is None"),
        ("a", {"truncation": True, "max_length": 1}, ValueError, "max_length is 1; it takes at least 2, the tokens"),
        ("a", {"truncation": True, "max_length": 0}, ValueError, "max_length is 0; it takes at least 1"),
        ("a", {"truncation": True, "max_length": 2.0}, TypeError, "max_length is 2.0; it takes an int"),
        ("a", {"max_length": 8}, ValueError, "max_length is 8, but neither truncation nor padding='max_length' uses it"),
        ("a", {"truncation": "only_second", "max_length": 8}, ValueError, "'only_second', and there is no pair"),
        ("a", {"side": "up"}, ValueError, "side is 'up'; it takes 'left' or 'right'"),
        (TEXTS, {"padding": False}, ValueError, "texts have .* tokens, and padding is False; it takes texts of equal"),
        (TEXTS, {"padding": "max_length", "max_length": 8}, ValueError, r"texts\[1\] has .* tokens; padding takes at most"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(given, options, error, said):
    tokenizer = Tokenizer.from_preset("albert_tiny_en")
    with pytest.raises(error, match=said):
        tokenizer(given, **options)


def test_threads_share_one():
    """A call's length is an argument: another thread's texts are not cut."""
    from concurrent.futures import ThreadPoolExecutor

    tokenizer = Tokenizer.from_preset("albert_tiny_en")
    whole = tokenizer.encode(TEXTS[1])
    with ThreadPoolExecutor(4) as pool:
        cut = [pool.submit(tokenizer, TEXTS, truncation=True, max_length=5) for _ in range(50)]
        full = [pool.submit(tokenizer.encode, TEXTS[1]) for _ in range(50)]
    assert all(call.result() == whole for call in full)
    assert all(call.result()["token_ids"].shape == (2, 5) for call in cut)


def test_import_waits_for_the_first_tokenizer():
    code = "import sys, pyfused, pyfused.checkpoints; pyfused.Tokenizer; assert 'tokenizers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
