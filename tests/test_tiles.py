"""Where does a Triton kernel's tile come from, and does a bad file do no harm?"""

import json
import warnings

import pytest
import torch

import pyfused
from pyfused import dispatch, evidence, tiles

CPU = torch.device("cpu")
TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


def row(kernel="attention_forward", dtype="half", tile=None, **more):
    return {"kernel": kernel, "dtype": dtype, "tile": TILE if tile is None else tile, **more}


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """Returns a function that writes this machine's own file, for the interpreter."""
    monkeypatch.setenv("PYFUSED_EVIDENCE", str(tmp_path))
    dispatch.forget()

    def write(*rows, **more):
        path = evidence.own_file("interpreter")
        path.write_text(json.dumps({"kind": "triton_interpreter", "lines": [], "tiles": rows, **more}))
        dispatch.forget()
        return path

    yield write
    monkeypatch.undo()
    dispatch.forget()


def attention(where, size=64, dtype=torch.bfloat16, cases=("0", "")):
    return tiles.find("attention_forward", where, dtype, size, cases)


@pytest.mark.parametrize("architecture", tiles.ARCHITECTURES)
def test_shipped_rows_serve_every_kernel_everywhere(architecture):
    """Every launcher finds its tile in every dtype, without a warning; the shipped rows are not measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kernel in set(tiles.KERNELS) - set(tiles.OPTIONAL):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for size in (1, 16) if kernel.endswith("stream") else (1, 16, 256):
                    found = tiles.find(kernel, architecture, dtype, size)
                    assert found is not None, (kernel, dtype, size)
                    assert set(found.row.tile) == set(tiles.KERNELS[kernel])
                    assert not set(found.options) & {"PER_PROCESSOR", "LEAST_KEYS", "LEAST_K"}
                    assert not found.row.date


def test_a_special_case_before_a_general_one_and_the_nearest_size_above():
    plain, relative = attention("sm_90"), attention("sm_90", cases=("relative 0", "relative", ""))
    assert (plain.row.case, relative.row.case) == ("0", "relative 0")
    assert [attention("sm_90", size).row.up_to for size in (1, 64, 65, 128, 129, 256)] == [64, 64, 128, 128, 256, 256]
    assert attention("sm_90", 257) is None
    assert attention("sm_86", cases=("1", "")).row.case == ""  # beside a dense bias or dropout


def test_own_file_before_shipped_ones_row_by_row(own):
    before = attention(CPU), attention(CPU, 128)
    own(row(up_to=64, case="0", date="2026-01-02"))
    assert attention(CPU).options == TILE
    assert attention(CPU).row.date == "2026-01-02"
    assert attention(CPU, 128) == before[1]
    assert attention(CPU, dtype=torch.float32) == before[0]._replace(row=attention(CPU, dtype=torch.float32).row)
    assert attention("sm_90") == attention("sm_90")  # only the architecture's own rows


def test_a_kernel_runs_with_the_tile_of_the_file(own, monkeypatch):
    launched = []
    module = dispatch.kernel("triton", "relative_bias")

    def starter(kernel, grid, device, *numbers, **options):
        launched.append((grid, options))
        return lambda *tensors: None

    monkeypatch.setattr(module, "starter", starter)
    table = torch.randn(8, 2)
    for rows in (4, 8):
        own(row("relative_bias_forward", "any", {"ROWS": rows, "COLUMNS": 32, "num_warps": 2}))
        with pyfused.backend("triton"):
            pyfused.relative_bias(table, 8, 32, bidirectional=True)
    assert launched == [((16 // rows,), {"ROWS": rows, "COLUMNS": 32, "num_warps": 2}) for rows in (4, 8)]


def test_forget_reads_again(own):
    path = own(row(up_to=64, case="0"))
    assert attention(CPU).options == TILE
    path.write_text(path.read_text().replace('"num_warps": 4', '"num_warps": 8'))
    assert attention(CPU).options["num_warps"] == 4
    dispatch.forget()
    assert attention(CPU).options["num_warps"] == 8


@pytest.mark.parametrize(
    "bad, said",
    [
        (row(tile={**TILE, "BLOCK_M": 48}), "BLOCK_M is 48; it takes a power of two"),
        (row(tile={**TILE, "BLOCK_M": 0}), "BLOCK_M is 0"),
        (row(tile={**TILE, "BLOCK_M": "64"}), "BLOCK_M is '64'"),
        (row(tile={**TILE, "BLOCK_M": True}), "BLOCK_M is True"),
        (row(tile={**TILE, "num_warps": 64}), "num_warps is 64; it takes 1 to 32"),
        (row(tile={**TILE, "num_stages": -1}), "num_stages is -1"),
        (row(tile={**TILE, "BLOCK_M": 8192, "BLOCK_N": 8192}), "has more than 1048576 elements"),
        (row(tile={"BLOCK_M": 64}), "it takes \\['BLOCK_M', 'BLOCK_N', 'num_stages', 'num_warps'\\]"),
        (row(tile=[]), "it takes"),
        (row(dtype="int8"), "dtype is 'int8'"),
        (row(up_to=0), "up_to is 0"),
        ({"kernel": "attention_forward"}, "KeyError"),
        ("attention_forward", "TypeError"),
        (row("attention_decode", tile={**TILE, "BLOCK_M": 8, "PER_PROCESSOR": 2, "LEAST_KEYS": 256}), "16 queries"),
    ],
)
def test_a_bad_row_is_a_warning_and_the_shipped_rows(own, bad, said):
    expected = attention(CPU)
    path = own(row(up_to=64, case="0"), bad)
    with pytest.warns(RuntimeWarning, match=f"{path}: its tiles are ignored: .*{said}"):
        assert attention(CPU) == expected


def test_a_kernel_of_another_release_leaves_the_other_rows(own):
    own(row(up_to=64), row("attention_of_tomorrow"))
    with pytest.warns(UserWarning, match="no kernel 'attention_of_tomorrow'"):
        assert attention(CPU, cases=("",)).options == TILE


def test_a_foreign_file_is_a_warning_and_the_shipped_rows(own):
    expected = attention(CPU)
    path = own(row(up_to=64, case="0"), kind="cuda_nvidia_h100_80gb_hbm3")
    with pytest.warns(RuntimeWarning, match=f"{path} is ignored: .*it is about 'cuda_nvidia_h100"):
        assert attention(CPU) == expected


def test_bad_tiles_leave_the_lines_of_their_file(own):
    line = {"operator": "ffn", "function": "forward", "dtype": "float32", "shapes": "small", "date": "2026-01-02"}
    own(row(up_to=0), lines=[{**line, "speed": {"triton": {"16": 1.5}}}])
    assert [line.operator for line in evidence.lines("interpreter")] == ["ffn"]


def test_a_tile_that_cannot_fit_is_refused():
    """With heads of 256 elements and a tile of 128 keys, four stages hold at least three tiles in flight."""
    large = row(tile={**TILE, "BLOCK_N": 128, "num_stages": 4}, up_to=256)
    least = 3 * 2 * 128 * 256 * 2
    assert tiles.least_shared(tiles.row_from(large, "", least)) == least
    with pytest.raises(ValueError, match=f"at least {least} bytes of shared memory; this chip has 101376"):
        tiles.row_from(large, "", 99 * 1024)
    for architecture, limit in {"sm_90": 227, "sm_80": 163, "sm_86": 99, "gfx942": 64}.items():
        for kernel in tiles.KERNELS:
            found = tiles.find(kernel, architecture, torch.bfloat16, 16)
            assert found or kernel in tiles.OPTIONAL
            assert not found or tiles.least_shared(found.row) <= limit * 1024, (architecture, kernel)


def test_trying_is_over_at_the_end_of_the_block():
    before = attention(CPU)
    with tiles.trying("attention_forward", TILE), tiles.trying("attention_forward", {**TILE, "num_warps": 8}):
        assert attention(CPU).options["num_warps"] == 8
    assert attention(CPU) == before


def test_a_question_is_answered_once():
    """Every launch asks: 0.36 us where this was written, as much as reading a table in code."""
    attention(CPU)
    before = tiles.find.cache_info()
    attention(CPU)
    assert tiles.find.cache_info() == before._replace(hits=before.hits + 1)
