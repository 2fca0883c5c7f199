"""Do the real clients of Hugging Face and Kaggle bring a preset here, and is everything that goes wrong said in one line?

They talk to tests/checkpoints/hub_server.py, in processes of their own (hub_client.py).
"""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from hub_server import COMMIT, HubServer, Model

from pyfused.checkpoints import open_checkpoint

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = 20  # nothing may hang longer; all of it takes less than two


class Client:
    """A process that downloads."""

    def __init__(self, home: Path, hugging_face: str, kaggle: str, errors: int = subprocess.PIPE):
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH") if name in os.environ}
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "hub_client.py"), kaggle],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=kept | {
                "HOME": str(home), "HF_HOME": str(home / "hugging_face"), "KAGGLEHUB_CACHE": str(home / "kaggle"),
                "HF_ENDPOINT": hugging_face, "KAGGLE_API_ENVIRONMENT": "LOCALHOST", "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                "NO_PROXY": "*", "OMP_NUM_THREADS": "1",
            },
        )  # fmt: skip

    def ask(self, preset: str, want: str = "weights", *, offline: bool = False, quiet: bool = False) -> dict:
        self.process.stdin.write(
            json.dumps({"preset": preset, "want": want, "offline": offline, "quiet": quiet}) + "\n"
        )
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert answer["stdout"] == ""
        assert answer["seconds"] < SECONDS
        return answer

    def fetch(self, preset: str, want: str = "weights", **options: bool) -> Path:
        answer = self.ask(preset, want, **options)
        assert "error" not in answer, answer["error"]
        return Path(answer["directory"])

    def refusal(self, preset: str, want: str = "weights", **options: bool) -> str:
        answer = self.ask(preset, want, **options)
        assert answer["kind"] == "ValueError", answer
        assert "\n" not in answer["error"]
        assert preset in answer["error"]
        return answer["error"]

    def close(self):
        self.process.stdin.close()
        errors = self.process.stderr.read() if self.process.stderr else ""
        self.process.wait(SECONDS)
        self.process.stdout.close()
        assert errors == ""  # no bars and no logs where stderr is no terminal


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server():
    made = HubServer()
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(home, server):
    """One with a network."""
    made = Client(home, server.url, server.url)
    yield made
    made.close()


@pytest.fixture(scope="module")
def unplugged(home):
    """One that reaches nobody, with the same caches."""
    made = Client(home, "http://127.0.0.1:9", "http://127.0.0.1:9")
    yield made
    made.close()


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


HUBS = {"hf://": ("hf_gpt2", "hf://tests/{}"), "kaggle://": ("keras_gpt2_task", "kaggle://tests/{}/keras/small/3")}


@pytest.fixture(params=HUBS)
def publish(request, server, golden):
    """A function that puts the golden model on one of the hubs under a name and with a fault, and returns the handle."""
    source, handle = HUBS[request.param]

    def put(name: str, fault: str = "", **options) -> str:
        name = f"{name}_{request.param.removesuffix('://')}"
        model = options.pop("files", None) or files(golden / "ckpt" / source)
        place = handle.format(name).removeprefix(request.param).removesuffix("/3")
        server.models[place] = Model(model, fault, **options)
        put.model, put.place = server.models[place], place
        return handle.format(name)

    put.hub, put.source = request.param, golden / "ckpt" / source
    return put


def equal(directory: Path, other: Path, same) -> None:
    same(open_checkpoint(directory).tensors(), open_checkpoint(other).tensors())


def test_a_whole_file(client, publish, same):
    directory = client.fetch(publish("whole"))
    equal(directory, publish.source, same)
    before = len(publish.model.asked)
    assert client.fetch(publish("whole")) == directory  # from the cache
    assert not any("safetensors" in path or "storage" in path for _, path, _ in publish.model.asked[before:])


