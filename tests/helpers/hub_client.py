"""A Python process of its own that uses the Hub: with the real client, its own HF_HOME, and with or without byol_timm.

One process serves many tests, since importing torch and timm takes seconds.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import textwrap
import traceback


class Client:
    """`run(code)` executes code over there; what it leaves in `result` comes back, what it raises comes as `Failed`."""

    def __init__(self, home, hub_url, *, byol_timm=True, **environment):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment = {
            **kept,
            "HF_ENDPOINT": hub_url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        command = [sys.executable, __file__, "with" if byol_timm else "without"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=home
        )
        self.home, self.output = home, ""

    def run(self, code, **values):
        request = json.dumps({"code": textwrap.dedent(code), "values": {k: str(v) for k, v in values.items()}})
        print(request, file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        self.output += answer["output"]
        if answer["error"]:
            raise Failed(*answer["error"])
        return answer["result"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)


class Failed(Exception):
    """kind: class of the error; exit_code: of a ByolTimmError, else None; text: its message."""

    def __init__(self, kind, exit_code, text, trace):
        super().__init__(trace)
        self.kind, self.exit_code, self.text = kind, exit_code, text


class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "byol_timm":
            raise ModuleNotFoundError(f"no {name} here")


def serve():
    answers = os.fdopen(os.dup(1), "w")
    if sys.argv[1] == "without":
        sys.meta_path.insert(0, Blocker())
    for line in sys.stdin:
        request = json.loads(line)
        names = dict(request["values"])
        output, error = io.StringIO(), None
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                exec(compile(request["code"], "<test>", "exec"), names)
            except Exception as raised:
                exit_code = raised.exit_code if "byol_timm" in type(raised).__module__ else None
                error = [type(raised).__name__, exit_code, str(raised), traceback.format_exc()]
        answer = {"result": names.get("result"), "error": error, "output": output.getvalue()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
