"""English-looking documents for the tests of `gptcore prepare`: random sentences of the words of the licence."""

import json
import random
import re
from pathlib import Path

WORDS = sorted(set(re.findall(r"\b[a-z]{2,12}\b", (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8"))))


def sentence(rng: random.Random) -> str:
    words = rng.choices(WORDS, k=rng.randint(8, 14))
    words[2::4] = rng.choices(["the", "of", "and", "to", "that", "with"], k=len(words[2::4]))
    return " ".join(words).capitalize() + "."


def text(seed: int, lines: int = 8) -> str:
    rng = random.Random(seed)
    return "\n".join(" ".join(sentence(rng) for _ in range(3)) for _ in range(lines))


def edited(original: str, share: float, seed: int) -> str:
    """Return the text with a share of its words replaced."""
    rng = random.Random(seed)
    words = original.split(" ")
    for i in rng.sample(range(len(words)), round(share * len(words))):
        words[i] = rng.choice(WORDS)
    return " ".join(words)


def write_jsonl(path: Path, texts: list[str], **fields: str) -> Path:
    path.write_text("".join(json.dumps({"text": item, **fields}) + "\n" for item in texts), encoding="utf-8")
    return path
