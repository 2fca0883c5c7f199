"""Where do the tests find the golden cases?"""

import functools
import json
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parent / "golden"


@functools.cache
def manifest():
    return json.loads((ROOT / "manifest.json").read_text())


def case(name):
    """(the manifest's entry, in/..., out/<source>/...); the tensors' keys lack these prefixes."""
    entry = next(c for c in manifest()["cases"] if c["id"] == name)
    inputs, outputs = {}, {}
    for key, tensor in load_file(ROOT / entry["file"]).items():
        kind, _, rest = key.partition("/")
        if kind == "in":
            inputs[rest] = tensor
        else:
            source, _, what = rest.partition("/")
            outputs.setdefault(source, {})[what] = tensor
    return entry, inputs, outputs
