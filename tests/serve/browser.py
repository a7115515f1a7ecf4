"""A headless Chromium that a test drives over a pipe, in DevTools' protocol."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--hide-scrollbars",
)


class Browser:
    """One page. `evaluate` runs a script in it; `console` has what it complained about."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = os.fdopen(read, "rb", buffering=0), os.fdopen(write, "wb", buffering=0)
        self._number, self._rest, self._session = 0, b"", None
        self.console: list[str] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.console.append(json.dumps(answer["params"])[:500])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read.fileno(), 1 << 16)
            assert part, "Chromium has ended"
            self._rest += part
        content, _, self._rest = self._rest.partition(b"\0")
        return json.loads(content)

    def evaluate(self, script: str) -> Any:
        answer = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def type(self, field: str, text: str) -> None:
        self.evaluate(f"at({field!r}).focus(); at({field!r}).select && at({field!r}).select()")
        self("Input.insertText", text=text)

    def click(self, element: str) -> None:
        place = self.evaluate(
            f"(() => {{ const one = at({element!r}); one.scrollIntoView({{block: 'center'}});"
            " const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)


@contextmanager
def chromium(folder: Path, width: int, height: int) -> Iterator[Browser]:
    """Start it with a profile in the folder; end it, whatever the test does."""
    to_it, from_us = os.pipe()
    from_it, to_us = os.pipe()

    def pipes() -> None:
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_it, to_us)]  # so that none is 3 or 4 already
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    command = ["chromium", *OPTIONS, f"--user-data-dir={folder}", f"--window-size={width},{height}"]
    # Its pipes are 3 and 4; no other file of this process stays open in it.
    started = subprocess.Popen(
        command, preexec_fn=pipes, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_it)
    os.close(to_us)
    try:
        browser = Browser(from_it, from_us)
        phone = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        browser("Emulation.setDeviceMetricsOverride", **phone)
        yield browser
    finally:
        started.kill()
        started.wait()
