"""Write texts: what follows a prompt, or the reply to a conversation. Metrics by sacrebleu and rouge-score."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gptcore.config import IGNORED
from gptcore.data.collator import DataCollatorForLanguageModeling
from gptcore.files import PathLike
from gptcore.generation import Batch, Settings
from gptcore.model import GPT
from gptcore.quantized import kinds_of
from gptcore.tasks.examples import Columns, Read
from gptcore.tasks.targets import Target, end_token, read_targets
from gptcore.tasks.task import Prediction, Result, Task, Window
from gptcore.tasks.vocabulary import add_tokens
from gptcore.text.chat import Template, find_template, template_of, with_special_tokens, with_template
from gptcore.text.pretokenize import END_OF_TEXT
from gptcore.text.tokenizer import Tokenizer

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


class Write(Task[Target]):
    """What follows a prompt. settings: max_new_tokens; None for the length of the longest target that was learnt."""

    name, model_class = "text", GPT
    shown = ("text",)
    options = frozenset({"max_new_tokens"})
    head_options = frozenset()
    packs = True
    template: Template | None = None
    longest = 1  # tokens of a target

    @classmethod
    def read(cls, path: PathLike, columns: Columns, labelled: bool = True) -> Read:
        return read_targets(path, columns, chat=False, labelled=labelled)

    @classmethod
    def settle(cls, train: list[Target], validation: list[Target]) -> dict[str, Any]:
        return {}

    @classmethod
    def load(cls, folder: PathLike, body: Mapping[str, Any], head: Mapping[str, Any]) -> GPT:
        model = GPT.from_pretrained(folder, **body)
        if kinds_of(model):
            raise ValueError(f"{folder} is quantized, and quantized weights are not trained; export it to hf as f32")
        return model

    @classmethod
    def prepare_tokenizer(cls, tokenizer: Tokenizer, chat_template: str | None, layout: str) -> Tokenizer:
        return tokenizer if tokenizer.eos_token is not None else with_special_tokens(tokenizer, [END_OF_TEXT])

    def prepare_model(self, model: nn.Module, tokens: int) -> list[int]:
        """Give the model rows for the tokens from `tokens` on, and the end of a text; returns their ids."""
        assert isinstance(model, GPT)
        new = add_tokens(model, tokens, self.tokenizer.vocab_size)
        model.config = dataclasses.replace(model.config, eos_token_id=self.stop)
        return new

    def attach(self, model: nn.Module) -> None:
        """Do nothing: the tokenizer keeps the chat template, and a language model has no other settings."""

    @property
    def metric(self) -> str:
        return "chrf"

    @property
    def selects(self) -> tuple[str, bool]:
        return "eval_loss", False  # writing the validation set takes far longer than its loss

    @property
    def stop(self) -> int:
        """Return the token that ends a text."""
        return self.tokenizer.special_tokens[end_token(self.tokenizer)]

    @property
    def new_tokens(self) -> int:
        """Return how many tokens a text has at most, for which a prompt leaves room."""
        return min(self.settings.get("max_new_tokens") or self.longest, self.max_length - 1)

    def windows(self, example: Target, labelled: bool = False) -> list[Window]:
        if not labelled:
            try:
                ids = example.prompt(self.tokenizer, self.template, self.max_length - self.new_tokens)
            except ValueError:  # the last exchange leaves room for a shorter text only
                ids = example.prompt(self.tokenizer, self.template, self.max_length - 1)
            return [Window(ids)]
        inputs, cut = example.example(self.tokenizer, self.template, self.max_length)
        self.truncated += cut > 0
        self.longest = max(self.longest, sum(label != IGNORED for label in inputs["labels"]))
        return [Window(inputs["input_ids"], targets={"labels": inputs["labels"]})]

    def run(self, model: nn.Module, windows: Sequence[Window], batch_size: int) -> list[Tensor]:
        """Return the ids of the likeliest text after each prompt, without its end."""
        assert isinstance(model, GPT)
        prompts, positions = [window.input_ids for window in windows], model.config.n_positions
        settings = [
            Settings(max(1, min(self.new_tokens, positions + 1 - len(ids))), eos_token_id=self.stop) for ids in prompts
        ]
        written = write(model, self.tokenizer, prompts, settings, batch_size)
        return [torch.tensor(ids[:-1] if ids[-1] == self.stop else ids) for ids in written]

    def decode(self, example: Target, windows: Sequence[Window], outputs: Sequence[Tensor]) -> Prediction:
        return {"text": self.tokenizer.decode(outputs[0].tolist(), skip_special_tokens=True).strip()}

    def score(self, examples: Sequence[Target], predictions: Sequence[Prediction]) -> Result:
        written, right = [p["text"] for p in predictions], [str(e.label) for e in examples]
        metrics, each = text_metrics(written, right)
        errors = [
            {"prompt": e.source, "expected": label, "written": text, "chrf": chrf}
            for e, label, text, chrf in zip(examples, right, written, each, strict=True)
            if text != label.strip()
        ]
        return Result(metrics, errors=sorted(errors, key=lambda error: error["chrf"]))

    def baselines(
        self, train: Sequence[Target], validation: Sequence[Target]
    ) -> Iterator[tuple[str, list[Prediction]]]:
        sources = [example.source for example in validation]
        pairs = [(example.source, str(example.label)) for example in train]
        for name, texts in baselines(sources, pairs).items():
            yield name, [{"text": text} for text in texts]

    def describe(self, examples: Sequence[Target]) -> list[str]:
        lengths = sorted(len(self.tokenizer.encode(str(e.label))) for e in examples)
        return [f"tokens of targets: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}"]

    @property
    def collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        return DataCollatorForLanguageModeling(self.tokenizer)


class Chat(Write):
    """The reply to a conversation. The chat template is that of the tokenizer."""

    name: ClassVar[str] = "chat"
    options = frozenset({"max_new_tokens", "chat_template"})

    def __init__(self, tokenizer: Tokenizer, labels: Sequence[str], settings: Mapping[str, Any]) -> None:
        super().__init__(tokenizer, labels, settings)
        self.template = template_of(tokenizer)
        if self.template is None:
            raise ValueError("the tokenizer has no chat template; gptcore finetune --task chat adds one")

    @classmethod
    def read(cls, path: PathLike, columns: Columns, labelled: bool = True) -> Read:
        return read_targets(path, columns, chat=True, labelled=labelled)

    @classmethod
    def prepare_tokenizer(cls, tokenizer: Tokenizer, chat_template: str | None, layout: str) -> Tokenizer:
        """Return the tokenizer with a template: the one of this name, else its own, else chatml."""
        template = template_of(tokenizer) if chat_template is None else find_template(chat_template)
        return with_template(tokenizer, template or find_template("chatml"))

    @property
    def stop(self) -> int:
        assert self.template is not None
        return self.template.stop_token(self.tokenizer)


def writing_task(model: GPT, tokenizer: Tokenizer, max_new_tokens: int | None = None) -> Write:
    """Return the task of a language model: Chat if it has a chat template, else Write."""
    kind = Write if template_of(tokenizer) is None else Chat
    return kind(tokenizer, [], {"max_length": model.config.n_positions, "max_new_tokens": max_new_tokens})


def write(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Settings],
    batch_size: int,
    stops: Sequence[str] = (),
) -> list[list[int]]:
    """Return the tokens after each prompt, to the end token or, with that token, to the first text of `stops`.

    Rows of similar lengths are in a batch; a row has the same text in any batch. Raises ValueError for a prompt that
    leaves too few positions.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    real = min(tokenizer.vocab_size, model.config.vocab_size)
    batch, rows = Batch(model, vocab_size=real), {}
    written: list[list[int]] = [[] for _ in prompts]
    longest = max((len(text.encode()) for text in stops), default=0)  # tokens that a text of `stops` may be spread over
    while order or len(batch):
        while order and len(batch) < batch_size:
            number = order.pop(0)
            rows[batch.add(list(prompts[number]), settings[number])] = number
        for token in batch.step():
            if token.error is not None:
                raise token.error
            ids = written[rows[token.row]]
            ids.append(token.token)
            if longest and token.finish_reason is None:
                end = tokenizer.decode(ids[-longest:])
                if any(text in end for text in stops):
                    batch.drop(token.row)
    return written


