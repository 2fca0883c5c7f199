"""What does each item of gpu.py do? A function an item that yields rows; run() prints them as JSON lines.

PYFUSED_GPU_DRY=1: on CPU tensors, Triton in its interpreter and csrc/cuda on the host shim, at tiny sizes.
PYFUSED_GPU_SECONDS: how long this process may take; an item that can choose does less when there is little.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gpu
import torch
import torch.nn.functional as F

sys.path[1:1] = [str(gpu.ROOT / "tests"), str(gpu.ROOT / "tests" / "cuda_on_cpu")]

import pyfused  # noqa: E402
from pyfused import _extensions, dispatch, evidence  # noqa: E402
from pyfused.testing import judge, running  # noqa: E402

BEGAN = time.monotonic()
DRY = os.environ.get("PYFUSED_GPU_DRY") == "1"
DEVICE = "cpu" if DRY else "cuda"
Row = dict[str, Any]
if DRY:
    import shim

    from pyfused.testing.triton_interpreter import repair_interpreter

    repair_interpreter()
    _extensions.emulate_cuda(shim.load)
    torch.set_num_threads(1)


def run(arguments: Sequence[str], start: int = 0) -> int:
    """Runs an item, such as ["generate", "gpt2"], and prints its rows. 1 where it raised."""
    name, *rest = arguments
    for row in ITEMS[name](start, *rest):
        # In one piece and on a line of its own, whatever a library prints meanwhile.
        sys.stdout.write(f"\n{json.dumps(row)}\n")
        sys.stdout.flush()
    return 0


def left() -> float:
    """Seconds that this process still has."""
    return float(os.environ.get("PYFUSED_GPU_SECONDS", "1e9")) - (time.monotonic() - BEGAN)


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


# ---- what is here -------------------------------------------------------------------------------------------------------


def environment(start: int) -> Iterator[Row]:
    """Versions and tools, whether the extensions load, and the ceilings of this card."""
    packages = ("torch", "triton", "transformers", "numpy", "pytest")
    versions = {"pyfused": pyfused.__version__, "python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    device = "dry run" if DRY else torch.cuda.get_device_name()
    kind = "cuda_dry_run" if DRY else evidence.kind("cuda")
    tools = {tool: shutil.which(tool) for tool in ("nvcc", "ncu", "compute-sanitizer")}
    yield {"device": device, "kind": kind, "versions": versions, "tools": tools, "commit": _commit()}
    for name in ("_cpu", "_cuda"):
        reason = _extensions.missing(name)
        yield {"extension": name, "ok": not reason, "error": reason}
    for name in ("triton", "cuda"):
        reason = dispatch.missing(name)
        yield {"backend": name, "ok": not reason, "error": reason}
    from pyfused.bench import ceilings

    yield {"ceilings": {"copy_gb_per_s": 1.0} if DRY else ceilings(DEVICE)}


def _commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=gpu.ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


# ---- is it right --------------------------------------------------------------------------------------------------------


def correct(start: int, operators: str, backend: str) -> Iterator[Row]:
    """Every case of operators, named with commas, on one backend. A row says which case begins, so that the parent knows which
    one ended this process; an error of CUDA does, as nothing works behind it."""
    import gpu_correct

    for number, (operator, dtype, case) in enumerate(gpu_correct.every(operators, tiny=DRY)):
        if number < start:
            continue
        about = {"operator": operator, "backend": backend, "dtype": evidence.name_of(dtype), "case": case.name}
        yield {"begun": number, **about}
        try:
            found = gpu_correct.judged(case, backend, dtype, DEVICE)
            synchronize()
        except Exception as error:
            if _is_sticky(error):
                raise
            found = {"ok": False, "ratio": None, "error": f"{type(error).__name__}: {error}"[:1500], "seconds": 0.0}
        yield {**about, **found}


def _is_sticky(error: Exception) -> bool:
    """Whether every later call of CUDA in this process fails too."""
    if DRY or isinstance(error, torch.OutOfMemoryError):
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError:
        return True
    return False


# ---- a model's tokens ---------------------------------------------------------------------------------------------------

GPT2 = {"vocabulary_size": 50257, "num_layers": 12, "num_heads": 12, "hidden_dim": 768, "intermediate_dim": 3072}
T5 = {"vocabulary_size": 32128, "num_layers": 12, "num_heads": 12, "hidden_dim": 768, "intermediate_dim": 2048}
T5 |= {"key_value_dim": 64, "activation": "gelu_new", "tie_embedding_weights": False}
TINY = {"vocabulary_size": 60, "num_layers": 1, "num_heads": 2, "hidden_dim": 32, "intermediate_dim": 48}
# (prompts, tokens of each, new tokens)
SHAPES = ((2, 5, 4),) if DRY else ((1, 32, 128), (1, 128, 128), (4, 100, 64))


def backbone(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """GPT-2 124M or T5 1.1 base with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        if name == "gpt2":
            model: Any = pyfused.GPT2Backbone(**(TINY if DRY else GPT2), max_sequence_length=64 if DRY else 1024, dtype=dtype)
        else:
            model = pyfused.T5Backbone(**{**T5, **TINY, "key_value_dim": 16} if DRY else T5, dtype=dtype)
    return model.eval()