def test_only_what_is_needed(client, publish):
    handle = publish("parts")
    names = {path.name for path in client.fetch(handle, "config").rglob("*") if path.is_file()}
    assert names == {"config.json"}
    names = {path.name for path in client.fetch(handle, "tokenizer").rglob("*") if path.is_file()}
    assert "config.json" in names
    assert not any(name.endswith((".safetensors", ".h5")) for name in names)


def test_a_model_in_parts(client, server, golden, same):
    for source, place, handle in (
        ("hf_t5_sharded", "tests/sharded", "hf://tests/sharded"),
        ("keras_t5_sharded", "tests/sharded/keras/small", "kaggle://tests/sharded/keras/small/3"),
    ):
        server.models[place] = Model(files(golden / "ckpt" / source))
        equal(client.fetch(handle), golden / "ckpt" / source, same)


def test_revisions(client, server, golden):
    server.models["tests/revised"] = model = Model(files(golden / "ckpt" / "hf_gpt2"), revisions=("v1.0", "refs/pr/1"))
    for revision in ("v1.0", "refs/pr/1", COMMIT):
        assert client.fetch(f"hf://tests/revised@{revision}", "config").name == COMMIT
    assert any("v1.0" in path for _, path, _ in model.asked)
    said = client.refusal("hf://tests/revised@v2.0", "config")
    assert "Hugging Face has no such revision (404); it takes a branch, a tag or a commit" in said
    server.models["tests/versioned/keras/small"] = Model(files(golden / "ckpt" / "keras_gpt2_task"), version=7)
    assert client.fetch("kaggle://tests/versioned/keras/small").name == "7"  # the newest, as the server says


def test_an_interrupted_download_goes_on(client, publish, same):
    handle = publish("interrupted", "cut 1")
    if publish.hub == "kaggle://":  # its client gives up at once, and goes on in the next call
        assert "broke off in the middle of a file: run it again" in client.refusal(handle)
    equal(client.fetch(handle), publish.source, same)
    ranges = {asked for _, _, asked in publish.model.asked if asked}
    assert ranges
    assert all(int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) > 0 for asked in ranges)


@pytest.mark.parametrize("fault, said", [
    ("cut 999", "broke off in the middle of a file: run it again"),
    ("silent", "stopped answering"),
    ("flipped", "arrived damaged.*removed.*run it again"),
    ("short", "arrived damaged.*removed.*run it again"),
    ("gone", r"\(404\)"),
    ("restart", "broke off in the middle of a file"),
])  # fmt: skip
def test_half_a_file_is_never_loaded(client, publish, fault, said, same):
    handle = publish(f"half_{fault.split()[0]}", fault)
    for _ in range(1 if fault == "silent" else 2):
        assert re.search(said, client.refusal(handle))
    publish.model.fault = ""
    if fault == "restart" and publish.hub == "kaggle://":  # which went on behind the half that it had
        assert "arrived damaged" in client.refusal(handle)
    equal(client.fetch(handle), publish.source, same)  # and nothing of it stays


def test_a_leftover_of_the_right_size_is_not_trusted(client, server, home, golden, same):
    source = golden / "ckpt" / "keras_gpt2_task"
    server.models["tests/leftover/keras/small"] = model = Model(files(source))
    left = home / "kaggle" / "models" / "tests" / "leftover" / "keras" / "small" / "3" / "model.weights.h5"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(len(model.files[left.name])))
    equal(client.fetch("kaggle://tests/leftover/keras/small/3"), source, same)


@pytest.mark.parametrize("status, said", [
    (401, r"refused it \(401\): .* private .* log in with"),
    (403, r"refused it \(403\): .* consent; .* log in with"),
    (404, r"has nothing of this name \(404\); check the spelling"),
    (429, r"too many requests \(429\): wait .*, or log in"),
    (503, r"failed \(503\); try again later"),
])  # fmt: skip
def test_what_the_server_refuses(client, publish, status, said):
    assert re.search(said, client.refusal(publish(f"refused_{status}", f"status {status}")))


