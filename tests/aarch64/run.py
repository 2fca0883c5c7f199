"""Are the CPU kernels right on ARM? `python tests/aarch64/run.py` runs the operators' tests, and those of this folder, with the
kernels in an emulator of aarch64.

No ARM processor has run the kernels. An emulator shows what is right, not what is fast. Compiling takes about a minute of one
core, once. So does a selection of the tests, with every kernel in every dtype. With arguments for pytest it runs what they say:

    python tests/aarch64/run.py tests/ops       # every operator's test: several minutes
    python tests/aarch64/run.py tests/ops/test_ffn.py -k "gelu and float16"
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
os.environ.pop("PYFUSED_ISA", None)

import emulated  # noqa: E402
import pytest  # noqa: E402

# These start a Python of their own, which has no emulated kernels.
IN_ANOTHER_PROCESS = "test_memory_is_linear", "test_empty_kernels.py"


def takes_long(name):
    """Whether these parts of a test take as long as all the rest: the selection leaves them out."""
    if "ffn.py::test_forward_and_backward" in name or "ffn.py::test_activation_on_a_dense_grid" in name:
        return "gelu_tanh" not in name
    # test_products of aarch64_cases.py has linear's kernels with fewer sizes.
    several = (
        "test_linear.py::test_forward",
        "test_attention_padding.py::test_backward",
        "test_double_backward",
        "test_opcheck",
        "test_decode.py::test_other_plans",
        "test_decode.py::test_the_likeliest_token",
    )
    return "1025x1025" in name or any(part in name for part in several)


class Selection:
    """A pytest plugin that leaves other backends' tests out, and those that take long if nobody asked for them."""

    def __init__(self, short):
        self.short = short

    def kept(self, name):
        elsewhere = "aarch64" not in name or any(part in name for part in IN_ANOTHER_PROCESS)
        return not elsewhere and not (self.short and takes_long(name))

    def pytest_collection_modifyitems(self, config, items):
        config.hook.pytest_deselected(items=[item for item in items if not self.kept(item.nodeid)])
        items[:] = [item for item in items if self.kept(item.nodeid)]


def main(given):
    os.chdir(ROOT)
    emulated.install()
    arguments = given or ["tests/ops", str(HERE / "aarch64_cases.py")]
    return pytest.main(["-p", "no:cacheprovider", *arguments], plugins=[Selection(short=not given)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
