"""Saves over an old checkpoint in child processes, kills each at another line, and prints what was left as JSON.

python kill_while_saving.py DIRECTORY KILLS EXCHANGE: DIRECTORY is made. EXCHANGE is 0 to have no renameat2.
"""

import json
import os
import shutil
import signal
import sys
from hashlib import sha256
from pathlib import Path

import torch

from pyfused import FNetBackbone, GPT2Backbone
from pyfused.checkpoints import open_checkpoint, replace, resolve_preset

torch.set_num_threads(1)
ROOT, KILLS, EXCHANGE = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1"
TARGET, WATCHED = (
    ROOT / "model",
    ("replace.py", "part_names.py", "save.py", "hf_write.py", "keras_write.py", "stored.py", "shutil.py"),
)
OTHERS = {"notes.txt": b"mine", "logs/run 1/log.txt": b"a log"}
OLD = FNetBackbone(29, 2, 12, 20, max_sequence_length=16)
NEW = GPT2Backbone(29, 2, 3, 12, 20, max_sequence_length=16)
if not EXCHANGE:
    replace._exchange = lambda first, second: False


def old_checkpoint():
    shutil.rmtree(ROOT, ignore_errors=True)
    OLD.save_to_preset(TARGET, "hf", tokenizer="fnet_tiny_en")
    for name, content in OTHERS.items():
        (TARGET / name).parent.mkdir(parents=True, exist_ok=True)
        (TARGET / name).write_bytes(content)


def save():
    NEW.save_to_preset(TARGET, "keras", max_shard_size=4000, tokenizer="gpt2_tiny_en")


def files():
    """The digest of every file of the directory; Keras's metadata.json holds the date and counts by its name."""
    found = {path.relative_to(TARGET).as_posix(): path for path in TARGET.rglob("*") if path.is_file()}
    return {
        name: "" if name == "metadata.json" else sha256(path.read_bytes()).hexdigest() for name, path in found.items()
    }


def in_child(last):
    """Saves in a child that dies at line ``last`` of the watched files, if any.
    Returns the lines it ran, or -1 if it died."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        lines = 0

        def count(frame, event, argument):
            nonlocal lines
            if not frame.f_code.co_filename.endswith(WATCHED):
                return None
            lines += event == "line"
            if event == "line" and lines == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return count

        sys.settrace(count)
        save()
        sys.settrace(None)
        os.write(writing, str(lines).encode())
        os._exit(0)
    os.close(writing)
    text = os.read(reading, 100)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    return int(text) if status == 0 else -1


old_checkpoint()
before = files()
lines = in_child(None)
after = files()
outcomes = []
few = KILLS // 4  # over all lines; the others fall where the files change places
end = lines * 3 // 4
places = [1 + end * number // few for number in range(few)]
places += [end + (lines - end) * (number + 1) // (KILLS - few) for number in range(KILLS - few)]
for last in places:
    old_checkpoint()
    assert in_child(last) == -1, last
    raw = files()
    raw = "old" if raw == before else "new" if raw == after else "mixed"
    resolve_preset(TARGET)  # as every reader does
    found = files()
    model = open_checkpoint(TARGET).model
    outcome = {
        "line": last,
        "raw": raw,
        "read": "old" if found == before else "new" if found == after else "mixed",
        "model": model,
    }
    for path in ROOT.glob(".*"):  # as if some minutes had passed
        os.utime(path, (0, 0))
    for path in TARGET.glob(".*"):
        os.utime(path, (0, 0))
    save()
    outcome["left"] = sorted(path.name for path in (*ROOT.iterdir(), *TARGET.glob(".*")) if path != TARGET)
    outcome["again"] = files() == after
    outcomes.append(outcome)
print(json.dumps({"lines": lines, "outcomes": outcomes}))