def test_what_is_no_preset(client, server):
    server.models["tests/no_config"] = Model({"README.md": b"text"})
    assert "has no config.json, so it is not a preset" in client.refusal("hf://tests/no_config")
    server.models["tests/other"] = Model({"config.json": b"{}", "tf_model.h5": b"x" * 2048})
    said = client.refusal("hf://tests/other")
    assert "only as tf_model.h5" in said
    assert "hf://tests/other@refs/pr/1" in said
    assert "config.json cannot be downloaded: Kaggle has nothing" in client.refusal(
        "kaggle://tests/nobody/keras/small/3", "config"
    )


def test_pickled_weights_where_there_are_no_others(client, server):
    files = {"config.json": b"{}", "pytorch_model.bin": b"x" * 2048, "tf_model.h5": b"y" * 2048}
    server.models["tests/pickled"] = Model(files)
    server.models["tests/both"] = Model(files | {"model.safetensors": b"z" * 2048})
    names = [{path.name for path in Path(client.fetch(f"hf://tests/{name}")).iterdir()} for name in ("pickled", "both")]
    assert names == [{"config.json", "pytorch_model.bin"}, {"config.json", "model.safetensors"}]


def test_without_a_network(client, unplugged, publish):
    handle = publish("kept")
    directory = client.fetch(handle)
    assert unplugged.fetch(handle) == unplugged.fetch(handle, offline=True) == directory
    assert unplugged.fetch(handle, "tokenizer") == directory
    other = handle.replace("kept", "never_kept")
    assert "cannot be reached, and the cache lacks it: check the network" in unplugged.refusal(other)
    if publish.hub == "hf://":
        assert "HF_HUB_OFFLINE forbids to download it" in unplugged.refusal(other, offline=True)
        config_alone = publish("config_alone")
        client.fetch(config_alone, "config")
        assert "not, or not wholly, in the cache" in unplugged.refusal(config_alone, offline=True)
    else:
        answer = unplugged.ask(handle.removesuffix("/3"))  # nobody says which version is the newest
        assert answer["directory"] == str(directory)
        assert "The newest version in the cache is used, 3" in answer["warnings"][0]


def test_published_names(client, unplugged, server, golden, same):
    server.models["keras/gpt2/keras/gpt2_base_en"] = Model(files(golden / "ckpt" / "keras_gpt2_task"))
    equal(client.fetch("gpt2_base_en"), golden / "ckpt" / "keras_gpt2_task", same)
    unplugged.fetch("gpt2_base_en")
    said = client.refusal("gpt2_medium_en")
    assert said.startswith("preset 'gpt2_medium_en', kaggle://keras/gpt2/keras/gpt2_medium_en/3: cannot be downloaded")
    assert said.endswith("The same weights are at hf://openai-community/gpt2-medium")


def test_progress_on_a_terminal(home, server, golden):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))  # bars need some room
    client, written = Client(home, server.url, server.url, theirs), []
    os.close(theirs)

    def read():
        with contextlib.suppress(OSError):  # the end
            while piece := os.read(ours, 4096):
                written.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    for number, quiet in enumerate((False, True, False)):
        server.models[f"tests/bars{number}"] = Model(files(golden / "ckpt" / "hf_gpt2"))
        server.models[f"tests/bars{number}/keras/small"] = Model(files(golden / "ckpt" / "keras_gpt2_task"))
        client.fetch(f"hf://tests/bars{number}", quiet=quiet)
        client.fetch(f"kaggle://tests/bars{number}/keras/small/3", quiet=quiet)
    client.close()
    reader.join(SECONDS)
    os.close(ours)
    before, *parts = b"".join(written).decode(errors="replace").split("pyfused: fetching ")
    assert before == ""
    places = ("hf://tests/bars0", "kaggle://tests/bars0", "hf://tests/bars2", "kaggle://tests/bars2")
    assert len(parts) == len(places)
    for part, place in zip(parts, places):
        assert part.startswith(place)
        assert "100%|" in part
