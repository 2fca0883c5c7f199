"""What do the tests of checkpoints share: the golden directories, writable copies of them, and ways to damage those."""

import json
import shutil
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.fixture
def golden():
    return GOLDEN


@pytest.fixture
def preset(tmp_path):
    """A function that makes a writable copy of a golden checkpoint directory."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(GOLDEN / "ckpt" / name, tmp_path / name))

    return copy


@pytest.fixture
def edit():
    """A function that rewrites a JSON file: values to replace, None to remove."""

    def rewrite(path: Path, **changes) -> None:
        content = json.loads(path.read_text())
        for key, value in changes.items():
            if value is None:
                content.pop(key, None)
            else:
                content[key] = value
        path.write_text(json.dumps(content))

    return rewrite


@pytest.fixture
def edit_keras(edit):
    """A function that changes the backbone's arguments in a directory of Keras."""

    def change(directory: Path, **changes) -> None:
        path = directory / "config.json"
        edit(path, config=json.loads(path.read_text())["config"] | changes)

    return change


@pytest.fixture
def same():
    """A function that compares two mappings of tensors bit by bit."""

    def compare(first, second) -> None:
        first, second = dict(first), dict(second)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert tensor.dtype == second[name].dtype, name
            assert torch.equal(tensor, second[name]), name

    return compare
