"""How do tests write evidence? Into an empty cache folder, a line at a time."""

import json
from contextlib import contextmanager

from pyfused import dispatch, evidence


def row(operator="linear", dtype="float32", shapes="small", threads=1, function="forward", **speed):
    about = {"function": function, "date": "2026-01-02", "torch": "2.13.0"}
    return {"operator": operator, "dtype": dtype, "shapes": shapes, "threads": threads, **about, "speed": {"cpu": speed}}


@contextmanager
def empty_cache(folder, monkeypatch):
    """Makes `folder` the user's cache folder; yields a function that writes this machine's file into it."""
    monkeypatch.setenv("PYFUSED_EVIDENCE", str(folder))
    dispatch.forget()

    def write(*rows, text=None, kind=None):
        path = evidence.own_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or json.dumps({"kind": kind or evidence.kind(), "lines": rows}))
        dispatch.forget()
        return path

    yield write
    monkeypatch.undo()
    dispatch.forget()
