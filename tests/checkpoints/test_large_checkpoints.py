"""How much memory does loading T5-XXL take, shard by shard, and how much does one of 64 ranks need?

The layers have the real widths; there are fewer of them. The figures are printed (pytest -s).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import large_checkpoints
import pytest

ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")


def measured(folder, target):
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, large_checkpoints.__file__, folder, target],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_loading_takes_less_than_a_shard_beyond_the_weights(tmp_path):
    """The bound asked for is 1.2 times the largest shard; slices of a few MB need a quarter of one here."""
    encoder = {"architectures": ["T5EncoderModel"], "is_encoder_decoder": False}
    whole, largest = large_checkpoints.write(tmp_path, 200 * MB, num_layers=1, num_decoder_layers=1, **encoder)
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    found = measured(tmp_path, "whole")
    print(f"\nwhole: {found}, largest shard {largest}")
    assert found["weights"] == whole > 2 * largest
    assert found["peak"] - found["weights"] < 0.25 * largest


def test_one_of_64_ranks_needs_its_share(tmp_path):
    whole, largest = large_checkpoints.write(tmp_path, 1024 * MB, num_layers=2, num_decoder_layers=2)
    found = measured(tmp_path, "5/64")
    print(f"\nrank 5 of 64: {found}, largest shard {largest}")
    assert found["whole"] == whole > 2000 * MB
    assert found["weights"] < 1.01 * whole / 64
    assert found["peak"] - found["weights"] < 64 * MB < 0.1 * largest
