"""Examples whose target is a text: {"prompt", "completion"}, {"messages"}, and alpaca's {"instruction", "output"}.

The loss is on the target only. Prompt and target are tokenized once, as a whole: see gptcore.text.chat.encode_parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gptcore.config import IGNORED
from gptcore.files import PathLike
from gptcore.tasks.examples import Columns, Read
from gptcore.tasks.records import Record, choose, kind, read_records, string
from gptcore.text.chat import TEMPLATES, Message, Part, Template, check_messages, encode_parts
from gptcore.text.tokenizer import Tokenizer

PROMPTS = ("prompt", "instruction", "source", "article", "document", "dialogue", "question", "text", "input")
TARGETS = ("completion", "output", "target", "summary", "highlights", "translation", "response", "answer")
# Of Stanford Alpaca; without an input it is the template's own
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
)


class Target(NamedTuple):
    """What comes before a target, and the target; with a template, a conversation and its last message."""

    place: str
    talk: tuple[tuple[str, str], ...]  # roles and contents; of a prompt without a template, one message
    label: str | None = None  # the target
    extra: str = ""  # alpaca's input

    @property
    def source(self) -> str:
        """Return the last text before the target."""
        return self.talk[-1][1]

    def messages(self, template: Template) -> list[Message]:
        """Return the conversation before the target."""
        messages: list[Message] = [{"role": role, "content": content} for role, content in self.talk]
        if not self.extra:
            return messages
        if template.name == "alpaca":
            return [{"role": "system", "content": WITH_INPUT}, *_with_input(messages, "\n\n### Input:\n" + self.extra)]
        return _with_input(messages, "\n\n" + self.extra)

    def prompt(self, tokenizer: Tokenizer, template: Template | None, limit: int) -> list[int]:
        """Return the ids that the target should follow; what does not fit is left out at the beginning.

        Without a template, those before the target where both are tokenized as a whole.
        """
        if template is not None:
            with _at(self.place):
                kept = template.fit(tokenizer, self.messages(template), limit, add_generation_prompt=True)
            return template.encode(tokenizer, kept, add_generation_prompt=True)
        ids, targets = encode_parts(tokenizer, self._parts(tokenizer))
        return ids[: targets.index(True) if True in targets else None][-limit:]

    def _parts(self, tokenizer: Tokenizer) -> list[Part]:
        end = end_token(tokenizer)
        start = Part(self.source) if self.source else Part(end, special=True)
        if self.label is None:
            return [start]
        return [start, Part(self.label, target=True), Part(end, special=True, target=True)]

    def example(self, tokenizer: Tokenizer, template: Template | None, limit: int) -> Example:
        """Return the ids and labels, in at most `limit` tokens: see Example.

        Raises ValueError, naming the place, where no token of a target is left, and where the target is too long.
        """
        assert self.label is not None
        if template is not None:
            whole: list[Message] = [*self.messages(template), {"role": "assistant", "content": self.label}]
            with _at(self.place):
                kept = template.fit(tokenizer, whole, limit)
            ids, targets = encode_parts(tokenizer, template.parts(kept))
            cut = len(whole) - len(kept)
        else:
            ids, targets = encode_parts(tokenizer, self._parts(tokenizer))
            cut = max(0, len(ids) - limit)
            if sum(targets) >= limit and cut:
                raise ValueError(
                    f"{self.place}: the target takes {sum(targets)} tokens and needs one before it, expected at most "
                    f"{limit} in all; shorten it, or give a larger --max-length"
                )
            ids, targets = ids[cut:], targets[cut:]
        labels = [i if target else IGNORED for i, target in zip(ids, targets, strict=True)]
        special = set(tokenizer.special_tokens.values())
        if not any(label != IGNORED and label not in special for label in labels[1:]):
            raise ValueError(f"{self.place}: the target {self.label!r:.60} has no token, so nothing is learnt")
        return Example({"input_ids": ids, "labels": labels}, cut)


class Example(NamedTuple):
    """What the collator takes, with -100 for labels outside of targets, and how much was left out at the beginning:

    tokens of a prompt, or messages of a conversation.
    """

    inputs: dict[str, list[int]]
    cut: int


@contextlib.contextmanager
def _at(place: str) -> Iterator[None]:
    """Put the place of an example before the text of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _with_input(messages: list[Message], extra: str) -> list[Message]:
    return [{"role": "user", "content": messages[0]["content"] + extra}, *messages[1:]]