def texts(shape: tuple[int, int, int], vocabulary: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(3, vocabulary, shape[:2], generator=draw).tolist()


def generate(start: int, name: str) -> Iterator[Row]:
    """Twice per shape with other allocations between; the tokens of the two, and of the reference, must agree; microseconds
    a token by default and with a backend forced."""
    model = backbone(name)
    for backend in (None, "cuda", "triton"):
        for shape in SHAPES:
            about = {"model": name, "backend": backend or "default", "shape": "x".join(map(str, shape))}
            yield {"begun": 0, **about}
            try:
                yield {**about, **_generated(model, backend, shape)}
            except Exception as error:
                if _is_sticky(error):
                    raise
                yield {**about, "ok": False, "error": f"{type(error).__name__}: {error}"[:1500]}


def _generated(model: Any, backend: str | None, shape: tuple[int, int, int]) -> Row:
    prompts, count = texts(shape, model.get_config()["vocabulary_size"]), shape[2]
    generator = pyfused.Generator(model)
    with running(backend, strict=False) if backend else contextlib.nullcontext():
        tokens = generator.generate(prompts, count)
        # A graph that reads memory which is no longer its own gives other tokens once something else lies there.
        kept = [torch.full((n << 10,), float("nan"), device=DEVICE) for n in ((1,) if DRY else (1, 64, 4096, 65536))]
        again = generator.generate(prompts, count)
        del kept
        whole = _seconds_of(lambda: generator.generate(prompts, count), 1 if DRY else 5)
        beginning = _seconds_of(lambda: generator.generate(prompts, 1), 1 if DRY else 5)
    with running("reference", strict=False):
        expected = pyfused.Generator(model).generate(prompts, count)
    agree = [_agree(model, *row) for row in zip(prompts, tokens, expected)]
    return {
        "ok": tokens == again and all(agree),
        "same_again": tokens == again,
        "as_reference": sum(agree),
        "equal_tokens": sum(a == b for row in zip(tokens, expected) for a, b in zip(*row)),
        "us_per_token": (whole - beginning) / (count - 1) * 1e6,
        "ms_first_token": beginning * 1e3,
    }


def _seconds_of(call: Callable[[], Any], times: int) -> float:
    samples = []
    for _ in range(times):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        samples.append(time.perf_counter() - began)
    return statistics.median(samples)


@torch.inference_mode()
def _agree(model: Any, prompt: list[int], found: list[int], expected: list[int]) -> bool:
    """Whether two greedy texts are equal, or part at two tokens that are nearer than the tolerance rule's errors."""
    at = next((i for i, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]), None)
    if at is None:
        return len(found) == len(expected)

    def logits(model: Any) -> torch.Tensor:
        with running("reference", strict=False):
            if isinstance(model, pyfused.GPT2Backbone):
                ids = torch.tensor([prompt + found[:at]], device=DEVICE)
                return model.logits(model(token_ids=ids, padding_mask=torch.ones_like(ids))[:, -1])[0]
            ids = torch.tensor([prompt], device=DEVICE)
            target = torch.tensor([[0, *found[:at]]], device=DEVICE)
            masks = {"encoder_padding_mask": torch.ones_like(ids), "decoder_padding_mask": torch.ones_like(target)}
            hidden = model(encoder_token_ids=ids, decoder_token_ids=target, **masks)
            return model.logits(hidden["decoder_sequence_output"][:, -1])[0]

    truth, shown = logits(copy.deepcopy(model).double()), logits(model)
    best, other = truth[[found[at], expected[at]]]
    return abs(best - other).item() <= 2 * judge(shown, shown, truth).worst_bound


