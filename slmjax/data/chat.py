"""Chat templates: a conversation as the text that a chat model was trained on, and the tokens that end a turn.

A template is a Jinja program that comes with a tokenizer (tokenizer_config.json, chat_template.jinja, or the metadata
of a GGUF file). It runs in Jinja's sandbox, in a process with limits on time and memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmjax.data import chat_render
from slmjax.errors import DataError

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""

WAIT_SECONDS = 60
MARK = "\ue5f0"  # a private-use character: put around the spelling of a special token in a message's text


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The template of a tokenizer."""

    source: str
    """The Jinja program"""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens as the template may name them: {"bos_token": "<s>", ...}"""

    def render(self, messages: Sequence[Message], *, generate: bool = True) -> str:
        """A conversation as text; `generate` adds the header that comes before the assistant's answer.

        Raises:
            DataError: the template refuses the conversation, has a mistake, reaches for Python's internals, or takes
                more time or memory than any template needs.
        """
        (text,) = self.attempt([(messages, generate)])
        if isinstance(text, DataError):
            raise text
        return text

    def attempt(self, conversations: Sequence[tuple[Sequence[Message], bool]]) -> list[str | DataError]:
        """Renders several (messages, generate) pairs; the result of one that fails is its DataError."""
        request = {
            "template": self.source,
            "variables": dict(self.tokens),
            "conversations": [
                {"messages": [dict(m) for m in messages], "add_generation_prompt": generate}
                for messages, generate in conversations
            ],
        }
        command = [sys.executable, "-I", str(Path(chat_render.__file__))]
        try:
            done = subprocess.run(
                command, input=json.dumps(request), capture_output=True, text=True, timeout=WAIT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise DataError(f"the chat template was stopped: it took more than {WAIT_SECONDS} s") from None
        if done.returncode:
            seconds, bytes_ = chat_render.CPU_SECONDS, chat_render.MEMORY_BYTES
            raise DataError(f"the chat template was stopped: it took more than {seconds} s or {bytes_ >> 20} MiB")
        answers = json.loads(done.stdout)
        return [a["text"] if "text" in a else DataError(f"the chat template failed: {a['error']}") for a in answers]


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it."""

    ids: tuple[int, ...]
    ends: tuple[int, ...]
    """Ids of the tokens, besides EOS, that end an answer"""


def prompt(tokenizer: Any, messages: Sequence[Message]) -> Prompt:
    """A conversation whose last message is the user's -> token ids, and the tokens that end the answer.

    Special tokens of the template become their ids; the same letters inside a message stay text. The token that ends a
    turn is found by rendering an answer: it is the one that the template puts after it.

    Args:
        tokenizer: a `slmjax.data.tokenizer.Tokenizer`.

    Raises:
        DataError: the tokenizer has no chat template, or `ChatTemplate.render` raises it.
    """
    if tokenizer.chat is None:
        raise DataError("the tokenizer has no chat template; use --prompt, or add chat_template.jinja to its folder")
    special = tokenizer.special_tokens
    spelled = re.compile("|".join(re.escape(t) for t in sorted(special, key=len, reverse=True)) or r"(?!)")
    quote = lambda text: spelled.sub(lambda match: MARK + match[0] + MARK, text.replace(MARK, ""))  # noqa: E731
    quoted = [{**m, "content": quote(m["content"])} for m in messages]
    answer = f"{MARK}answer{MARK}"
    text, turn = tokenizer.chat.attempt(
        [(quoted, True), ([*quoted, {"role": "assistant", "content": answer}], False)],
    )
    if isinstance(text, DataError):
        raise text
    ids: list[int] = []
    for i, part in enumerate(text.split(MARK)):
        ids += tokenizer.encode(part) if i % 2 else tokenizer.encode_template(part)
    after = "" if isinstance(turn, DataError) else turn.rpartition(answer)[2]
    first = next((t for t in sorted(special, key=len, reverse=True) if after.lstrip().startswith(t)), None)
    ends = () if first is None or special[first] == tokenizer.eos_id else (special[first],)
    return Prompt(tuple(ids), ends)


def ends(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokens, besides EOS, that end a turn; none without a template, or if it fails."""
    try:
        return () if tokenizer.chat is None else prompt(tokenizer, [{"role": "user", "content": "?"}]).ends
    except DataError:
        return ()
