"""Does `pyfused tune --device cuda` run end to end and keep its results, and does dispatch then follow them? Uses Triton's
interpreter, the CUDA kernels' host shim, tiny sizes and a clock that makes one tile fast."""

import itertools
import json
from dataclasses import replace

import cudnn_on_cpu
import pytest
import torch

import pyfused
from pyfused import dispatch, evidence, tiles
from pyfused.testing.problems import norm
from pyfused.tune import gpu as tune_gpu
from pyfused.tune.cases import cases

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run, where there is no GPU")


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """This machine's file in an empty folder."""
    monkeypatch.setenv("PYFUSED_EVIDENCE", str(tmp_path))
    dispatch.forget()
    yield tune_gpu.own_file()
    monkeypatch.undo()
    dispatch.forget()


def work(*operators):
    """The first case of each function of some operators."""
    found = {}
    for case in cases(tiny=True):
        if case.operator in operators:
            found.setdefault((case.operator, case.function), case)
    return list(found.values())


def clock(seconds=lambda: 1.0):
    def read(call):
        call()
        return seconds()

    return read


def tune(work, **options):
    return tune_gpu.tune(**{"quick": True, "clock": clock(), "work": work, "say": print, **options})


def test_every_operator_runs():
    """No search: all tiles are equally fast."""
    listed = [case for case in cases(quick=True, tiny=True) if "many" not in case.name]
    assert {case.operator for case in listed} == set(pyfused.ops.NAMES) - {"decode"}  # one kernel, and no tiles
    with cudnn_on_cpu.installed():
        found = tune(listed, compile_ahead=lambda run, kernel, tiles: tiles.clear())
    assert found["refused"] == []
    speeds: dict[tuple[str, str], set[str]] = {}  # int8 weights have no kernel in CUDA: a line of its own
    for line in found["lines"]:
        speeds.setdefault((line["operator"], line["function"]), set()).update(line["speed"])
    assert all("reference" in names for names in speeds.values())
    assert all("triton" in names for (operator, _), names in speeds.items() if operator != "linear")
    assert all("cuda" in speeds[operator, "forward"] for operator in ("attention", "rms_norm", "linear", "fourier_mix"))
    for line in found["lines"]:
        takes = line["operator"] == "attention" and "bias" not in line["shapes"]
        assert ("cudnn" in line["speed"]) == takes, line
    assert {"attention_grad_query", "row_norm_backward", "ffn_stream"} <= {row["kernel"] for row in found["tiles"]}
    for line in found["lines"]:
        evidence.line_from(line, "")
    for row in found["tiles"]:
        tiles.row_from(row, "")


def test_the_fastest_tile_is_found_and_then_used(own):
    """A kernel with two warps takes half the time; tiles that do not compile are left out."""

    def seconds():
        tile = tiles.find("row_norm_forward", torch.device("cpu"), size=16).options
        return 0.5 if tile["num_warps"] == 2 else 1.0

    before = tiles.find("row_norm_forward", torch.device("cpu"), torch.bfloat16, 16)
    assert before.options["num_warps"] == 4
    assert not before.row.date
    found = tune(work("rms_norm")[:1], clock=clock(seconds), save=lambda found: evidence.write(own, found))
    (row,) = found["tiles"]
    assert row["tile"]["num_warps"] == 2
    (line,) = found["lines"]
    assert line["speed"]["triton"] == line["speed"]["cuda"]
    dispatch.forget()
    after = tiles.find("row_norm_forward", torch.device("cpu"), torch.bfloat16, 16)
    assert after.row.source == own.name
    assert after.options["num_warps"] == 2
    # A row of the same class for another dtype does not change.
    assert tiles.find("row_norm_forward", torch.device("cpu"), torch.float16, 16).options == before.options


def test_launches_are_prepared_once_for_each_tile(monkeypatch):
    """As in the operator, so that the time of small calls is not the host's."""
    module, prepared, started = dispatch.kernel("triton", "rms_norm"), [], []
    prepare = module.forward.prepare

    def noted(*args):
        launch = prepare(*args)
        prepared.append(dict(tiles._trial))
        return lambda *args: started.append(1) or launch(*args)

    monkeypatch.setattr(module.forward, "prepare", noted)
    tune(work("rms_norm")[:1])
    assert len(started) > len(prepared) > 2
    assert all(one != other for one, other in itertools.pairwise(prepared))