def transformers(start: int, name: str) -> Iterator[Row]:
    """Hugging Face's model of the same size: eager, and with a static cache, which it compiles on a GPU."""
    from torch._dynamo.utils import counters
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    small = {"vocab_size": 60, "n_embd": 32, "n_layer": 1, "n_head": 2} if DRY else {}
    smaller = {"vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    base = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    with torch.device(DEVICE):
        if name == "gpt2":
            model: Any = GPT2LMHeadModel(GPT2Config(**small))
        else:
            model = T5ForConditionalGeneration(T5Config(**(smaller if DRY else base), **gated))
    model = model.to(torch.bfloat16).eval()
    for how, options in {"eager": {}, "static cache, compiled": {"cache_implementation": "static"}}.items():
        for shape in SHAPES[:1]:
            ids = torch.tensor(texts(shape, model.config.vocab_size), device=DEVICE)

            def call(count: int, ids: torch.Tensor = ids, options: Any = options) -> Any:
                fixed = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
                with torch.no_grad():
                    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **fixed)

            about = {"model": name, "how": how, "shape": "x".join(map(str, shape))}
            try:
                for _ in range(1 if DRY else 3):  # it is compiled at the first, and recorded as a graph at the second
                    call(shape[2])
                times = 1 if DRY else 3
                whole, beginning = (_seconds_of(lambda n=n: call(n), times) for n in (shape[2], 2))
                figure = (whole - beginning) / (shape[2] - 2) * 1e6
                yield {**about, "us_per_token": figure, "graphs": counters["stats"]["unique_graphs"]}
            except Exception as error:
                yield {**about, "ok": False, "error": f"{type(error).__name__}: {error}"[:1500]}


# ---- attention's peers ---------------------------------------------------------------------------------------------------


def _score_mod(table: torch.Tensor) -> Callable[..., torch.Tensor]:
    """T5's bias for FlexAttention, from the table by bucket."""
    from pyfused.kernels.buckets import distance_buckets

    buckets = distance_buckets(True, table.shape[0], 128, table.device)
    span = buckets.shape[0] // 2

    def score_mod(score, batch, head, query, key):
        return score + table[buckets[(key - query).clamp(-span, span) + span], head]

    return score_mod


def _flex(score_mod: Any, block_mask: Any) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    call: Any = flex_attention if DRY else torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: call(q, k, v, score_mod=score_mod, block_mask=block_mask)


def _attention_shapes() -> tuple[tuple[int, int, int, int], ...]:
    return ((1, 2, 40, 16),) if DRY else ((8, 16, 2048, 64), (4, 16, 2048, 128))


