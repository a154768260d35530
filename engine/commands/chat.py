"""`trichord chat`: a conversation in the terminal, or one turn a line from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trichord.commands import options as shared
from trichord.errors import RequestError, TrichordError
from trichord.hub import find_model
from trichord.template_presets import PRESETS
from trichord.terminal import interruptible, printable, rate

if TYPE_CHECKING:
    from trichord.chat_session import ChatSession

_BLOCK = '"""'
_COMMAND = re.compile(r"(/[a-z]+)(?:\s+(.*))?", re.DOTALL)
_RESERVED = {"messages", "add_generation_prompt", "self", "llm", "params", "system", "template"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `trichord chat`."""
    parser.description = (
        "Talk with a model. A line that ends in a backslash goes on in the next one, and so do lines between two"
        ' lines of """. Ctrl-C interrupts an answer, Ctrl-D leaves, /help lists the commands. From a pipe each line is'
        " a turn, and only the answers are written to standard output."
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{shared.MODEL_HELP} (default: the demo model)")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument(
        "--template",
        metavar="NAME|FILE",
        help=f"lay the conversation out as {', '.join(PRESETS)} or by a Jinja file (default: the model's own template)",
    )
    parser.add_argument(
        "--template-args",
        type=_template_arguments,
        default={},
        metavar="JSON",
        help="""variables for the template: '{"enable_thinking": false}', or "tools" with their schemas""",
    )
    parser.add_argument("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    shared.add_sampling(parser, max_tokens=-1)
    shared.add_machine(parser)


def run(options: argparse.Namespace) -> int:
    """Talks until the input ends; returns the exit status, 1 if a turn from a pipe failed."""
    model = options.model and str(find_model(options.model))
    params = shared.sampling_params(options)
    from trichord.chat_session import ChatSession

    llm = shared.load_model(options, model, options.context)
    session = ChatSession(llm, params, template=options.template, **options.template_args)
    if options.load:
        session.load(options.load)
    if options.system is not None:
        session.system = options.system
    return _Conversation(session).run()


def _template_arguments(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a JSON object")
    if reserved := sorted(_RESERVED & value.keys()):
        raise argparse.ArgumentTypeError(f"{reserved[0]!r} is not the template's to be given")
    return value


@dataclass(frozen=True)
class _Command:
    """A line that begins with a slash. `argument` names what follows; `act` takes it."""

    argument: str
    what: str
    act: Callable[[_Conversation, str], None]


class _Conversation:
    """Reads turns and commands, prints answers. Everything but the answers goes to standard error."""

    def __init__(self, session: ChatSession) -> None:
        self.session = session
        self._interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self._left = False
        self._failed = False

    def run(self) -> int:
        """Until the input ends or /quit."""
        if self._interactive:
            with contextlib.suppress(ImportError):  # Windows has none; importing it is all it takes
                import readline  # noqa: F401
            _note("/help lists the commands; Ctrl-D leaves.")
        while not self._left:
            try:
                self._take(self._turn())
            except TrichordError as error:
                sys.stdout.flush()
                _note(f"trichord: error: {printable(shared.in_options(str(error)), allowed='')}")
                self._failed = True
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                _note("\nCtrl-D leaves.")
        return int(self._failed and not self._interactive)

    def _take(self, text: str | None) -> None:
        """One turn or command; None, the end of the input, leaves."""
        command = _COMMAND.fullmatch(text or "")
        if text is None:
            self._left = True
        elif command is None:
            if text.strip():
                self._answer(text)
        elif command[1] in _COMMANDS:
            _COMMANDS[command[1]].act(self, (command[2] or "").strip())
        else:
            raise RequestError(f"{command[1]} is no command: /help lists them.")

    def _answer(self, text: str) -> None:
        on_terminal = sys.stdout.isatty()
        with contextlib.closing(self.session.ask(text)) as pieces:
            try:
                for piece in interruptible(pieces):
                    print(printable(piece) if on_terminal else piece, end="", flush=True)
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print(" [interrupted]", end="")
        print(flush=True)

    def _turn(self) -> str | None:
        """The next text; None at the end of the input."""
        line = self._line("> ")
        if line is None:
            if self._interactive:
                _note("")
            return None
        lines = []
        if line.lstrip().startswith(_BLOCK):
            line = line.lstrip().removeprefix(_BLOCK)
            while line is not None and not line.rstrip().endswith(_BLOCK):
                lines.append(line)
                line = self._line(". ")
            lines.append((line or "").rstrip().removesuffix(_BLOCK))
            return "\n".join(lines).strip("\n")
        while line is not None and line.endswith("\\"):
            lines.append(line[:-1])
            line = self._line(". ")
        return "\n".join([*lines, line or ""])

    def _line(self, prompt: str) -> str | None:
        """The next line without its end; None at the end of the input."""
        if self._interactive:
            try:
                return input(prompt)
            except EOFError:
                return None
        if sys.stdin is None:
            return None
        try:
            line = sys.stdin.buffer.readline().decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"The input is not UTF-8 text: byte {error.start} of a line is invalid.") from None
        return line.rstrip("\r\n") if line else None

    # The commands

    def reset(self, _: str) -> None:
        self.session.reset()
        _note("The conversation begins anew.")

    def system(self, text: str) -> None:
        self.session.system = text
        _note("The system message is set." if text else "The system message is removed.")

    def save(self, path: str) -> None:
        self.session.save(_required(path, "/save"))
        _note(f"{len(self.session.messages)} messages are in {path}.")

    def load(self, path: str) -> None:
        self.session.load(_required(path, "/load"))
        _note(f"{len(self.session.messages)} messages are loaded.")

    def stats(self, _: str) -> None:
        if not self.session.turns:
            _note("There was no answer yet.")
            return
        turns, llm = self.session.turns, self.session.llm
        last = turns[-1]
        generated = sum(turn.generated for turn in turns)
        seconds = sum(turn.generation_seconds for turn in turns)
        parts = [
            f"load {llm.load_seconds:.2f} s",
            f"last prompt {last.prompt} tokens, {last.reused} of them from the cache"
            + rate(last.prompt - last.reused, last.prompt_seconds),
            # An answer's first token comes with its prompt's step.
            f"last answer {last.generated} tokens{rate(last.generated - 1, last.generation_seconds)}",
            f"{len(turns)} answers, {generated} tokens{rate(generated - len(turns), seconds)}",
            f"context {last.prompt + last.generated} of {llm.context_length}",
            f"weights {llm.weight_bytes / 2**20:.1f} MiB resident",
        ]
        _note(" · ".join(parts))

    def help(self, _: str) -> None:
        for name, command in _COMMANDS.items():
            _note(f"{f'{name} {command.argument}':<14}{command.what}")
        _note(f"A line that ends in \\ goes on in the next one; so do lines between {_BLOCK} and {_BLOCK}.")

    def quit(self, _: str) -> None:
        self._left = True


_COMMANDS = {
    "/reset": _Command("", "forget the conversation, but not the system message", _Conversation.reset),
    "/system": _Command("TEXT", "set the system message; without TEXT remove it", _Conversation.system),
    "/save": _Command("FILE", "write the conversation as JSON", _Conversation.save),
    "/load": _Command("FILE", "go on with a conversation from a file", _Conversation.load),
    "/stats": _Command("", "tokens and speed so far", _Conversation.stats),
    "/help": _Command("", "this list", _Conversation.help),
    "/quit": _Command("", "leave", _Conversation.quit),
}


def _required(path: str, command: str) -> str:
    if not path:
        raise RequestError(f"{command} needs the name of a file.")
    return path


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