def end_token(tokenizer: Tokenizer) -> str:
    """Return the token that ends a text. Raises ValueError for a tokenizer without one."""
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no end-of-text token, so that no target would have an end")
    return tokenizer.eos_token


def read_targets(path: PathLike, columns: Columns, chat: bool, labelled: bool = True) -> Read:
    """Return the Target of each record of a JSONL, JSON, CSV or TSV file.

    chat: records become conversations; else prompts stay as they are, and alpaca's records get alpaca's prompt.
    Raises OSError, or ValueError with the file, the line and what was expected.
    """
    records = read_records(path)
    if not records:
        raise ValueError(f"{path} has no example")
    found = records[0].values
    if columns.text is None and "messages" in found:
        if not chat:
            raise ValueError(
                f"{records[0].place} has messages, which are for --task chat; --task text takes prompt and completion"
            )
        return Read([_conversation(record, labelled) for record in records], [f"columns of {path}: 'messages'"])
    prompt = choose(records, columns.text, "--text-column", PROMPTS)
    names = [name for name in TARGETS if prompt is None or name != prompt.lower()]
    target = choose(records, columns.label, "--label-column", names) if labelled else None
    if prompt is None or (labelled and target is None):
        raise ValueError(
            f"{records[0].place} has {', '.join(map(repr, found))}, expected prompt and completion, messages, or "
            "instruction and output; say with --text-column and --label-column which is which"
        )
    alpaca = prompt == "instruction"
    targets = [_target(record, prompt, target, alpaca, chat) for record in records]
    notes = [f"columns of {path}: prompt: {prompt!r}" + (f", target: {target!r}" if target else "")]
    if labelled and not chat and not alpaca:
        notes += _endings([t.source for t in targets])
    return Read(targets, notes)


def _conversation(record: Record, labelled: bool) -> Target:
    with _at(record.place):
        messages = check_messages(record.values.get("messages"))
    if empty := [number for number, message in enumerate(messages, start=1) if not message["content"].strip()]:
        raise ValueError(f"{record.place}: message {empty[0]} of {len(messages)} is empty, expected a text")
    expected = "assistant" if labelled else "user"
    if messages[-1]["role"] != expected:
        why = "only its messages are learnt" if labelled else "which gets a reply"
        raise ValueError(
            f"{record.place}: the last message has the role {messages[-1]['role']}, expected {expected}: {why}"
        )
    talk = tuple((str(message["role"]), str(message["content"])) for message in messages)
    if not labelled:
        return Target(record.place, talk)
    if len(talk) == 1:
        raise ValueError(f"{record.place}: the only message is the assistant's, expected one of the user before it")
    return Target(record.place, talk[:-1], talk[-1][1])


def _target(record: Record, prompt: str, target: str | None, alpaca: bool, chat: bool) -> Target:
    label = None if target is None else string(record, target)
    source = record.values.get(prompt)
    if chat or alpaca or source != "":  # a text may follow nothing
        source = string(record, prompt)
    extra = record.values.get("input") or "" if alpaca else ""
    if not isinstance(extra, str):
        raise ValueError(f"{record.place}, 'input' is {kind(extra)}, expected a text")
    made = Target(record.place, (("user", source),), label, extra)
    if alpaca and not chat:
        template = TEMPLATES["alpaca"]
        whole = template.text(made.messages(template), add_generation_prompt=True)
        return Target(record.place, (("user", whole),), label)
    return made


def _endings(prompts: Sequence[str]) -> list[str]:
    """Return notes on prompts after which a model could not tell that its target begins, or how."""
    notes = []
    if len({prompt[-1:] for prompt in prompts}) > 1:
        notes.append(
            "the prompts end differently, so a model cannot tell where one ends; end each with a line break, say"
        )
    if spaces := sum(prompt.endswith(" ") for prompt in prompts):
        notes.append(
            f"{spaces} prompts end with a space, which a token of the target takes in; in generation, leave it out"
        )
    return notes
