"""The command line: gptcore train | generate | evaluate | export | bench | info.

Options are made from the fields of GPTConfig and TrainingArguments, so each is described in one place.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import torch

from gptcore import counters, info, ops
from gptcore.config import GPTConfig
from gptcore.data.datasets import DataCollatorForLanguageModeling, TextDataset, split
from gptcore.hf.gguf import DTYPES, export_gguf, export_hf
from gptcore.model import GPT
from gptcore.ops.registry import BACKENDS
from gptcore.text.tokenizer import Tokenizer
from gptcore.training.callbacks import read_log
from gptcore.training.checkpoint import CheckpointError, list_checkpoints
from gptcore.training.plot import plot_loss
from gptcore.training.trainer import Trainer, TrainingArguments, TrainingInterrupted

# Where the command line's defaults differ from those of the classes: a model that a laptop trains in minutes.
SMALL_MODEL: dict[str, Any] = {
    "n_positions": 256,
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
SMALL_RUN: dict[str, Any] = {
    "output_dir": "out",
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "logging_steps": 10,
    "eval_steps": 100,
    "save_steps": 100,
    "save_total_limit": 2,
}
# Fields of GPTConfig that are no options: the tokenizer decides, and the last changes transformers' attention alone
NO_OPTIONS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "reorder_and_upcast_attn")


class Parser(argparse.ArgumentParser):
    """Says which known option is nearest to one that is not known. Takes --n_layer for --n-layer, too."""

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        argv = [_dashes(word) for word in argv]
        command = self._commands.get(argv[0], self) if argv else self
        known = [option for action in command._actions for option in action.option_strings]
        # As argparse, which would complain of what is missing first, takes a word with a space for text
        words = itertools.takewhile(lambda word: word != "--", argv)
        options = [word.partition("=")[0] for word in words if word.startswith("--") and " " not in word]
        unknown = [option for option in options if option not in known]
        if not unknown:
            args, unknown = self.parse_known_args(argv)
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; see {command.prog} --help"
            self.error(f"unknown option or argument {unknown[0]}{hint}")
        args.given = set(options)
        return args

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    _commands: Mapping[str, argparse.ArgumentParser] = {}


def _dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") and " " not in word else word


def add_fields(
    parser: argparse.ArgumentParser, cls: type, defaults: Mapping[str, Any], skip: Sequence[str] = ()
) -> None:
    """An option for each field of a dataclass: its name, its type, its help."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        default = defaults.get(field.name, None if field.default is dataclasses.MISSING else field.default)
        kind, options = hints[field.name], {"default": default, "help": field.metadata["help"]}
        types = [part for part in get_args(kind) if part is not type(None)]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif types:  # int | None
            options["type"] = _optional(types[0])
        else:
            options["type"] = kind
        if not isinstance(default, bool):
            options["help"] += f" (default: {'none' if default is None else default})"
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def _optional(kind: Any) -> Any:
    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = f"{kind.__name__} or none"
    return read


def _pick(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(cls) if hasattr(args, field.name)}


def _device(args: argparse.Namespace) -> torch.device:
    """Where to compute: what was asked for, else a GPU, if there is one and the backend runs on it."""
    if args.device is None:
        devices = BACKENDS[args.backend].devices if args.backend else ()
        return torch.device("cuda" if torch.cuda.is_available() and (not devices or "cuda" in devices) else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"--device is {args.device}, expected cpu, cuda or cuda:N")
    device = torch.device(args.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device} is not there: PyTorch sees {torch.cuda.device_count()} GPUs")
    return device


def _no_effect(args: argparse.Namespace, reason: str, *names: str) -> None:
    """ValueError for an option among these that was given, though it would change nothing."""
    options = {f"--{no}{name.replace('_', '-')}" for name in names for no in ("", "no-")}
    if useless := sorted(options & args.given):
        raise ValueError(f"{', '.join(useless)} would have no effect, because {reason}; leave it out")


