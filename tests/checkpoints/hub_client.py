"""A process that downloads what it is told to, one JSON object a line: {"preset", "want"} -> {"directory"} or {"error"}.

Both clients read the environment when they are imported, so that each environment needs a process. Their waits between two
attempts are cut to a hundredth, Kaggle's limits to a second, and their pieces to 256 bytes, so that a small file has many.
"""

import contextlib
import io
import json
import sys
import time
import traceback
import warnings


def main(kaggle_endpoint: str) -> None:
    import kagglehub.clients
    import kagglesdk.kaggle_env as kaggle
    from huggingface_hub import constants

    kaggle._env_to_endpoint[kaggle.KaggleEnv.LOCAL] = kaggle_endpoint
    kagglehub.clients.DEFAULT_READ_TIMEOUT = 1
    kagglehub.clients.CHUNK_SIZE = constants.DOWNLOAD_CHUNK_SIZE = 256
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(seconds / 100)

    from pyfused.checkpoints import quiet, resolve_preset

    answers = sys.stdout
    for line in sys.stdin:
        asked = json.loads(line)
        constants.HF_HUB_OFFLINE = asked["offline"]  # as the variable of this name would set it
        out, began = io.StringIO(), time.monotonic()
        silence = quiet() if asked["quiet"] else contextlib.nullcontext()
        with silence, contextlib.redirect_stdout(out), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                answer = {"directory": str(resolve_preset(asked["preset"], asked["want"]))}
            except (ValueError, ImportError) as error:
                answer = {"error": str(error), "kind": type(error).__name__}
            except BaseException:
                answer = {"error": traceback.format_exc(), "kind": "uncaught"}
        answer |= {"seconds": time.monotonic() - began, "stdout": out.getvalue()}
        answer["warnings"] = [str(warning.message) for warning in caught if warning.category is UserWarning]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