def _variants(h: int, s: int) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], Callable[..., Any]]]:
    """(name, options for pyfused, for SDPA, FlexAttention's call)."""
    from torch.nn.attention.flex_attention import create_block_mask

    causal = create_block_mask(lambda b, h, q, k: q >= k, None, None, s, s, device=DEVICE)
    table = torch.randn(32, h, device=DEVICE, dtype=torch.bfloat16)
    dense = pyfused.relative_bias(table, s, s, bidirectional=True)
    yield "", {}, {}, _flex(None, None)
    yield "T5 bias", {"relative_bias": pyfused.RelativeBias(table, True)}, {"attn_mask": dense}, _flex(_score_mod(table), None)
    yield "causal", {"is_causal": True}, {"is_causal": True}, _flex(None, causal)


def flex(start: int, compile: str) -> Iterator[Row]:
    """Compiles FlexAttention's kernels, while others run: `peers` finds them on the disk."""
    for b, h, s, d in _attention_shapes():
        q, k, v = _heads(b, h, s, d)
        for name, _, _, call in _variants(h, s):
            began = time.perf_counter()
            for t in (q, k, v):
                t.requires_grad_(d == 64)
            out = call(q, k, v)
            if d == 64:
                out.sum().backward()
            yield {"case": f"{d} {name}", "seconds": time.perf_counter() - began}


def _heads(b: int, h: int, s: int, d: int) -> list[torch.Tensor]:
    return [torch.randn(b, s, h, d, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]


def peers(start: int) -> Iterator[Row]:
    """Attention beside SDPA's backends by name and FlexAttention: milliseconds and TFLOP/s, each output checked."""
    for b, h, s, d in _attention_shapes():
        q, k, v = _heads(b, h, s, d)
        for backward in (False, True) if d == 64 or DRY else (False,):
            for name, own, options, by_flex in _variants(h, s):
                calls: dict[str, Callable[..., Any]] = {
                    "pyfused": lambda q, k, v, own=own: pyfused.attention(q, k, v, **own),
                    **{f"pyfused {x}": _forced(x, own) for x in ("triton", "cuda")},
                    **{f"sdpa {x}": _by_name(x, options) for x in ("flash", "cudnn", "efficient")},
                    "flex": by_flex,
                }
                flops = 4 * b * h * s * s * d * (0.5 if name == "causal" else 1) * (2.5 if backward else 1)
                title = f"{b}x{h}x{s}x{d} {'backward ' * backward}{name}".strip()
                for row in _compared(calls, options, (q, k, v), backward):
                    if "seconds" in row:
                        row["tflops"] = flops / row["seconds"] / 1e12
                    yield {"case": title, **row}


def _forced(backend: str, options: dict[str, Any]) -> Callable[..., Any]:
    def call(q, k, v):
        with running(backend):
            return pyfused.attention(q, k, v, **options)

    return call


def _by_name(name: str, options: dict[str, Any]) -> Callable[..., Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    which = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}[name]

    def call(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, which)):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return call


