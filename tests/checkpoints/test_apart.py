"""Does a reader in a child process end in time and memory, wherever it is started, and does its absence get said?"""

import json
import os
import pickle
import resource
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from test_pickled_weights import LAUGHS, as_zip

from pyfused.checkpoints import apart, open_checkpoint

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}


@pytest.fixture
def laughing(preset):
    """A folder whose pickle takes for ever."""
    directory = preset("hf_gpt2")
    (directory / "model.safetensors").unlink()
    as_zip(directory / "pytorch_model.bin", LAUGHS + b"}h\x3cK\x01s.")
    return directory


def test_a_reader_that_never_ends_is_ended(laughing):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(ValueError, match="unpickler did not finish within 1 s of computing: the file is damaged"):
        open_checkpoint(laughing)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_a_reader_that_crashes_is_an_error(preset, monkeypatch, tmp_path):
    source = Path(apart.child.__file__).read_text().replace("answer(READY)", "answer(READY); os.abort()")
    script = tmp_path / "child.py"
    script.write_text(source)
    (tmp_path / "h5.py").write_text("def prepare(): pass\nentries = None\n")
    monkeypatch.setattr(apart.child, "__file__", str(script))
    with pytest.raises(ValueError, match=r"model.weights.h5: .*the HDF5 library broke off: the file is damaged"):
        open_checkpoint(preset("keras_gpt2"))


def test_memory_is_limited(tmp_path):
    path = tmp_path / "big.bin"
    as_zip(path, b"\x80\x02" + b"]" * 20_000_000)  # a list of 56 bytes for each
    code = (
        "import resource, sys; from pathlib import Path; from pyfused.checkpoints import apart\n"
        "try: apart.SECONDS = 9; apart.read_apart('pickled', [Path(sys.argv[1])])\n"
        "except ValueError as error: print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    most, error = done.stdout.split(maxsplit=1)
    assert int(most) < 1 << 20, most  # KiB
    assert "big.bin: cannot be read as a pickle of torch.save: its structure takes more memory" in error


def test_threads_daemons_and_closed_streams(golden):
    """Started from a thread, from a daemonic process, and in a program without standard streams or in another folder."""
    directory = golden / "ckpt" / "keras_gpt2"
    expected = len(open_checkpoint(directory).shapes)
    found = []
    threads = [threading.Thread(target=lambda: found.append(len(open_checkpoint(directory).shapes))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3
    code = (
        "import multiprocessing, os, sys; os.close(0); os.close(2); os.chdir('/')\n"
        "from pyfused.checkpoints import open_checkpoint\n"
        "def read(): print(len(open_checkpoint(sys.argv[1]).shapes), 'h5py' in sys.modules, flush=True)\n"
        "read()\n"
        "process = multiprocessing.get_context('fork').Process(target=read, daemon=True)\n"
        "process.start(); process.join()"
    )
    done = subprocess.run([sys.executable, "-c", code, directory], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == [str(expected), "False"] * 2


@pytest.mark.parametrize("broken", ["frozen", "embedded", "no interpreter", "not startable", "dies"])
def test_without_a_child_the_file_is_read_here_and_a_warning_says_so(
    golden, preset, same, monkeypatch, tmp_path, broken
):
    twin = dict(open_checkpoint(golden / "ckpt" / "hf_gpt2").tensors())
    if broken == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    elif broken == "dies":
        script = tmp_path / "child.py"
        script.write_text("raise SystemExit(3)")
        monkeypatch.setattr(apart.child, "__file__", str(script))
    else:
        names = {"embedded": "/usr/bin/blender", "no interpreter": None, "not startable": str(tmp_path / "python3")}
        monkeypatch.setattr(sys, "executable", names[broken])
    with pytest.warns(
        UserWarning, match="model.weights.h5: read without limits on time and memory, since no process"
    ) as seen:
        checkpoint = open_checkpoint(golden / "ckpt" / "keras_gpt2")
    assert [warning.filename for warning in seen] == [__file__]
    same(checkpoint.tensors(), twin)
    directory = preset("hf_gpt2")
    (directory / "model.safetensors").unlink()
    as_zip(directory / "pytorch_model.bin", pickle.dumps({"x": os.getcwd}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"needs .*getcwd, which is more than a dictionary of tensors"):
            open_checkpoint(directory)


def test_one_child_reads_all_shards(golden, monkeypatch):
    started = []
    run = subprocess.run
    monkeypatch.setattr(apart.subprocess, "run", lambda *a, **k: started.append(json.loads(k["input"])) or run(*a, **k))
    open_checkpoint(golden / "ckpt" / "keras_t5_sharded")
    assert [len(request["files"]) for request in started] == [
        len(list((golden / "ckpt/keras_t5_sharded").glob("*.h5")))
    ]
    open_checkpoint(golden / "ckpt" / "hf_gpt2")
    assert len(started) == 1  # safetensors need none


def test_without_h5py(preset, monkeypatch, tmp_path):
    (tmp_path / "h5py.py").write_text("raise ModuleNotFoundError(\"No module named 'h5py'\")")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"Keras weights need h5py: pip install 'pyfused\[keras\]'"):
        open_checkpoint(preset("keras_gpt2"))


def test_a_model_of_many_variables_is_read_in_time(tmp_path):
    path = tmp_path / "many.h5"
    with h5py.File(path, "w") as file:
        for i in range(400):
            file[f"layers/layer_{i}/part/vars/0"] = np.zeros(1, "f4")
    (entries,) = apart.read_apart("h5", [path]).values()
    assert [entry.dtype for entry in entries] == [torch.float32] * 400
