"""What would torch.cuda's calls do on a machine with two GPUs? A stand-in for devices, streams and captures logs each call,
for tests without a GPU."""

from __future__ import annotations

import contextlib

import torch


class Stream:
    def __init__(self, machine, device=None):
        self.machine, self.device = machine, machine.index(device)

    def wait_stream(self, other):
        self.machine.log.append(("wait", self.device, other.device))

    def synchronize(self):
        self.machine.log.append(("synchronize", self.device))


class Machine:
    """Two GPUs; device 0 is current, as by default.

    Attributes:
        log: the events in order: ("capture", device of the stream, current device), ("synchronize", device), ...
        capturing: whether the current stream is capturing.
    """

    def __init__(self, monkeypatch):
        self.device, self.log, self.capturing = 0, [], False
        self.streams = [Stream(self, 0), Stream(self, 1)]
        for name, stand_in in {
            "current_device": lambda: self.device,
            "current_stream": lambda device=None: self.streams[self.index(device)],
            "device": self._device,
            "stream": self._stream,
            "graph": self._graph,
            "Stream": lambda device=None: Stream(self, device),
            "CUDAGraph": lambda: self,
            "is_current_stream_capturing": lambda: self.capturing,
            "is_available": lambda: True,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def index(self, device):
        if isinstance(device, int):
            return device
        index = None if device is None else torch.device(device).index
        return self.device if index is None else index

    def replay(self):
        self.log.append(("replay", self.device))

    @contextlib.contextmanager
    def _device(self, device):
        before, self.device = self.device, self.index(device)
        yield
        self.device = before

    @contextlib.contextmanager
    def _stream(self, stream):
        with self._device(stream.device):
            before, self.streams[stream.device] = self.streams[stream.device], stream
            yield
            self.streams[stream.device] = before

    @contextlib.contextmanager
    def _graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        self.log.append(("synchronize", self.device))
        with self._stream(stream or Stream(self)):  # torch makes a default stream on the current device
            self.capturing = True
            yield
            self.capturing = False


class Pointer:
    """A tensor on an imaginary GPU, as a launcher sees it."""

    is_cuda, is_cpu = True, False

    def __init__(self, index):
        self.device = torch.device("cuda", index)