def _compared(calls: dict[str, Callable[..., Any]], options: Row, inputs: Any, backward: bool) -> Iterator[Row]:
    """The calls' times, in turn; of one that fails or is wrong, that."""

    def result(call: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if not backward:
            with torch.no_grad():
                return call(*tensors)
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(call(*leaves).square().sum() / 2, leaves[1])[0]

    first = [t[:1] for t in inputs]  # every entry of the batch is computed alike
    truth = result(lambda q, k, v: _plain(q, k, v, **options), [t.double() for t in first])
    plain = result(lambda q, k, v: _plain(q, k, v, **options), first)
    timed: dict[str, Callable[[], Any]] = {}
    for name, call in calls.items():
        try:
            found = judge(result(call, inputs)[:1], plain, truth)
        except Exception as error:
            yield {"provider": name, "missing": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        if not found.ok and name.startswith("pyfused"):
            yield {"provider": name, "ok": False, "ratio": found.ratio, "error": "outside the tolerance"}
            continue
        leaves = [t.detach().requires_grad_(backward) for t in inputs]
        with torch.set_grad_enabled(backward):
            out = call(*leaves)
        grad = torch.randn_like(out)
        if backward:
            timed[name] = lambda out=out, leaves=leaves, grad=grad: torch.autograd.grad(out, leaves, grad, retain_graph=True)
        else:
            timed[name] = lambda call=call: call(*inputs)
    with torch.set_grad_enabled(backward):
        for name, seconds in medians(timed).items():
            yield {"provider": name, "seconds": seconds, "ms": seconds * 1e3}


def _plain(q, k, v, attn_mask=None, is_causal=False):
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    s = s if attn_mask is None else s + attn_mask.to(s.dtype)
    if is_causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], device=s.device, dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(s, -1) @ v


def medians(calls: dict[str, Callable[[], Any]], rounds: int = 2 if DRY else 15) -> dict[str, float]:
    """Seconds on the device of each call, in turn, with a cold cache."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    flush = None if DRY else torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
    for round in range(rounds + 1):
        for name, call in calls.items():
            if DRY:
                seconds = _seconds_of(call, 1)
            else:
                flush.zero_()  # type: ignore[union-attr]
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                call()
                end.record()
                end.synchronize()
                seconds = begin.elapsed_time(end) / 1e3
            if round:
                samples[name].append(seconds)
    return {name: statistics.median(values) for name, values in samples.items()}


# ---- what a call costs the host -------------------------------------------------------------------------------------------


def host(start: int) -> Iterator[Row]:
    """Microseconds of the host for a call of each operator on tensors so small that the GPU keeps up."""
    import gpu_correct as c

    small = {
        "layer_norm": c.norm("layer_norm", 1, 8, True),
        "rms_norm": c.norm("rms_norm", 1, 8, True),
        "linear": c.linear(1, 64, 64),
        "ffn": c.ffn(1, 64, 64),
        "gated_ffn": c.gated_ffn(1, 64, 64),
        "fourier_mix": c.fourier_mix(1, 2, 8),
        "relative_bias": c.relative_bias(2, 1, 8, True),
        "attention": c.attention(1, 2, 2, 1, 8, 16),
    }
    for operator, case in small.items():
        tensors = {k: c._random(k, shape, torch.bfloat16, DEVICE) for k, shape in case.shapes.items()}
        for backend in (None, "triton", "cuda", "reference"):
            try:
                with running(backend) if backend else contextlib.nullcontext(), torch.no_grad():
                    seconds = _of_the_host(lambda case=case, tensors=tensors: case.own(tensors))
            except dispatch.BackendError:
                continue
            yield {"operator": operator, "backend": backend or "default", "us": seconds * 1e6}


def _of_the_host(call: Callable[[], Any]) -> float:
    calls, best = 2 if DRY else 200, float("inf")
    for _ in range(2 if DRY else 6):
        synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - began) / calls)
    return best


# ---- other commands -------------------------------------------------------------------------------------------------------


def tune(start: int, *operators: str) -> Iterator[Row]:
    """`pyfused tune` on some operators: a row for each line of evidence."""
    for content in _from_command(lambda seconds, file: gpu.tune_command(operators, seconds, file)):
        for line in content.get("lines", ()):
            yield {"operator": line.get("operator"), "dtype": line.get("dtype"), "line": line}
        for refused in content.get("refused", ()):
            yield {"refused": refused, "ok": False}


BENCHMARKS = ("attention", "layer_norm", "rms_norm", "gated_ffn", "ffn", "linear", "fourier_mix", "gpt2", "t5")


def bench(start: int) -> Iterator[Row]:
    """`pyfused bench`: a row for each of its cases."""
    for content in _from_command(lambda seconds, file: gpu.bench_command(BENCHMARKS, seconds, file)):
        for name, rows in content.get("benchmarks", {}).items():
            for row in rows:
                yield {"benchmark": name, "case": row.get("case"), "row": row}


def _from_command(command: Callable[[float, str], list[str]]) -> Iterator[Row]:
    """What a command of pyfused saved in a file; what there is of it, too, where it fails or runs out of time."""
    seconds = max(left() - 6, 1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "saved.json"
        arguments = [sys.executable, "-m", "pyfused", *command(seconds - 5, str(file))]
        try:
            done = subprocess.run(arguments, cwd=gpu.ROOT, timeout=seconds)
            failed = f"exit status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            failed = f"not done in {seconds:.0f} s"
        if file.exists():
            yield json.loads(file.read_text())
        if failed:
            raise RuntimeError(f"{' '.join(arguments[1:])}: {failed}")


KEPT = ("Duration", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput", "L2 Cache Throughput")
KEPT += ("Registers Per Thread", "Theoretical Occupancy", "Achieved Occupancy", "Grid Size", "Block Size")


def profile(start: int) -> Iterator[Row]:
    """What Nsight Compute says of five calls, a row for each kernel. The card's clocks are left as they are."""
    tool = shutil.which("ncu")
    if tool is None:
        raise RuntimeError("ncu is not on the PATH")
    sections = [f"--section={name}" for name in ("SpeedOfLight", "Occupancy", "LaunchStats")]
    options = ["--csv", "--page=details", "--clock-control=none", "--profile-from-start=off", "--launch-count=40"]
    command = [tool, *sections, *options, sys.executable, gpu.__file__, "--item", "kernels"]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=max(left() - 5, 5))
    yield from profiled(done.stdout)
    if done.returncode:
        raise RuntimeError(f"ncu: exit status {done.returncode}\n{done.stdout[-800:]}{done.stderr[-800:]}")


