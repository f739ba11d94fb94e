"""loratrf-serve as users start it: a process of its own, in which training's frameworks can't be imported."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from shared import FRAMEWORKS


class Served(NamedTuple):
    """A server that runs."""

    url: str
    process: subprocess.Popen[str]
    adapters: list[str]

    def post(self, path: str, **body: Any) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return httpx.post(f"{self.url}{path}", content=json.dumps(body), headers=headers, timeout=60)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == name)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextlib.contextmanager
def serving(folder: Path, *options: object) -> Iterator[Served]:
    """The server on the model in `folder`, at a port that is free."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({FRAMEWORKS}));"
        "from loratrf_deploy.cli.serve import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "--model", str(folder), "--port", "0", "--json", *map(str, options)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdout is not None
        said = ""
        while not said.endswith("}\n"):
            line = process.stdout.readline()
            assert line, "the server ended"
            said += line
        ready = json.loads(said)
        try:
            yield Served(ready["url"], process, ready["adapters"])
        finally:
            process.kill()


def fault(response: httpx.Response, status: int, code: str | None = None) -> str:
    """The message of an error in OpenAI's form, one line of at most 1,000 characters."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code
    assert "\n" not in error["message"]
    assert len(error["message"]) <= 1000
    return error["message"]


def check_described(served: Served, examples: int = 15) -> None:
    """What schemathesis makes of the description: valid and invalid requests, each answered as described."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import checks

    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    chosen = checks.CHECKS.get_all()
    # A right request for a model that there isn't is refused, which schemathesis can't know.
    unfit = [check for check in chosen if check.__name__ in ("positive_data_acceptance", "ignored_auth")]
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            nonlocal count
            case.call_and_validate(excluded_checks=unfit, timeout=30)
            count += 1

        check()
    assert count >= 4 * examples / 2
    assert served.process.poll() is None
