"""`slmjax generate MODEL --prompt ...`: text from a model, streamed."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from slmjax.cli.args import parse, read_text, text_of
from slmjax.errors import UserError

HELP = "sample text from a model"


@dataclass(frozen=True)
class Args:
    model: Annotated[str, tyro.conf.Positional]
    """A run folder, a checkpoint, a Hugging Face folder or a GGUF file"""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The beginning of a text; give it several times for a batch"""
    prompt_file: str | None = None
    """A file whose whole text is one more prompt; - is standard input"""
    chat: str | None = None
    """A question for a chat model, put into its own template; only the answer is printed. - takes one question
    a line from standard input (the terminal), as one conversation"""
    system: str | None = None
    """The system message of the conversation, for --chat"""
    max_tokens: int | None = None
    """New tokens a prompt, at most; default: as the model's generation_config.json says, else 128"""
    temperature: float | None = None
    """0 is greedy: always the likeliest token. Default, as of the next four options: what the model's
    generation_config.json says; else 0.8"""
    top_k: int | None = None
    """Choose among the k likeliest tokens; 0: all"""
    top_p: float | None = None
    """Choose among the likeliest tokens that together have this probability"""
    min_p: float | None = None
    """Choose among tokens at least this times as likely as the likeliest"""
    repetition_penalty: float | None = None
    """Above 1: tokens that have occurred become less likely"""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    r"""End before this string, in which \n is a line end and \t a tab; may be given several times"""
    seed: int = 0
    """The same seed gives the same text"""
    stream: bool = True
    """Show text as it comes (for one prompt)"""
    step: int | None = None
    """The checkpoint of a run; default: the latest"""
    dtype: str | None = None
    """float32 or bfloat16; default: float32 on a CPU, elsewhere that of training"""


def main(argv: list[str]) -> int:
    args = parse(
        Args,
        argv,
        prog="slmjax generate",
        description="Continues prompts. The text goes to standard output, everything else to standard error.",
        example='slmjax generate runs/quickstart --prompt "Once upon a time" --temperature 0.8 --top-p 0.95\n'
        '  slmjax generate runs/smollm2 --chat "What is gravity?" --system "Answer in one sentence."',
    )
    from slmjax.data.generation_config import NOTHING_SAID
    from slmjax.evals.generate import Generator
    from slmjax.evals.sampling import sampler
    from slmjax.evals.text import StopStrings
    from slmjax.runs.loading import generative, load

    prompts = _prompts(args) if args.chat is None else _only_chat(args)
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f"--max-tokens is {args.max_tokens}; expected at least 1")
    asked = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    stop = tuple(map(_unescaped, args.stop))
    sampler(**NOTHING_SAID.sampling(default=0.8, **asked))  # what is wrong on the command line is said before loading
    StopStrings(stop)
    loaded = load(args.model, step=args.step, say=_note)
    model, compute, said = generative(loaded.decoder), _compute(args.dtype), loaded.generation
    if said.unused:
        _note(f"{said.source} asks for {', '.join(said.unused)}, which slmjax does not do: generated without")
    options = {
        "sampler": sampler(**said.sampling(default=0.8, **asked)),
        **said.length(args.max_tokens, default=128),
        "stop": (*stop, *said.stop),
        "seed": args.seed,
    }
    generator = Generator(model, loaded.weights, loaded.tokenizer(), compute, said.ends, numerics=loaded.numerics)
    if args.chat is not None:
        return _chat(generator, args, options)
    start, generated = time.monotonic(), 0
    if args.stream and len(prompts) == 1:
        generated = _stream(generator, prompts[0], options)
    else:
        for prompt, out in zip(prompts, generator(prompts, **options), strict=True):
            generated += len(out.tokens)
            print(f"{prompt}{out.text}\n[{out.reason}, {len(out.tokens)} tokens]\n", flush=True)
    seconds = time.monotonic() - start
    _note(f"{generated} tokens in {seconds:.1f} s, compilation included; other text: --seed {args.seed + 1}")
    return 0


def _chat(generator: Any, args: Args, options: dict[str, Any]) -> int:
    """Answers one question, or a conversation of one question on each line."""
    from dataclasses import replace

    from slmjax.data.chat import prompt

    messages = [] if args.system is None else [{"role": "system", "content": text_of("--system", args.system)}]
    questions: Iterable[str] = _questions() if args.chat in (None, "-") else [args.chat]
    for question in questions:
        messages.append({"role": "user", "content": text_of("--chat", question)})
        turn = prompt(generator.tokenizer, messages)
        answer = ""
        for piece in replace(generator, ends=(*generator.ends, *turn.ends)).stream([turn.ids], **options):
            answer += piece.text
            print(piece.text, end="", flush=True)
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})
    return 0


def _questions() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _only_chat(args: Args) -> Sequence[str]:
    if args.prompt or args.prompt_file is not None:
        raise UserError("--chat and --prompt exclude each other: a template writes the prompt; drop one")
    return ()


def _stream(generator: Any, prompt: str, options: dict[str, Any]) -> int:
    generated, reason = 0, None
    pieces = generator.stream([prompt], **options)  # refuses what is wrong before anything is printed
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
        generated, reason = generated + len(piece.tokens), piece.reason
    print(flush=True)
    _note(f"ended by {reason}")
    return generated


def _prompts(args: Args) -> Sequence[str]:
    if args.system is not None:
        raise UserError("--system is for --chat; add --chat QUESTION, or put it into --prompt")
    prompts = [text_of("--prompt", prompt) for prompt in args.prompt]
    if args.prompt_file is not None:
        prompts.append(read_text("--prompt-file", args.prompt_file))
    if not prompts:
        raise UserError('no prompt; add --prompt "..." (an empty one begins a document) or --prompt-file FILE')
    return prompts


def _compute(dtype: str | None) -> Any:
    """One token at a time is limited by memory, not by arithmetic, and a CPU has no fast bfloat16 for that."""
    import jax

    from slmjax.nn.compute import Compute
    from slmjax.runs.evaluating import compute_of

    if jax.default_backend() == "cpu":
        return Compute(dtype=dtype or "float32")
    return compute_of(dtype)


def _unescaped(text: str) -> str:
    r"""`\n`, `\t` and `\\` are replaced by what they stand for; any other backslash stays."""
    whole = text_of("--stop", text)
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], "\\"), whole)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