def test_a_tile_that_is_wrong_or_raises_is_left_out(monkeypatch):
    module = dispatch.kernel("triton", "rms_norm")
    forward = module.forward

    def planted(*args):
        tile = tiles.find("row_norm_forward", args[0].device, size=16).options
        if tile["num_warps"] == 8:
            raise RuntimeError("out of resources")
        y, *more = forward(*args)
        return (y * (0 if tile["num_warps"] == 2 else 1), *more)

    monkeypatch.setattr(module, "forward", planted)
    found = tune(work("rms_norm")[:1], clock=clock(iter(range(100, 0, -1)).__next__))  # each later tile is faster
    assert found["skipped"] >= 2
    assert found["tiles"][0]["tile"]["num_warps"] not in (2, 8)
    assert found["refused"] == []


def test_a_wrong_kernel_is_refused_and_never_first(monkeypatch):
    monkeypatch.setattr(dispatch.kernel("triton", "rms_norm"), "forward", lambda x, *more: (x * 0, None, None))
    found = tune(work("rms_norm")[:1])
    assert found["refused"] == [f"bfloat16, {work('rms_norm')[0].name}: triton"]
    assert found["lines"][0]["speed"]["triton"] == {64: 0.0}
    assert found["tiles"] == []


def test_the_limit_keeps_what_is_known(own):
    """Every read of the clock is a second later."""
    ticks = iter(range(10**6))
    found = tune(
        work("rms_norm", "layer_norm"),
        limit=12,
        now=lambda: next(ticks),
        save=lambda found: evidence.write(own, found),
    )
    assert found["stopped"] == "the time is up"
    kept = json.loads(own.read_text())
    as_written = json.loads(json.dumps(found))
    assert kept["lines"] == as_written["lines"]
    assert kept["tiles"] == as_written["tiles"]
    assert len(found["lines"]) < 4


def test_what_a_killed_process_had_is_in_the_file(own):
    class Killed(BaseException):
        pass

    listed = work("rms_norm")
    killed = replace(listed[1].problem, own=lambda tensors: (_ for _ in ()).throw(Killed()))
    listed[1] = listed[1]._replace(problem=killed)
    with pytest.raises(Killed):
        tune(listed, save=lambda found: evidence.write(own, found))
    assert [line["operator"] for line in json.loads(own.read_text())["lines"]] == ["rms_norm"]


def test_candidates_are_tiles_that_a_kernel_takes():
    for architecture in tiles.ARCHITECTURES:
        for kernel in tiles.KERNELS:
            tile = tiles.find(kernel, architecture, torch.bfloat16, 16, ("0", ""))
            if tile is None:
                assert kernel in tiles.OPTIONAL
                continue
            found = tune_gpu.candidates(tile.row, torch.device("cpu"))
            assert tile.row.tile not in found
            assert 1 < len(found) < 24, kernel
            for candidate in found:
                tiles.check(kernel, candidate)


def test_norms_of_few_rows_judge_too():
    """The rule judges a sample of the outputs and still sees an unwritten row."""

    def forgetful(x, weight, eps, residual, save):
        y = dispatch.kernel("reference", "rms_norm").forward(x, weight, eps, residual, save)[0]
        y[-1] = torch.nan
        return y, None, None

    case = work("rms_norm")[0]._replace(problem=norm("rms_norm", 3, 16, False))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dispatch.kernel("triton", "rms_norm"), "forward", forgetful)
        assert tune([case])["refused"]


def test_the_command(own, tmp_path, capsys):
    from pyfused.cli import main

    target = tmp_path / "found.json"
    arguments = ["tune", "rms_norm", "--device", "cuda", "--quick", "--limit", "60", "--save", str(target)]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "rms_norm backward bfloat16" in said.out
    assert "tiles left out" in said.err
    written = json.loads(target.read_text())
    assert written["kind"] == "triton_interpreter"
    assert {row["kernel"] for row in written["tiles"]} == {
        "row_norm_forward",
        "row_norm_backward",
        "row_norm_reduce",
    }
    own.write_text(target.read_text())
    dispatch.forget()
    assert main(["evidence", "--device", "cuda"]) == 0
    said = capsys.readouterr().out
    assert f"of which {len(written['tiles'])} are measured" in said
    assert str(own) in said
    assert "[triton_interpreter.json, " in said
    assert main(["tune", "--device", "cpu", "--limit", "3"]) == 2
    assert main(["tune", "--device", "cuda", "--threads", "3"]) == 2
