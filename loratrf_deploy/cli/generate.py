"""loratrf-generate: try an exported model that generates out, under its adapters: answers, a table of them, a chat, a
transcript."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import UserError, printable
from ..formats.stages import STAGES_FILE
from ..genai.folder import CONFIG_FILE
from ..runtime.generation_session import GenerationSession, Prompt
from ..runtime.residents import Choice
from ..runtime.sound import Samples
from ..runtime.staged_session import StagedSession
from .shared import Parser, command, count, named_paths, positive, print_json, require_extra

__all__ = ["main"]

Session: TypeAlias = "GenerationSession | StagedSession"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """loratrf-generate --model DIR --prompt TEXT, or --audio FILE: prints the text as it is made. Exit 0 done, 2 the
    input is at fault.

    The text goes to stdout, the speed to stderr; --json has both, when all is done.
    """
    args = _parser().parse_args(argv)
    session = _open(args)
    for name, path in named_paths(args.adapter, "--adapter").items():
        session.load(name, path)
    names: list[Choice | None] = [*session.adapters] or [None]
    talk = _Talk(session, args)
    if args.audio is not None or _hears(session):
        answer = talk.answer(_sound(session, args), None, labelled=False)
        if args.json:
            print_json({"answers": [vars(answer)]})
        return 0
    if args.prompt is None and sys.stdin.isatty():
        talk.chat(names[0])
        return 0
    prompt = sys.stdin.read() if args.prompt in (None, "-") else args.prompt
    if not prompt:
        raise UserError("--prompt is empty: the model needs at least one token to go on from.")
    if args.rows:
        answers = talk.rows(prompt, names if names == [None] else [*names, None])
    else:
        answers = [talk.answer(prompt, name, labelled=len(names) > 1) for name in names]
    if args.json:
        print_json({"answers": [vars(answer) for answer in answers]})
    return 0


def _open(args: argparse.Namespace) -> Session:
    """The session that the folder's files are for."""
    folder = args.model.parent if args.model.suffix == ".onnx" else args.model
    if not (folder / CONFIG_FILE).is_file() and (folder / STAGES_FILE).is_file():
        require_extra("cpu")
        if args.rows:
            raise UserError(
                f"--rows is for folders of ONNX Runtime GenAI, and {folder} is a model in stages, with one adapter. "
                "Leave it out."
            )
        return StagedSession(folder)
    require_extra("genai")
    return GenerationSession(args.model, trust_library=args.trust_library)


def _hears(session: Session) -> bool:
    return isinstance(session, StagedSession) and session.hears


def _sound(session: Session, args: argparse.Namespace) -> Samples:
    """The samples of --audio. UserError where there are none, or the model is one of texts."""
    if not isinstance(session, StagedSession) or not session.hears:
        raise UserError(f"--audio is for models of sound, such as Whisper, and {args.model} is one of texts: --prompt.")
    if args.audio is None or args.prompt is not None or args.chat:
        raise UserError(
            f"{args.model} is a model of sound, which transcribes and doesn't go on from texts. Give it --audio FILE, "
            "a WAV file, without --prompt and --chat."
        )
    return session.hear(args.audio)


@dataclass
class _Answer:
    """What was made under one adapter, None being the model's default; rows of one batch share their seconds."""

    adapter: Choice | None
    text: str
    tokens: int
    first_token_seconds: float | None
    seconds: float

    @property
    def speed(self) -> str:
        first = "" if self.first_token_seconds is None else f"; first after {1e3 * self.first_token_seconds:.0f} ms"
        rest = self.seconds - (self.first_token_seconds or 0.0)
        speed = f", then {(self.tokens - 1) / rest:.1f} tokens/s" if first and self.tokens > 1 else ""
        return f"{self.tokens} tokens{first}{speed}"