def text_metrics(written: Sequence[str], references: Sequence[str]) -> tuple[dict[str, float], list[float]]:
    """Return BLEU, chrF, ROUGE-1, -2 and -L (F1, with stemming) and exact matches, out of 100; and each text's chrF.

    ROUGE knows only ASCII letters and digits. Raises ImportError without the packages.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ImportError('metrics of texts need sacrebleu and rouge-score: pip install "gptcore[tasks]"') from error
    scorer, chrf, names = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True), CHRF(), "rouge1 rouge2 rougeL"
    scores = [scorer.score(right, text) for right, text in zip(references, written, strict=True)]
    metrics = {
        "chrf": float(chrf.corpus_score(list(written), [list(references)]).score),
        "bleu": float(BLEU().corpus_score(list(written), [list(references)]).score),
    }
    for name in names.split():
        metrics[name] = 100 * sum(score[name].fmeasure for score in scores) / len(scores)
    equal = sum(text.strip() == right.strip() for text, right in zip(written, references, strict=True))
    each = [float(chrf.sentence_score(text, [right]).score) for text, right in zip(written, references, strict=True)]
    return {**metrics, "exact": 100 * equal / len(references)}, each


def baselines(sources: Sequence[str], training: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Return texts that cost nothing: the source itself, its first three sentences, the commonest training target,

    and where scikit-learn is installed the target of the nearest training prompt.
    """
    prompts, targets = zip(*training, strict=True)
    found = {
        "copy of the prompt": [source.strip() for source in sources],
        "lead-3": [" ".join(SENTENCE_END.split(source.strip())[:3]) for source in sources],
        "commonest target": [Counter(targets).most_common(1)[0][0]] * len(sources),
    }
    if (nearest := _nearest(sources, prompts)) is not None:
        found["nearest prompt's target"] = [targets[i] for i in nearest]
    return found


def _nearest(sources: Sequence[str], prompts: Sequence[str]) -> list[int] | None:
    """Return for each source the most similar prompt by TF-IDF of words; None without scikit-learn or words."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        return None
    vectors = TfidfVectorizer()
    try:
        known = vectors.fit_transform(prompts)
    except ValueError:
        return None
    return [int((known @ row.T).toarray().argmax()) for row in vectors.transform(sources)]
