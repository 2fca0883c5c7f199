"""Do the GPU kernels work on any stream, on several at once, and inside a CUDA graph?"""

import operator_calls
import pytest
import torch

from pyfused import dispatch
from pyfused.testing import running

pytestmark = pytest.mark.gpu
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    return request.param


@pytest.fixture(params=DTYPES)
def call(request, name, backend):
    """A call on one backend, warmed up (Triton kernels compile), and its results; skipped if the backend lacks the case."""
    prepared = operator_calls.prepared(name, "cuda", DTYPES[request.param])

    def run():
        torch.manual_seed(3)  # for dropout
        with running(backend):
            return [t.clone() for t in prepared()]

    try:
        expected = run()
    except dispatch.BackendError:
        pytest.skip(f"{backend} leaves this case to another backend")
    return run, expected


def same(results, expected):
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert all(torch.isfinite(t).all() for t in results)


@pytest.mark.parametrize("name", operator_calls.CALLS)
def test_several_streams_give_the_same_bits(call):
    run, expected = call
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    torch.cuda.synchronize()
    for stream in streams * 3:
        with torch.cuda.stream(stream):
            results.append(run())
    torch.cuda.synchronize()
    for result in results:
        same(result, expected)


@pytest.mark.parametrize("name", [name for name in operator_calls.CALLS if "dropout" not in name])
def test_a_replayed_graph_gives_the_same_bits(name, backend):
    prepared = operator_calls.prepared(name, "cuda", torch.bfloat16)
    try:
        with running(backend):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                expected = [t.clone() for t in prepared()]
                prepared()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = prepared()
    except dispatch.BackendError:
        pytest.skip(f"{backend} leaves this case to another backend")
    for _ in range(3):
        for t in outputs:
            t.zero_()
        graph.replay()
        torch.cuda.synchronize()
        same(outputs, expected)
