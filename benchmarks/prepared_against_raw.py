"""Train on a corpus as it is and on what `gptcore prepare` makes of it, and print the losses on clean held-out texts.

    python -m benchmarks.prepared_against_raw OUT FOLDER...

The texts are the documentation, README files and Python package descriptions below the folders. A tenth of their
packages, chosen by a hash of the name, is held out, prepared, and rid of texts that share 13 words with the others.
Both corpora have the same tokenizer, and a model sees equally many tokens of them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from gptcore import GPT, GPTConfig
from gptcore.cli import main as gptcore
from gptcore.data.datasets import TextDataset, TokenDataset
from gptcore.data.prepared import find_prepared
from gptcore.text.tokenizer import END_OF_TEXT, Tokenizer
from gptcore.training.trainer import Trainer, TrainingArguments

CHARACTERS = 20_000  # of a document
TOTAL = 16 << 20  # characters of all documents
BLOCK, BATCH, STEPS, WARMUP = 128, 16, 200, 20
SEEDS = (1, 2)
# Documentation of programs has more numbers and symbols than the web pages for which the threshold, .8, was made
CONFIG = """
[gopher_quality]
min_words_with_letter = 0.6

[split]
validation = 0.0

[shards]
vocab_size = 2048
"""


def documents(folders: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield the texts below some folders, each with a name for its package: the last two folders that it is in."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            name = path.name.lower().removesuffix(".gz")
            if name in ("copyright", "changelog", "news", "authors", "metadata", "readme") or name.endswith(
                (".txt", ".md", ".rst", ".pod", ".debian")
            ):
                yield "/".join(path.parts[-3:-1]), read(path)


def read(path: Path) -> str:
    """Return the beginning of a text; nothing of a folder, and of what is not UTF-8."""
    if not path.is_file():
        return ""
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")[:CHARACTERS]
    except UnicodeDecodeError:
        return ""


def collect(folder: Path, inputs: Sequence[Path]) -> None:
    """Write train.jsonl, the same as train.txt, and held_out.jsonl."""
    found = [(package, text) for package, text in documents(inputs) if text.strip()]
    random.Random(0).shuffle(found)
    with (
        open(folder / "train.jsonl", "w", encoding="utf-8") as train,
        open(folder / "train.txt", "w", encoding="utf-8") as raw,
        open(folder / "held_out.jsonl", "w", encoding="utf-8") as held_out,
    ):
        for package, text in found:
            if hashlib.sha256(package.encode()).digest()[0] < 26:
                held_out.write(json.dumps({"text": text}) + "\n")
            elif raw.tell() < TOTAL:
                train.write(json.dumps({"text": text}) + "\n")
                raw.write(text + f"\n{END_OF_TEXT}\n")


def prepare(folder: Path, name: str, *options: str) -> Path:
    config = folder / "prepare.toml"
    config.write_text(CONFIG)
    out, source = folder / name, folder / f"{name}.jsonl"
    assert gptcore(["prepare", str(source), "-o", str(out), "--config", str(config), "--overwrite", *options]) == 0
    return out


def tokens(folder: Path, tokenizer: Tokenizer) -> TokenDataset:
    found = find_prepared([folder])
    assert found is not None
    return TokenDataset(found.train, BLOCK, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer)


def train(dataset: TokenDataset, held_out: TokenDataset, tokenizer: Tokenizer, seed: int, out: Path) -> float:
    """Return the loss on the held-out set after STEPS steps."""
    torch.manual_seed(seed)
    shape = {"n_positions": BLOCK, "n_embd": 128, "n_layer": 2, "n_head": 4}
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape, **none))  # type: ignore[arg-type]
    args = TrainingArguments(
        str(out), per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=2e-3, lr_scheduler_type="cosine",
        warmup_steps=WARMUP, weight_decay=0.1, save_steps=0, seed=seed, disable_tqdm=True, overwrite_output_dir=True,
    )  # fmt: skip
    trainer = Trainer(model, args, dataset, held_out, tokenizer=tokenizer)
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def main(folder: Path, inputs: Sequence[Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    collect(folder, inputs)
    clean = prepare(folder, "train")
    tokenizer = Tokenizer.from_pretrained(clean / "tokenizer")
    others = ("--tokenizer", str(clean / "tokenizer"), "--decontaminate", str(folder / "train.jsonl"))
    held_out = tokens(prepare(folder, "held_out", *others), tokenizer)
    corpora: dict[str, TokenDataset] = {
        "raw": TextDataset(tokenizer, folder / "train.txt", BLOCK, cache_dir=folder),
        "prepared": tokens(clean, tokenizer),
    }
    print(f"{len(held_out) * BLOCK:,} held-out tokens; {STEPS * BATCH * BLOCK:,} tokens of training")
    for name, dataset in corpora.items():
        losses = [train(dataset, held_out, tokenizer, seed, folder / "run") for seed in SEEDS]
        print(f"{name:<9} {len(dataset) * BLOCK:>10,} tokens   loss {', '.join(f'{loss:.4f}' for loss in losses)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