# ---- train -----------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    """Train a tokenizer where there is none, then a model; end with its losses, samples, a loss curve and a folder."""
    if args.init_from:
        fields = [field.name for field in dataclasses.fields(GPTConfig) if field.name not in NO_OPTIONS]
        _no_effect(args, f"--init-from {args.init_from} brings its own", *fields)
    if args.tokenizer or args.init_from:
        _no_effect(args, f"the tokenizer is that of {args.tokenizer or args.init_from}", "vocab_size", "tokenizer_kind")
    elif args.tokenizer_kind == "char":
        _no_effect(args, "a char tokenizer has a token for each character", "vocab_size")
    out = Path(args.output_dir)
    resume = args.resume and bool(list_checkpoints(out))
    torch.manual_seed(args.seed)
    tokenizer = _tokenizer(args, out, resume)
    if args.init_from:
        model = GPT.from_pretrained(args.init_from)
        if model.config.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"the model in {args.init_from} has {model.config.vocab_size} tokens, "
                f"the tokenizer {tokenizer.vocab_size}"
            )
    else:
        eos = tokenizer.eos_token_id
        settings = _pick(args, GPTConfig) | {
            "vocab_size": tokenizer.vocab_size,
            "bos_token_id": eos,
            "eos_token_id": eos,
        }
        model = GPT(GPTConfig(**settings))
    model.to(args.device)
    block_size = model.config.n_positions if args.block_size is None else args.block_size
    dataset = TextDataset(
        tokenizer, args.files, block_size, cache_dir=args.cache_dir, mask_documents=args.mask_documents
    )
    train_set, validation_set = split(dataset, args.validation_fraction)
    if args.resume and not resume:
        args.overwrite_output_dir = True  # a run that was killed before its first checkpoint begins again
    trainer = Trainer(
        model,
        TrainingArguments(**_pick(args, TrainingArguments)),
        train_dataset=train_set,
        eval_dataset=validation_set,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        tokenizer=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    tokenizer.save_pretrained(out)
    try:
        result = trainer.train(resume_from_checkpoint=resume)
    except TrainingInterrupted as interrupt:
        command = args.resume_command or shlex.join(["gptcore", *_with_resume(args.argv)])
        print(f"\ninterrupted; all of it is in {interrupt.checkpoint}. To go on:\n\n    {command}\n")
        return 130
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()

    log = read_log(out / "log.jsonl")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    print(f"\nvalidation loss   {before:.4f} -> {after:.4f} ({after / before:.0%}), perplexity {math.exp(after):.1f}")
    print(f"training loss     {losses[-1] if losses else result.training_loss:.4f}")
    print(f"speed             {result.metrics['tokens_per_second']:,.0f} tokens/s")
    for number, text in enumerate(_samples(model, tokenizer, args.samples, args.sample_tokens, args.seed), start=1):
        print(f"\n---- sample {number} " + "-" * 60 + f"\n{text}")
    print()
    try:
        plot_loss(log, out / "loss.png")
        print(f"loss curve        {out / 'loss.png'}")
    except ImportError:
        print('loss curve        not drawn: matplotlib is missing (pip install "gptcore[plot]")')
    print(f"model             {out}    (gptcore generate {out} --prompt ...)")
    return 0


def _tokenizer(args: argparse.Namespace, out: Path, resume: bool) -> Tokenizer:
    """The one that was asked for; that of the run or of the model which is gone on from; or a newly trained one."""
    if not resume and not args.overwrite_output_dir and list_checkpoints(out):
        raise FileExistsError(
            f"{out} holds an earlier run: go on from it with --resume, delete it with --overwrite-output-dir, "
            "or choose another --output-dir"
        )
    source = args.tokenizer or (out if resume else args.init_from)
    if source:
        return Tokenizer.from_pretrained(source)
    vocab_size = {} if args.tokenizer_kind == "char" else {"vocab_size": args.vocab_size}
    return Tokenizer.train(args.files, kind=args.tokenizer_kind, **vocab_size)


def _with_resume(argv: Sequence[str]) -> list[str]:
    kept = [word for word in argv if word not in ("--overwrite-output-dir", "--resume")]
    return [*kept, "--resume"]


def _samples(model: GPT, tokenizer: Tokenizer, count: int, new_tokens: int, seed: int) -> list[str]:
    """Texts that the model makes up from the start of a document."""
    start = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.encode("\n")[0]
    new_tokens = min(new_tokens, model.config.n_positions - 1)
    if count < 1 or new_tokens < 1:
        return []
    ids = model.generate(
        [[start]] * count,
        new_tokens,
        do_sample=True,
        temperature=0.8,
        top_k=50,
        seed=seed,
        vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
    )
    return [_text(tokenizer, row[1:].tolist()) for row in ids]


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text up to the end-of-text token, without it; what a terminal cannot print is replaced."""
    end = tokenizer.eos_token_id
    text = tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
    return text.encode("utf-8", errors="replace").decode()


# ---- generate, evaluate, export, bench, info -------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> int:
    """Continue each prompt."""
    model, tokenizer = GPT.from_pretrained(args.model).to(args.device), Tokenizer.from_pretrained(args.model)
    start = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else tokenizer.encode("\n")
    real = min(tokenizer.vocab_size, model.config.vocab_size)  # the rest of a padded vocabulary has no text
    prompts = [tokenizer.encode(prompt) or start for prompt in args.prompt]
    if args.greedy:
        _no_effect(args, "--greedy takes the likeliest token", "temperature", "top_k", "top_p", "seed")
        rows = model.generate(prompts, args.max_new_tokens, vocab_size=real)
    else:
        rows = model.generate(
            prompts,
            args.max_new_tokens,
            do_sample=True,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            vocab_size=real,
        )
    longest = max(map(len, prompts))
    for text, row in zip(args.prompt, rows.tolist(), strict=True):
        print(text + _text(tokenizer, row[longest:]))
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Loss and perplexity of a model on a text."""
    model, tokenizer = GPT.from_pretrained(args.model).to(args.device), Tokenizer.from_pretrained(args.model)
    block_size = model.config.n_positions if args.block_size is None else args.block_size
    dataset = TextDataset(tokenizer, args.files, block_size, cache_dir=args.cache_dir)
    options = TrainingArguments(
        output_dir=args.model, per_device_eval_batch_size=args.batch_size, bf16=args.bf16, disable_tqdm=True
    )
    metrics = Trainer(model, options, eval_dataset=dataset, tokenizer=tokenizer).evaluate()
    print(f"loss {metrics['eval_loss']:.4f} nats a token, perplexity {metrics['perplexity']:.2f}")
    return 0


def export(args: argparse.Namespace) -> int:
    """Write a model for llama.cpp (gguf) or for transformers (hf)."""
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"{output} exists; replace it with --overwrite, or choose another --output")
    model, tokenizer = GPT.from_pretrained(args.model), Tokenizer.from_pretrained(args.model)
    if args.to == "hf":
        export_hf(model, tokenizer, output, args.dtype)
    else:
        export_gguf(model, tokenizer, output, args.dtype, name=Path(args.model).resolve().name)
    print(f"{output}    {sum(path.stat().st_size for path in [output, *output.rglob('*')] if path.is_file()):,} bytes")
    return 0


