"""A process that renders one chat template, kept warm, and killed when it takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from functools import lru_cache
from pathlib import Path

from trichord.errors import TemplateError

START_SECONDS = 60.0  # to start Python and import Jinja, on a busy machine too
MAX_CHARACTERS = 4 << 20
MAX_REPLY_BYTES = 12 * MAX_CHARACTERS + 100  # JSON takes up to 12 bytes for a character
_WORKER = Path(__file__).with_name("template_worker.py")
# The worker gets nothing else of the environment: it is no business of a template's.
_ENVIRONMENT = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LIBPATH", "TZ")


class TemplateProcess:
    """Renders one template in a process of its own. May be used from several threads; renderings take turns."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, variables: str, seconds: float) -> str:
        """The text that the template makes of `variables`, a JSON object. The first call starts the process.

        Raises TemplateError when the template fails, takes longer than `seconds`, or uses too much memory.
        """
        with self._lock:
            process = self._running()
            reply = self._exchange(process, variables, seconds)
        if "error" in reply:
            raise TemplateError(f"the chat template failed: {reply['error']}")
        return reply["text"]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process:
            # After a fork the parent's process is not ours to talk to.
            if self._process.poll() is None and self._owner == os.getpid():
                return self._process
            self._end()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=os.name == "posix",  # so that Ctrl-C does not reach it
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise TemplateError(f"no process could be started to render the chat template: {error}") from None
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _end, self._process, self._owner)
        path = [entry for entry in sys.path if isinstance(entry, str)]
        start = {"path": path, "source": self._source, "max_characters": MAX_CHARACTERS}
        self._exchange(self._process, json.dumps(start), START_SECONDS)
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], request: str, seconds: float) -> dict[str, str]:
        """Sends one line and reads one back; ends the process when that takes too long or fails."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        reply = b""
        try:
            process.stdin.write(request.encode() + b"\n")
            process.stdin.flush()
            reply = process.stdout.readline(MAX_REPLY_BYTES)
        except OSError:
            pass
        finally:
            timer.cancel()
            whole = reply.endswith(b"\n") and not late.is_set()
            if not whole:  # also when interrupted: a late reply must not be taken for the next one
                self._end()
                self._process = None
        if whole:
            return json.loads(reply)
        if late.is_set():
            raise TemplateError(f"the chat template took longer than {seconds:g} seconds and was stopped")
        raise TemplateError("the chat template brought its process down, most likely by using too much memory")


@lru_cache(maxsize=4)
def template_process(source: str) -> TemplateProcess:
    """The process for this template; the last few stay warm, so that a conversation's next turn is quick."""
    return TemplateProcess(source)


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner == os.getpid():
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what could not be written any more
            pipe.close()
