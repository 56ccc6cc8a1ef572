"""Chat templates: how messages become the text that a model continues. A small fixed set, by name.

A template is data, and no code of a model's folder is ever run. Its name is saved with the tokenizer: `jinja` is what
transformers and llama.cpp read as chat_template, and begins with the name.

    template = TEMPLATES["chatml"]
    tokenizer = with_template(tokenizer, template)
    ids = template.encode(tokenizer, [{"role": "user", "content": "Hello!"}], add_generation_prompt=True)
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tokenizers

from gptcore.files import PathLike
from gptcore.text.pretokenize import END_OF_TEXT
from gptcore.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
Message = Mapping[str, Any]  # {"role": one of ROLES, "content": str}


class Part(NamedTuple):
    """A piece of a text: of plain text, in which no special token is found, or one special token."""

    text: str
    special: bool = False
    target: bool = False  # whether the model learns to write it


def encode_parts(tokenizer: Tokenizer, parts: Iterable[Part]) -> tuple[list[int], list[bool]]:
    """Return the ids of some parts, and for each whether it is a target.

    Text between two special tokens is tokenized once, as a whole, because a token may cross the seam of two parts. It
    is a target if it holds a character of one.
    """
    ids: list[int] = []
    targets: list[bool] = []
    for special, group in itertools.groupby(parts, key=lambda part: part.special):
        run = list(group)
        if special:
            check_special(tokenizer, [part.text for part in run])
            ids += [tokenizer.special_tokens[part.text] for part in run]
            targets += [part.target for part in run]
            continue
        marks = bytes(part.target for part in run for _ in part.text)
        found = tokenizer("".join(part.text for part in run), return_offsets_mapping=True, allowed_special=False)
        ids += found["input_ids"]
        targets += [any(marks[start:end]) for start, end in found["offset_mapping"]]
    return ids, targets


def check_special(tokenizer: Tokenizer, names: Iterable[str]) -> None:
    """Raise ValueError for a special token that the tokenizer does not have."""
    if missing := [name for name in names if name not in tokenizer.special_tokens]:
        raise ValueError(
            f"the tokenizer has no special token {missing[0]!r}, but {list(tokenizer.special_tokens)}; with_template "
            "adds those of a chat template, and `gptcore finetune --task chat` trains them"
        )


@dataclass(frozen=True)
class Template:
    """A chat template.

    turns: for each role what comes before and after the content of its messages.
    stop: each of these ends a reply. The first is a special token, and begins what comes after a reply.
    special_tokens: those that the template is made of. Text in a message never becomes one.
    system: the content of the system message of a conversation without one; None for no such message.
    """

    name: str
    turns: Mapping[str, tuple[str, str]]
    stop: tuple[str, ...]
    special_tokens: tuple[str, ...]
    system: str | None = None

    def parts(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Part]:
        """Return the parts of a conversation. Targets are the assistant's messages, each with its end."""
        messages = check_messages(messages)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        parts = []
        for message in messages:
            before, after = self.turns[message["role"]]
            writes = message["role"] == "assistant"
            parts += [*self._split(before), Part(message["content"], target=writes)]
            parts += [part._replace(target=writes and part.text == self.stop[0]) for part in self._split(after)]
        if add_generation_prompt:
            parts += self._split(self.turns["assistant"][0])
        return parts

    def open_parts(self, messages: Sequence[Message]) -> list[Part]:
        """Return the parts of a conversation up to the content of its last message, which is to be continued."""
        parts = self.parts(messages)
        return parts[: len(parts) - len(self._split(self.turns[messages[-1]["role"]][1]))]

    def _split(self, text: str) -> list[Part]:
        pieces = re.split(f"({'|'.join(map(re.escape, self.special_tokens))})", text)
        return [Part(piece, special=i % 2 == 1) for i, piece in enumerate(pieces) if piece]

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Return a conversation as text, to be read. Special tokens in a message look like the template's own there:

        `encode` tells them apart.
        """
        return "".join(part.text for part in self.parts(messages, add_generation_prompt))

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> list[int]:
        """Return the ids of a conversation; with add_generation_prompt, those that a reply follows.

        Raises ValueError for messages that are not a conversation, and for a tokenizer without the special tokens.
        """
        return encode_parts(tokenizer, self.parts(messages, add_generation_prompt))[0]

    def fit(
        self, tokenizer: Tokenizer, messages: Sequence[Message], limit: int, add_generation_prompt: bool = False
    ) -> list[Message]:
        """Return the newest messages that take at most `limit` tokens, with the system message if there is one.

        Left out are whole exchanges, each from a user's message to the next. Raises ValueError if the last is too long.
        """
        kept = check_messages(messages)
        while (length := len(self.encode(tokenizer, kept, add_generation_prompt))) > limit:
            start = int(kept[0]["role"] == "system")
            users = [i for i, message in enumerate(kept) if i > start and message["role"] == "user"]
            if not users:
                raise ValueError(f"the last exchange takes {length} tokens, expected at most {limit}; shorten it")
            kept = [*kept[:start], *kept[users[0] :]]
        return kept

    def stop_token(self, tokenizer: Tokenizer) -> int:
        """Return the id of the special token that ends a reply."""
        check_special(tokenizer, self.stop[:1])
        return tokenizer.special_tokens[self.stop[0]]

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Return the ends of a reply that are not special tokens: an untrained model may write them as text."""
        return tuple(text for text in self.stop if text not in self.special_tokens)

    @property
    def jinja(self) -> str:
        """Return the template in the language in which transformers and llama.cpp read it."""
        lines = [f"{{#- gptcore: {self.name} -#}}"]
        if self.system is not None:
            default = "".join((self.turns["system"][0], self.system, self.turns["system"][1]))
            lines.append(f"{{%- if messages[0]['role'] != 'system' %}}{{{{ {json.dumps(default)} }}}}{{% endif %}}")
        lines.append("{%- for message in messages %}")
        for number, (role, (before, after)) in enumerate(self.turns.items()):
            turn = f"{{{{ {json.dumps(before)} + message['content'] + {json.dumps(after)} }}}}"
            lines.append(f"{{%- {'elif' if number else 'if'} message['role'] == '{role}' %}}{turn}")
        start = json.dumps(self.turns["assistant"][0])
        lines += ["{%- endif %}", "{%- endfor %}", f"{{%- if add_generation_prompt %}}{{{{ {start} }}}}{{%- endif %}}"]
        return "\n".join(lines)