class _Talk:
    """A session with the options of one command line."""

    def __init__(self, session: Session, args: argparse.Namespace):
        self._session, self._shown, self._chat = session, not args.json, args.chat
        self._repeats = not args.chat and session.continues
        # A transcript is as long as what is said.
        most = args.max_new_tokens or (None if _hears(session) else 128)
        self._options: dict[str, Any] = {"max_new_tokens": most}
        for name in ("language", "task"):
            if (value := getattr(args, name)) is not None:
                if not _hears(session):
                    raise UserError(f"--{name} is for models of sound, such as Whisper, and this is one of texts.")
                self._options[name] = value
        if args.temperature is not None:
            self._options |= {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
            if args.seed is not None:
                self._options["random_seed"] = args.seed

    def answer(self, given: str | Samples, adapter: Choice | None, *, labelled: bool) -> _Answer:
        """Shows what follows the text `given`, or what is said in it, under `adapter` as it is made."""
        self._show(f"[{adapter}] " if labelled else "")
        repeated = given if self._repeats and isinstance(given, str) else ""
        self._show(repeated)
        answer = self._stream(self._prompt(given) if isinstance(given, str) else given, adapter)
        self._show("\n")
        answer.text = repeated + answer.text
        if self._shown:
            print(answer.speed, file=sys.stderr)
        return answer

    def rows(self, text: str, adapters: Sequence[Choice | None]) -> list[_Answer]:
        """Shows what follows `text` under each of `adapters`, all of them rows of one batch."""
        begin = time.perf_counter()
        which: dict[str, Any] = {"adapters": adapters} if self._session.takes_adapters else {}
        assert isinstance(self._session, GenerationSession)  # others have no rows, see _open
        made = self._session.generate([self._prompt(text)] * len(adapters), **which, **self._options)
        seconds = time.perf_counter() - begin
        tokens = [len(self._session.encode(row)) for row in made]
        answers = [
            _Answer(name, row, own, None, seconds) for name, row, own in zip(adapters, made, tokens, strict=True)
        ]
        for answer in answers:
            self._show(f"[{answer.adapter or 'base'}] {answer.text}\n")
        if self._shown:
            print(f"{len(answers)} rows in {seconds:.2f} s", file=sys.stderr)
        return answers

    def chat(self, adapter: Choice | None) -> None:
        """Turns of a chat on a terminal; /adapter NAME [SCALE] changes who answers from the next turn on."""
        print(f"Adapters: {', '.join(self._session.adapters) or 'none'}. /adapter NAME [SCALE], /base, /quit.")
        turns, scale = list[dict[str, str]](), 1.0
        while (line := _line(f"{adapter or 'base'}> ")) is not None:
            word, *rest = line.split() or [""]
            if word == "/quit":
                return
            if word == "/base":
                adapter, scale = None, 1.0
            elif word == "/adapter":
                try:
                    adapter, scale = self._chosen(rest)
                except UserError as error:
                    print(f"error: {error}")
            elif word:
                turns.append({"role": "user", "content": line})
                text = self._stream(turns if self._chat else line, adapter, scale).text
                turns.append({"role": "assistant", "content": text})
                print()

    def _chosen(self, words: Sequence[str]) -> tuple[str, float]:
        if len(words) not in (1, 2) or words[0] not in self._session.adapters:
            known = ", ".join(self._session.adapters) or "none"
            raise UserError(
                f"/adapter takes the name of a loaded adapter ({known}) and a scale, such as /adapter fr 0.5"
            )
        try:
            return words[0], float(words[1]) if len(words) == 2 else 1.0
        except ValueError as error:
            raise UserError(f"{words[1]!r} is no scale, expected a number such as 0.5.") from error

    def _stream(self, prompt: Any, adapter: Choice | None, scale: float = 1.0) -> _Answer:
        begin, times, pieces = time.perf_counter(), list[float](), list[str]()
        which: dict[str, Any] = {"adapter": adapter, "scale": scale} if self._session.takes_adapters else {}
        for piece in self._session.stream(prompt, **which, **self._options):
            times.append(time.perf_counter() - begin)
            pieces.append(piece)
            self._show(piece)
        first = times[0] if times else None
        return _Answer(adapter, "".join(pieces), len(pieces), first, times[-1] if times else 0.0)

    def _prompt(self, text: str) -> Prompt:
        return [{"role": "user", "content": text}] if self._chat else text

    def _show(self, text: str) -> None:
        if self._shown:
            # A terminal obeys what a stranger's model may well say; in a pipe the text stays as it was made.
            print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def _line(prompt: str) -> str | None:
    """What the user types behind `prompt`, None at the end of input."""
    try:
        return input(prompt)
    except EOFError:
        return None


def _parser() -> Parser:
    parser = Parser("loratrf-generate", "Generate text with a model that loratrf-export wrote.")
    parser.add_argument("--model", required=True, type=Path, help="the exported folder, or the model.onnx in it")
    parser.add_argument(
        "--prompt", help="the text to go on from; - is stdin, as is none in a pipe; none on a terminal is a chat"
    )
    parser.add_argument(
        "--audio", type=Path, metavar="FILE", help="the sound that Whisper transcribes: WAV, 16-bit PCM"
    )
    parser.add_argument("--language", help="what is spoken in it, such as de (default: as the model says, or detected)")
    parser.add_argument("--task", help="transcribe, or translate (into English)")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="an .onnx_adapter to answer under; repeatable: each answers (default: the model as it is)",
    )
    parser.add_argument(
        "--trust-library",
        action="store_true",
        help="load the native library, and what else the folder's genai_config.json names, as the folder has it; "
        "otherwise ours takes its place",
    )
    parser.add_argument("--rows", action="store_true", help="every adapter, and the base, in one batch of mixed rows")
    parser.add_argument("--chat", action="store_true", help="put the prompt through the tokenizer's chat template")
    parser.add_argument("--max-new-tokens", type=count, help="at most (default: 128; all that is said in --audio)")
    parser.add_argument("--temperature", type=positive, help="sample instead of taking the likeliest token")
    parser.add_argument("--top-p", type=positive, default=1.0, help="sample among the likeliest (default: 1, all)")
    parser.add_argument("--seed", type=int, help="of sampling")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