def profiled(text: str) -> list[Row]:
    """The rows of ncu's CSV: {"kernel", "metrics": {name: "value unit"}}."""
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows: dict[str, Row] = {}
    for found in csv.DictReader(line for line in lines[header:] if line.startswith('"')):
        row = rows.setdefault(found["ID"], {"kernel": found["Kernel Name"][:120], "metrics": {}})
        if found["Metric Name"] in KEPT:
            row["metrics"][found["Metric Name"]] = f"{found['Metric Value']} {found['Metric Unit']}".strip()
    return list(rows.values())


def kernels(start: int) -> Iterator[Row]:
    """The five calls that `profile` looks at."""
    b, h, s, d = _attention_shapes()[0]
    q, k, v = (t.requires_grad_() for t in _heads(b, h, s, d))
    table = torch.randn(32, h, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(16 if DRY else 16384, 32 if DRY else 1024, device=DEVICE, dtype=torch.bfloat16)
    w_wide = torch.randn(48 if DRY else 50257, 32 if DRY else 768, device=DEVICE, dtype=torch.bfloat16)
    row, weight = torch.randn(1, w_wide.shape[1], device=DEVICE, dtype=torch.bfloat16), x[0].clone()
    plain, biased = (pyfused.attention(q, k, v, relative_bias=bias) for bias in (None, pyfused.RelativeBias(table, True)))
    calls = {
        "attention": lambda: pyfused.attention(q.detach(), k.detach(), v.detach()),
        "attention with T5's bias": lambda: pyfused.attention(q, k, v, relative_bias=pyfused.RelativeBias(table, True)),
        "attention backward": lambda: torch.autograd.grad(plain, (q, k, v), plain.detach(), retain_graph=True),
        "layer_norm": lambda: pyfused.layer_norm(x, weight, weight, residual=x),
        "linear, one row": lambda: pyfused.linear(row, w_wide),
    }
    del biased
    for name, call in calls.items():
        call()
        synchronize()
        with contextlib.nullcontext() if DRY else torch.cuda.profiler.profile():
            call()
            synchronize()
        yield {"called": name}


ITEMS: dict[str, Callable[..., Iterator[Row]]] = {
    f.__name__: f
    for f in (environment, correct, generate, transformers, flex, peers, host, tune, bench, profile, kernels)
}
