"""gptcore prepare: the whole way from files to shards, resumed, on several processes, and into training."""

import contextlib
import hashlib
import json
import os
import pickle
import resource
import signal
from pathlib import Path

import made_texts
import numpy as np
import pytest
import zstandard
from processes import start_printing

from gptcore.cli import main
from gptcore.data.shards import read_shard
from gptcore.prepare import pipeline
from gptcore.prepare.pipeline import prepare
from gptcore.prepare.recipe import RECIPES, make_recipe, read_changes
from gptcore.text.tokenizer import Tokenizer

SMALL = {"shards": {"vocab_size": 300, "shard_bytes": 40_000}, "split": {"validation": 0.2, "test": 0.1}}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources with exact and near duplicates, an e-mail address, and a document of no words."""
    folder = tmp_path_factory.mktemp("inputs") / "raw"
    folder.mkdir()
    texts = [made_texts.text(seed) for seed in range(60)]
    near = [made_texts.edited(texts[i], 0.01, i) for i in range(10)]
    mail = made_texts.text(100) + "\nWrite to someone@example.org about the Work and the License."
    made_texts.write_jsonl(folder / "a.jsonl", [*texts[:40], *near, made_texts.text(300, lines=1), mail], license="mit")
    made_texts.write_jsonl(folder / "b.jsonl", [*texts[30:], texts[50]])
    (folder / "c.txt").write_text(made_texts.text(200) + "\n<|endoftext|>\n" + made_texts.text(201), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "CHUNK_RECORDS", 20)


def run(inputs, out, recipe="web", changes=SMALL, **options):
    return prepare(list(map(str, inputs)), out, make_recipe(recipe, changes), log=lambda line: None, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a folder by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def documents(out: Path, split: str = "*") -> list[dict]:
    lines = []
    for path in sorted(out.glob(f"text/{split}-*.jsonl.zst")):
        lines += zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().splitlines()
    return [json.loads(line) for line in lines]


def read_rejected(out: Path) -> list[dict]:
    file = out / "rejected" / "second_pass.jsonl.zst"
    data = zstandard.ZstdDecompressor().stream_reader(file.read_bytes()).read()
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture(scope="module")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("prepared") / "out"
    pipeline_records, pipeline.CHUNK_RECORDS = pipeline.CHUNK_RECORDS, 20
    try:
        return out, run([raw], out)
    finally:
        pipeline.CHUNK_RECORDS = pipeline_records


def test_the_report_accounts_for_every_document(prepared, raw):
    out, report = prepared
    assert report == json.loads((out / "report.json").read_text())
    dropped = sum(counts["documents"] for step in report["steps"] for counts in step["dropped"].values())
    assert report["read"]["documents"] == 52 + 31 + 2
    assert report["kept"]["documents"] == 60 + 1 + 2
    assert dropped == 85 - 63
    assert report["duplicates"]["exact"] == 11
    assert report["duplicates"]["near"] == 10
    rejected = [
        json.loads(line)
        for path in sorted(out.glob("rejected/*.zst"))
        for line in zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().splitlines()
    ]
    assert len(rejected) == dropped
    assert {item["reason"] for item in rejected} == {"exact_duplicate", "near_duplicate", "gopher_short_doc"}
    assert report["private"] == {"email": 1}
    licensed = [document for document in documents(out) if document["metadata"].get("license") == "mit"]
    assert report["licences"] == {"mit": len(licensed)}
    assert report["languages"]["after"] == {"en": 63}


def test_tokens_are_those_of_the_kept_texts(prepared):
    out, report = prepared
    tokenizer = Tokenizer.from_pretrained(out / "tokenizer")
    for name, split in report["splits"].items():
        ids, lines = [], iter(documents(out, name))
        for shard in split["shards"]:
            found = read_shard(out / shard["file"], vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint)
            assert (found.sha256, len(found)) == (shard["sha256"], shard["tokens"])
            ids += found.tokens.tolist()
            texts = [next(lines)["text"].encode() for _ in range(found.documents)]
            digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
            assert found.source == hashlib.sha256(digests).hexdigest()
        texts = [document["text"] for document in documents(out, name)]
        assert len(texts) == split["documents"] > 0
        assert tokenizer.decode(ids) == "".join(text + "<|endoftext|>" for text in texts)
    assert len(report["splits"]["train"]["shards"]) > 1
    assert "someone@example.org" not in "".join(document["text"] for document in documents(out))


def test_the_page_and_the_card(prepared):
    out, report = prepared
    page, card = (out / "report.html").read_text(encoding="utf-8"), (out / "README.md").read_text(encoding="utf-8")
    for reason in ("near_duplicate", "gopher_short_doc"):
        assert f'id="{"near_duplicates" if reason.startswith("near") else "gopher_quality"}-{reason}"' in page
        assert f": {reason} | 1" in card
    assert "<svg" in page
    assert "<ins>" in page
    assert "<script" not in page
    assert card.startswith("---\ntask_categories:\n- text-generation\n")
    assert f"| train | {report['splits']['train']['documents']}" in card


@pytest.mark.slow
def test_the_order_of_inputs_and_the_number_of_processes_make_no_difference(prepared, raw, tmp_path):
    files = [f"raw={raw / name}" for name in ("c.txt", "b.jsonl", "a.jsonl")]
    run(files, tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == contents(prepared[0])


def test_shuffled_records_give_the_same_shards(prepared, raw, tmp_path):
    """Which duplicate is kept and where a document goes follow from contents."""
    shuffled = tmp_path / "raw"
    shuffled.mkdir()
    for path in raw.iterdir():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (shuffled / path.name).write_text(
            "".join(lines if path.suffix == ".txt" else reversed(lines)), encoding="utf-8"
        )
    run([shuffled], tmp_path / "out")
    for path in prepared[0].glob("*.tokens"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kill_after", [0, 3, 7, 9, 13])
def test_a_killed_run_goes_on_to_the_same_bytes(prepared, raw, tmp_path, monkeypatch, kill_after):
    """Each rename that makes something appear may be the last that the process lives to do."""
    renames = 0
    real = {name: getattr(os, name) for name in ("rename", "replace")}

    def dying(name):
        def rename(*paths):
            nonlocal renames
            if renames == kill_after:
                raise KeyboardInterrupt
            renames += 1
            real[name](*paths)

        return rename

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, dying(name))
        with pytest.raises(KeyboardInterrupt):
            run([raw], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run([raw], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepared[0])
    assert not (tmp_path / "out.partial").exists()


def run_killed(raw: Path, out: Path) -> None:
    inner = pipeline.second_pass

    def second_pass(context, number, *rest):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        inner(context, number, *rest)

    pipeline.CHUNK_RECORDS, pipeline.second_pass = 20, second_pass
    run([raw], out)


def test_kill_and_a_full_disk(prepared, raw, tmp_path):
    """SIGKILL in the second pass; then files that cannot grow (a full disk gives the same kind of error)."""
    out = tmp_path / "out"
    process = start_printing(tmp_path / "printed", run_killed, raw, out)
    process.join(100)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "printed").read_text()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard[1]))
    try:
        with pytest.raises(OSError, match=r"out\.partial"):
            run([raw], out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, hard)
    run([raw], out)
    assert contents(out) == contents(prepared[0])


def test_what_is_there_is_not_overwritten(prepared, raw, tmp_path):
    out, report = prepared
    assert run([raw], out) == report  # complete already
    with pytest.raises(FileExistsError, match="was not made by this command"):
        run([raw], out, recipe="none")
    with interrupted_before_the_report(), pytest.raises(KeyboardInterrupt):
        run([raw], tmp_path / "out")
    with pytest.raises(FileExistsError, match="unfinished run that differs in settings"):
        run([raw], tmp_path / "out", recipe="none")
    run([raw], tmp_path / "out", recipe="none", overwrite=True)
    assert (tmp_path / "out/report.json").is_file()


@contextlib.contextmanager
def interrupted_before_the_report():
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Result", interrupt)
        yield


def test_near_duplicates_are_on_one_side(raw, tmp_path):
    """Kept or not: no document of one split is like one of another."""
    texts = [made_texts.text(seed) for seed in range(30)]
    family = [made_texts.edited(text, 0.01, i) for i, text in enumerate(texts) for _ in range(2)]
    made_texts.write_jsonl(tmp_path / "raw.jsonl", [*texts, *family])
    changes = SMALL | {"near_duplicates": {"action": "keep"}, "split": {"validation": 0.5}}
    report = run([tmp_path / "raw.jsonl"], tmp_path / "out", recipe="none", changes=changes)
    assert report["kept"]["documents"] == 60
    sides = [{d["text"] for d in documents(tmp_path / "out", split)} for split in ("train", "validation")]
    assert min(map(len, sides)) > 10
    for text, copy in zip(texts, family[::2], strict=True):
        assert (text in sides[0]) == (copy in sides[0])


def test_mixing_and_its_errors(raw, tmp_path):
    changes = SMALL | {"mix": {"weights": {"a": 0.2, "b": 0.8}}}
    inputs = [f"a={raw}/a.jsonl", f"b={raw}/b.jsonl"]
    report = run(inputs, tmp_path / "out", changes=changes)
    sources = report["sources"]
    sizes = {name: sources[name]["training_bytes"] * sources[name]["repeats"] for name in "ab"}
    assert sizes["b"] / sum(sizes.values()) == pytest.approx(0.8)
    mixed = documents(tmp_path / "out", "train")
    bytes_of = {name: sum(len(d["text"]) for d in mixed if d["source"] == name) for name in "ab"}
    assert bytes_of["b"] / sum(bytes_of.values()) == pytest.approx(0.8, abs=0.1)
    validation = [d["text"] for d in documents(tmp_path / "out", "validation")]
    assert len(validation) == len(set(validation))
    with pytest.raises(ValueError, match="weights are of a, c; the sources are a, b"):
        run(inputs, tmp_path / "other", changes={"mix": {"weights": {"a": 1, "c": 1}}})
    assert not (tmp_path / "other.partial").exists()


def test_repeated_lines_and_contamination(tmp_path):
    texts = [made_texts.text(seed) for seed in range(30)]
    shared = made_texts.text(99, lines=1)
    made_texts.write_jsonl(tmp_path / "raw.jsonl", [f"{text}\n{shared}" for text in texts])
    (tmp_path / "exam.txt").write_text(" ".join(texts[3].split()[20:36]).upper(), encoding="utf-8")
    changes = SMALL | {
        "repeated_lines": {"unit": "line"}, "decontaminate": {"files": [str(tmp_path / "exam.txt")]},
        "private": {"enabled": False},
    }  # fmt: skip
    report = run([tmp_path / "raw.jsonl"], tmp_path / "out", changes=changes)
    kept = [document["text"] for document in documents(tmp_path / "out")]
    assert sum(shared in text for text in kept) <= 1
    assert not any(texts[3] in text for text in kept)
    assert report["kept"]["documents"] == 29
    (example,) = report["examples"]["decontaminate"]["contaminated"]
    assert " ".join(example["marked"].split()) in " ".join(texts[3].split()[20:36])
    assert len(example["marked"].split()) == 13


def test_many_empty_files(tmp_path):
    """Files without text cost a record each and are counted."""
    for number in range(200):
        (tmp_path / f"{number}.txt").touch()
    made_texts.write_jsonl(tmp_path / "pages.jsonl", [made_texts.text(seed) for seed in range(5)])
    report = run([tmp_path], tmp_path / "out")
    assert (report["read"]["documents"], report["kept"]["documents"]) == (205, 5)
    assert [step["dropped"] for step in report["steps"] if step["dropped"]] == [
        {"empty": {"documents": 200, "bytes": 0}}
    ]


def test_damage_stops_the_run_or_is_listed(tmp_path):
    """The finished chunks are used again when the run is repeated with skip_bad."""
    path = made_texts.write_jsonl(tmp_path / "pages.jsonl", [made_texts.text(seed) for seed in range(30)])
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(
        ValueError, match=r"pages\.jsonl:31: the field 'text' is of type int, expected a string"
    ) as error:
        run([path], tmp_path / "out")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # as it comes from a worker
    report = run([path], tmp_path / "out", skip_bad=True)
    assert report["kept"]["documents"] == 30
    assert report["read"]["bad"] == 1
    assert report["read"]["bad_records"] == [[f"{path}:31", "the field 'text' is of type int, expected a string"]]
    assert "expected a string" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_an_output_inside_the_input_folder_is_not_read(tmp_path, monkeypatch):
    """Killed after its last rename: OUT is complete, and what is left beside it goes."""
    made_texts.write_jsonl(tmp_path / "pages.jsonl", [made_texts.text(seed) for seed in range(20)])

    def interrupt(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run([tmp_path], tmp_path / "out")
    assert (tmp_path / "out.partial").is_dir()
    before = contents(tmp_path / "out")
    assert run([tmp_path], tmp_path / "out")["read"]["documents"] == 20
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(ValueError, match="are in the output folder"):
        run([tmp_path / "out"], tmp_path / "out")


def test_a_document_left_empty_or_none_left(tmp_path):
    made_texts.write_jsonl(tmp_path / "raw.jsonl", ["short", "", " "])
    with pytest.raises(ValueError, match="no document is left for training: of 0 that passed"):
        run([tmp_path / "raw.jsonl"], tmp_path / "out")


def test_train_takes_the_folder(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = prepared[0]
    words = ["--n-positions", "16", "--n-embd", "16", "--n-layer", "1", "--n-head", "2", "--max-steps", "2",
             "--warmup-steps", "0", "--samples", "0", "--disable-tqdm", "--device", "cpu"]  # fmt: skip
    assert main(["train", str(out), "--output-dir", "model", *words]) == 0, capsys.readouterr().err
    assert "validation loss" in capsys.readouterr().out
    assert Tokenizer.from_pretrained("model").fingerprint == Tokenizer.from_pretrained(out / "tokenizer").fingerprint
    assert main(["train", str(out), "--output-dir", "other", "--vocab-size", "300", *words]) == 1
    assert "--vocab-size would have no effect" in capsys.readouterr().err
    assert main(["train", str(tmp_path), "--output-dir", "other", *words]) == 1
    assert "folder without manifest.json" in capsys.readouterr().err


def test_the_command(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("prepare.toml").write_text("[shards]\nvocab_size = 300\n\n[gopher_quality]\nmin_words = 1000\n")
    arguments = ["prepare", str(raw), "-o", "out", "--config", "prepare.toml", "--workers", "1"]
    assert main(arguments) == 1
    assert "no document is left for training" in capsys.readouterr().err
    Path("prepare.toml").write_text("[shards]\nvocab_size = 300\n\n[gopher_quality]\nenabled = false\n")
    assert main([*arguments, "--overwrite"]) == 0, capsys.readouterr().err
    assert "kept      6" in capsys.readouterr().out
    command = json.loads(Path("out/report.json").read_text())["command"]
    assert command == f"gptcore prepare {raw} -o out --config prepare.toml"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[gopher]\n", "section 'gopher', which is not known"),
        ("[length]\nmin = 3\n", r"\[length\] has 'min', which is not known; expected min_chars, max_chars"),
        ('[length]\nmin_chars = "3"\n', r"\[length\]: 'min_chars' should be of type int, not '3'"),
        ("[split]\nvalidation = 1.5\n", "leave a part for training"),
        ("[split]\nenabled = false\n", "cannot be switched off"),
        ("length = 3\n", "should be a section"),
        ("[length\n", "is not TOML"),
    ],
)
def test_a_bad_config_says_what_is_expected(tmp_path, text, error):
    path = tmp_path / "prepare.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=error):
        make_recipe("web", read_changes(path), path)


def test_all_recipes_are_whole():
    for name in RECIPES:
        assert make_recipe(name).to_json()["recipe"] == name


def test_perplexity_of_a_model(prepared, raw, tmp_path, monkeypatch):
    import torch

    from gptcore import GPT, GPTConfig

    tokenizer = Tokenizer.from_pretrained(prepared[0] / "tokenizer")
    torch.manual_seed(0)
    eos = tokenizer.eos_token_id
    config = GPTConfig(vocab_size=tokenizer.vocab_size, n_positions=32, n_embd=16, n_layer=1, n_head=2,
                       bos_token_id=eos, eos_token_id=eos)  # fmt: skip
    GPT(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    changes = SMALL | {"perplexity": {"model": str(tmp_path / "model"), "max_perplexity": 1e6}}
    report = run([raw], tmp_path / "out", changes=changes)
    measured = [document["metadata"]["perplexity"] for document in documents(tmp_path / "out")]
    assert np.all(np.isfinite(measured))
    assert 100 < np.median(measured) < 1000  # an untrained model of 300 tokens
    assert sum(report["distributions"]["after"]["perplexity"]) == report["kept"]["documents"]
    changes["perplexity"]["max_perplexity"] = 2.0
    with pytest.raises(ValueError, match="no document is left"):
        run([raw], tmp_path / "none", changes=changes)


@pytest.mark.parametrize("kind", ["one label", "several labels", "gpt1"])
def test_a_classifier_drops_what_it_labels(prepared, raw, tmp_path, kind):
    import torch

    from gptcore import GPTConfig, GPTForSequenceClassification
    from gptcore.text.chat import with_special_tokens

    tokenizer, several = Tokenizer.from_pretrained(prepared[0] / "tokenizer"), kind == "several labels"
    start, end = [], []
    if kind == "gpt1":  # Radford et al. 2018: tokens around each window
        tokenizer = with_special_tokens(tokenizer, ["<|start|>", "<|extract|>"])
        start, end = ([tokenizer.special_tokens[name]] for name in ("<|start|>", "<|extract|>"))
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    problem = "multi_label_classification" if several else None
    model = GPTForSequenceClassification(config, id2label=["good", "toxic"], problem_type=problem).eval()
    if start:
        model.settings = {"gptcore": {"layout": "gpt1", "max_length": 32}}
    torch.nn.init.normal_(model.score.weight, std=0.2)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    size = 32 - len(start) - len(end)

    def probability(text: str) -> float:
        """Return that of the worse of the first two windows."""
        ids = tokenizer.encode(text)[: 2 * size]
        with torch.no_grad():
            logits = [model(torch.tensor([[*start, *ids[i : i + size], *end]])).logits for i in (0, size)]
        logits = torch.cat(logits)
        return (logits.sigmoid() if several else logits.softmax(1))[:, 1].max().item()

    limit = float(np.median([probability(document["text"]) for document in documents(prepared[0])])) + 1e-6
    section = {"model": str(tmp_path / "model"), "label": "toxic", "max_windows": 2, "max_probability": limit}
    report = run([raw], tmp_path / "out", changes=SMALL | {"classifier": section})
    (step,) = [step for step in report["steps"] if step["step"] == "classifier"]
    kept, dropped = documents(tmp_path / "out"), read_rejected(tmp_path / "out")
    assert len(dropped) == step["dropped"]["classified_toxic"]["documents"]
    assert 20 < len(dropped) < len(kept) + 20
    for found in [*kept, *dropped]:
        if "<EMAIL>" not in found["text"]:
            assert found["metadata"]["probability"] == pytest.approx(probability(found["text"]), abs=1e-3)
            assert (probability(found["text"]) <= limit) == (found in kept)
    for rejected in dropped:
        ((start, stop),) = rejected["spans"]
        read = tokenizer.decode(tokenizer.encode(rejected["text"])[: 2 * size])
        assert read.find(rejected["text"][start:stop]) == start
    assert sum(report["distributions"]["after"]["probability of the unwanted label"]) == len(kept)
    wrong = SMALL | {"classifier": section | {"label": "bad"}}
    with pytest.raises(ValueError, match=r"\[classifier\] label is 'bad', expected one of .*: good, toxic"):
        run([raw], tmp_path / "none", changes=wrong)
