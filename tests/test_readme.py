"""Does the README's code run as written?"""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_block_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_blocks_for_every_user():
    assert len(BLOCKS) >= 3