def check_messages(messages: Any) -> list[Message]:
    """Return messages as a list. Raises ValueError, with the number of the message, unless they are a conversation."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages should be a list of one message or more, not {messages!r:.60}")
    for number, message in enumerate(messages, start=1):
        found = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        if not isinstance(message, Mapping) or not message.keys() >= {"role", "content"}:
            raise ValueError(f"message {number} should be an object with role and content, not {found}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"message {number} has the role {role!r:.60}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {number} has content of type {type(content).__name__}, expected a string")
        if role == "system" and number > 1:
            raise ValueError(f"message {number} has the role system, which only the first may have")
    return list(messages)


def _mark(role: str) -> tuple[str, str]:
    return f"<|im_start|>{role}\n", "<|im_end|>\n"


TEMPLATES = {
    template.name: template
    for template in (
        Template("chatml", {role: _mark(role) for role in ROLES}, ("<|im_end|>",), ("<|im_start|>", "<|im_end|>")),
        Template(
            "alpaca",
            {
                "system": ("", "\n\n"),
                "user": ("### Instruction:\n", "\n\n"),
                "assistant": ("### Response:\n", END_OF_TEXT),
            },
            (END_OF_TEXT, "\n\n### Instruction:"),
            (END_OF_TEXT,),
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        ),
        Template(
            "plain",
            {"system": ("", "\n\n"), "user": ("User:\n", "\n\n"), "assistant": ("Assistant:\n", END_OF_TEXT)},
            (END_OF_TEXT, "\n\nUser:"),
            (END_OF_TEXT,),
        ),
    )
}


def template_of(source: PathLike | Tokenizer) -> Template | None:
    """Return the chat template that was saved with a model or its tokenizer; None if it has none of TEMPLATES."""
    tokenizer = source if isinstance(source, Tokenizer) else Tokenizer.from_pretrained(source)
    return next((known for known in TEMPLATES.values() if known.jinja == tokenizer.chat_template), None)


def find_template(name: str) -> Template:
    """Return a template by its name. Raises ValueError for a name that none has."""
    if name not in TEMPLATES:
        raise ValueError(f"there is no chat template {name!r}; it should be one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def with_template(tokenizer: Tokenizer, template: Template) -> Tokenizer:
    """Return the tokenizer with the special tokens of a template after its other tokens, and its name."""
    made = with_special_tokens(tokenizer, template.special_tokens)
    made.chat_template = template.jinja
    return made


def with_special_tokens(tokenizer: Tokenizer, names: Iterable[str]) -> Tokenizer:
    """Return a tokenizer with these special tokens: those that it does not have get the next ids, in their order.

    Raises ValueError for a name that plain text could become.
    """
    inner = tokenizers.Tokenizer.from_str(tokenizer._tokenizer.to_str())
    missing = [name for name in names if name not in tokenizer.special_tokens]
    inner.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in missing])
    return tokenizer._restore(inner.to_str(), tokenizer._settings())
