"""Does GPT2Backbone, loaded from each golden directory, compute what the library that wrote it computed?"""

import pytest
import torch
from safetensors.torch import load_file

from pyfused.models.backbone import Backbone
from pyfused.testing.tolerance import assert_close

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "name", ["hf_gpt2", "hf_gpt2_lm", "keras_gpt2", "keras_gpt2_legacy", "keras_gpt2_bf16", "keras_gpt2_task"]
)
def test_outputs(golden, name):
    from pyfused.models.gpt2 import GPT2Backbone

    stored = load_file(golden / "ckpt" / name / "expected.safetensors")
    model = Backbone.from_preset(golden / "ckpt" / name, dtype="float32")
    assert type(model) is GPT2Backbone
    mask = stored["in/attention_mask"]
    with torch.no_grad():
        actual = model({"token_ids": stored["in/input_ids"], "padding_mask": mask})

    truth_model = transformers.GPT2Model.from_pretrained(golden / "ckpt" / "hf_gpt2").double()
    if name.endswith("bf16"):
        truth_model = truth_model.bfloat16().double()
    with torch.no_grad():
        truth = truth_model(input_ids=stored["in/input_ids"], attention_mask=mask).last_hidden_state
    seeing = mask.cumsum(1) > 0  # the libraries disagree about rows that may look at no key
    assert_close(actual[seeing], stored["out/last_hidden_state"][seeing], truth[seeing], name)
