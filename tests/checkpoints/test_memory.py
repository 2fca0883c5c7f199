"""Does loading peak near one copy of the weights, and is nothing imported that is not needed?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

# One embedding of a third of the weights, the rest in matrices that are transposed on the way: 298 MB
SIZES = {"vocabulary_size": 24_000, "num_layers": 4, "num_heads": 16, "hidden_dim": 1024, "intermediate_dim": 4096}
TINY = {"vocabulary_size": 100, "num_layers": 1, "num_heads": 2, "hidden_dim": 64, "intermediate_dim": 256}
POSITIONS = 256

MEASURE = """
import sys
sys.path[:0] = sys.argv[2].split(":")
import gc
import torch
from pyfused.models.backbone import Backbone

torch.set_num_threads(1)

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

for dtype in ("bfloat16", "float32"):
    Backbone.from_preset(sys.argv[3], dtype=dtype)  # code and modules needed on the way do not count
    gc.collect()
    before = memory("VmRSS")
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
    except OSError:
        pass  # then the peak so far counts too, which makes the test stricter
    model = Backbone.from_preset(sys.argv[1], dtype=dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert all(bool(p[-1].ne(0).all()) for p in model.parameters())
    print(weights, memory("VmHWM") - before)
    del model
"""


def write_hf(directory: Path, sizes=SIZES) -> None:
    directory.mkdir(exist_ok=True)
    width, inner = sizes["hidden_dim"], sizes["intermediate_dim"]
    shapes = {"wte.weight": (sizes["vocabulary_size"], width), "wpe.weight": (POSITIONS, width)}
    for i in range(sizes["num_layers"]):
        for name, into, out in (
            ("attn.c_attn", width, 3 * width), ("attn.c_proj", width, width), ("mlp.c_fc", width, inner),
            ("mlp.c_proj", inner, width),
        ):  # fmt: skip
            shapes |= {f"h.{i}.{name}.weight": (into, out), f"h.{i}.{name}.bias": (out,)}
        shapes |= {f"h.{i}.{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    shapes |= {f"ln_f.{kind}": (width,) for kind in ("weight", "bias")}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, directory / "model.safetensors")
    config = {"model_type": "gpt2", "vocab_size": sizes["vocabulary_size"], "n_layer": sizes["num_layers"],
              "n_head": sizes["num_heads"], "n_embd": width, "n_positions": POSITIONS}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))


def write_keras(directory: Path, sizes=SIZES) -> None:
    directory.mkdir(exist_ok=True)
    width, inner, heads = sizes["hidden_dim"], sizes["intermediate_dim"], sizes["num_heads"]
    generator = np.random.default_rng(0)
    with h5py.File(directory / "model.weights.h5", "w") as file:

        def write(path: str, *shapes: tuple[int, ...]) -> None:
            for index, shape in enumerate(shapes):
                file[f"layers/{path}/vars/{index}"] = generator.standard_normal(shape, dtype="f4")

        write("reversible_embedding", (sizes["vocabulary_size"], width))
        write("position_embedding", (POSITIONS, width))
        write("layer_normalization", (width,), (width,))
        for i in range(sizes["num_layers"]):
            block = "transformer_decoder" + (f"_{i}" if i else "")
            attention = f"{block}/_self_attention_layer"
            for part in ("query", "key", "value"):
                write(f"{attention}/{part}_dense", (width, heads, width // heads), (heads, width // heads))
            write(f"{attention}/output_dense", (heads, width // heads, width), (width,))
            write(f"{block}/_self_attention_layer_norm", (width,), (width,))
            write(f"{block}/_feedforward_layer_norm", (width,), (width,))
            write(f"{block}/_feedforward_intermediate_dense", (width, inner), (inner,))
            write(f"{block}/_feedforward_output_dense", (inner, width), (width,))
    config = sizes | {"max_sequence_length": POSITIONS, "dropout": 0.1, "dtype": "float32"}
    described = {"class_name": "GPT2Backbone", "registered_name": "keras_hub>GPT2Backbone", "config": config}
    (directory / "config.json").write_text(json.dumps(described))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("write", [write_hf, write_keras])
def test_peak_memory(tmp_path, write):
    write(tmp_path / "whole")
    write(tmp_path / "tiny", TINY)
    root = Path(__file__).resolve().parents[2]
    paths = f"{root}:{Path(__file__).resolve().parent}"
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "whole"), paths, str(tmp_path / "tiny")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    for size, line in zip((2, 4), lines, strict=True):
        weights, peak = map(int, line.split())
        assert weights > 290e6 * size / 4
        # The lower bound only shows that something was measured: pages freed before may be used again.
        assert 0.9 * weights < peak <= 1.15 * weights, f"{peak / weights:.3f} copies of the weights of {size} bytes"


SAVE = """
import sys
import pyfused.checkpoints.hf_write, pyfused.checkpoints.keras_write, h5py, torch
from pyfused import Backbone
from pyfused.checkpoints import convert

torch.set_num_threads(1)
source, target = sys.argv[1], sys.argv[2]

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

def peak_of(call):
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    call()
    print(memory("VmHWM") - before)

for format in ("hf", "keras"):  # what is imported and allocated once does not count
    convert("gpt2_tiny_en", target, format)
    Backbone.from_preset(target).save_to_preset(target, format)
peak_of(lambda: convert(source, target, "keras", dtype=torch.bfloat16))
peak_of(lambda: convert(target, target, "hf"))
model = Backbone.from_preset(target)
peak_of(lambda: model.save_to_preset(target, "hf", max_shard_size="40MB", dtype="float32"))
peak_of(lambda: model.save_to_preset(target, "keras"))
"""


def test_peak_memory_of_saving(tmp_path):
    """A model needs a few blocks more to be saved. A conversion needs one tensor; the largest, in bfloat16, has 49 MB."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.fail("the system does not say how much memory a process needs")
    write_hf(tmp_path / "source")
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", SAVE, str(tmp_path / "source"), str(tmp_path / "target")]
    environment = {**os.environ, "PYTHONPATH": root}
    lines = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()
    to_keras, to_hf, saved_hf, saved_keras = (int(line) / 1e6 for line in lines)
    assert to_keras < 49 + 25, lines
    assert to_hf < 49 + 25, lines
    assert saved_hf < 40, lines
    assert saved_keras < 40, lines


def test_optional_packages_are_imported_only_where_needed(golden):
    code = (
        "import sys, pyfused.checkpoints as c; c.open_checkpoint(sys.argv[1]);"
        "print([n for n in ('h5py', 'tokenizers', 'huggingface_hub', 'kagglehub', 'transformers', 'triton', 'keras') "
        "if n in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(golden / "ckpt" / "hf_gpt2")]
    root = str(Path(__file__).resolve().parents[2])
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    assert result.stdout.strip() == "[]"