def bench(args: argparse.Namespace) -> int:
    """Count what the CUDA kernels ask of a GPU, in its model; needs no GPU."""
    if not args.simt:
        raise ValueError("nothing to count: say --simt; what measures time is `make bench` in gptcore's repository")
    print(counters.table(list(counters.count())))
    return 0


def show_info(args: argparse.Namespace) -> int:
    """What this installation is and what it can use."""
    for name, text in info.describe().items():
        first, *rest = text.splitlines()
        print(f"{name:<17} {first}")
        for line in rest:
            print(" " * 18 + line)
    return 0


# ---- the parser ------------------------------------------------------------------------------------------------------


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="gptcore", description="Train and run small GPTs on fused kernels.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any) -> argparse.ArgumentParser:
        text = run.__doc__
        made = commands.add_parser(
            name, help=text[0].lower() + text[1:].rstrip("."), description=text, allow_abbrev=False
        )
        made.set_defaults(run=run)
        return made

    def shared(to: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
        to.add_argument("--threads", type=int, help="threads to compute with (default: as many as cores)")
        to.add_argument(
            "--backend", help=f"kernels to compute with: {', '.join(ops.backends())} (default: the fastest)"
        )
        to.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU, if there is one that the backend takes)")

    def data(to: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
        to.add_argument(
            "files", nargs="+", metavar="FILE", help="text files, each a document or, cut by <|endoftext|>, many"
        )
        to.add_argument("--block-size", type=int, help="tokens in an example (default: the model's n_positions)")
        to.add_argument("--cache-dir", help="where tokens are kept (default: $XDG_CACHE_HOME/gptcore)")

    made = command("train", train)
    group = made.add_argument_group("data and tokenizer")
    data(group)
    group.add_argument("--validation-fraction", type=float, default=0.05, help="of the end of the data (default: 0.05)")
    group.add_argument(
        "--mask-documents", action=argparse.BooleanOptionalAction, default=False, help="documents do not see each other"
    )
    group.add_argument("--tokenizer", help="folder of a tokenizer (default: train one on FILE)")
    group.add_argument("--tokenizer-kind", choices=("bpe", "char"), default="bpe", help="what to train (default: bpe)")
    group.add_argument("--vocab-size", type=int, default=4096, help="tokens of a new bpe tokenizer (default: 4096)")
    group = made.add_argument_group("model")
    group.add_argument(
        "--init-from", help="folder of a model to go on from; the options of this group are then its own"
    )
    add_fields(group, GPTConfig, SMALL_MODEL, skip=NO_OPTIONS)  # type: ignore[arg-type]
    group = made.add_argument_group("training")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir, if any")
    add_fields(group, TrainingArguments, SMALL_RUN)  # type: ignore[arg-type]
    group = made.add_argument_group("the end, and the machine")
    group.add_argument("--samples", type=int, default=3, help="texts to generate at the end (default: 3)")
    group.add_argument("--sample-tokens", type=int, default=120, help="longest of them, in tokens (default: 120)")
    shared(group)
    made.set_defaults(resume_command=None)

    made = command("generate", generate)
    made.add_argument("model", nargs="?", default="out", metavar="MODEL", help="folder of a model (default: out)")
    made.add_argument("--prompt", nargs="+", default=[""], help="texts to continue (default: the start of a document)")
    made.add_argument("--max-new-tokens", type=int, default=100, help="tokens to add (default: 100)")
    made.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    made.add_argument(
        "--temperature", type=float, default=0.8, help="below 1 sharpens, above 1 flattens (default: 0.8)"
    )
    made.add_argument(
        "--top-k", type=_optional(int), default=50, help="draw from so many likeliest tokens (default: 50)"
    )
    made.add_argument(
        "--top-p", type=_optional(float), help="draw from the fewest tokens of this probability (default: none)"
    )
    made.add_argument("--seed", type=int, help="for the same draws again (default: new ones each time)")
    shared(made)

    made = command("evaluate", evaluate)
    made.add_argument("model", metavar="MODEL", help="folder of a model")
    data(made)
    made.add_argument("--batch-size", type=int, default=16, help="examples in a forward pass (default: 16)")
    made.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False, help="compute in bfloat16")
    shared(made)

    made = command("export", export)
    made.add_argument("model", nargs="?", default="out", metavar="MODEL", help="folder of a model (default: out)")
    made.add_argument("--to", choices=("gguf", "hf"), default="gguf", help="for llama.cpp or for transformers (gguf)")
    made.add_argument(
        "--dtype", choices=(*DTYPES, "q8_0"), help="of the weights (default: the model's); hf has no q8_0"
    )
    made.add_argument("-o", "--output", required=True, help="the file or folder to write")
    made.add_argument("--overwrite", action="store_true", help="replace what is there")

    made = command("bench", bench)
    made.add_argument("--simt", action="store_true", help="count bytes, bank conflicts and tensor-core instructions")

    command("info", show_info)
    parser._commands = commands.choices
    return parser


def main(argv: Sequence[str] | None = None, **overrides: Any) -> int:
    """Run one command. Returns 0, 1 after an error that it explains, 2 for wrong usage, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse(argv)
    args.argv = argv
    vars(args).update(overrides)
    try:
        if getattr(args, "threads", None) is not None:
            if args.threads < 1:
                raise ValueError(f"--threads is {args.threads}, expected at least 1")
            torch.set_num_threads(args.threads)
        backend = getattr(args, "backend", None)
        if backend is not None and (reason := ops.backends().get(backend)):
            raise ValueError(f"--backend {backend} is not usable here: {reason}")
        with ops.use(backend or ops.in_use()):
            if hasattr(args, "device"):
                args.device = _device(args)
            status: int = args.run(args)
        return status
    except (OSError, ValueError, TypeError, ImportError, CheckpointError, ArithmeticError) as error:
        print(f"gptcore {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
