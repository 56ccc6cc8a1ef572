"""/v1/classify, /v1/entities and /v1/answer: what the pipelines say, also for several requests at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from served import HEADS, Answer, save_head, serving, serving_folder, tiny_gpt, tiny_tokenizer

from gptcore.heads import GPTForMultipleChoice
from gptcore.lora import add_adapter, save_adapter
from gptcore.serving.limits import MAX_TEXTS, Limits
from gptcore.serving.load import load
from gptcore.tasks.pipelines import pipeline
from gptcore.text.chat import with_special_tokens

TEXTS = ["the quick brown fox", "the lazy dog jumps over the fox", "héllo € wörld"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    made = {}
    for name in HEADS:
        made[name] = tmp_path_factory.mktemp("models") / name
        save_head(name, tokenizer, made[name])
    return made


def test_classify(folders):
    expected = pipeline("text-classification", folders["text-classification"], top_k=None)(TEXTS)
    with serving_folder(folders["text-classification"]) as server:
        answer = server.request("POST", "/v1/classify", {"model": "model", "input": TEXTS})
        assert answer.json["data"] == [{"index": i, "labels": row} for i, row in enumerate(expected)]
        one = server.request("POST", "/v1/classify", {"model": "model", "input": TEXTS[1], "top_k": 2})
        assert one.json["data"] == [{"index": 0, "labels": expected[1][:2]}]
        (card,) = server.request("GET", "/v1/models").json["data"]
        assert card["routes"] == ["/v1/classify"]
        for path in ("/v1/completions", "/v1/embeddings", "/v1/entities"):
            assert server.request("POST", path, {"model": "model", "prompt": "a"}).status == 404
        assert server.request("POST", "/v1/classify", {"model": "other", "input": "a"}).status == 404
        many = server.request("POST", "/v1/classify", {"model": "model", "input": ["a"] * (MAX_TEXTS + 1)})
        assert (many.status, many.error["param"]) == (400, "input")


def test_entities(folders):
    expected = pipeline("token-classification", folders["token-classification"], aggregation_strategy="simple")(TEXTS)
    assert any(expected)
    with serving_folder(folders["token-classification"]) as server:
        data = server.request("POST", "/v1/entities", {"model": "model", "input": TEXTS}).json["data"]
    for i, row in enumerate(expected):
        names = ("entity_group", "score", "word", "start", "end")
        assert data[i] == {"index": i, "entities": [{name: entity[name] for name in names} for entity in row]}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("top_k", [1, 3])
def test_answer(folders, count, top_k):
    questions = [{"question": "what jumps?", "context": text} for text in TEXTS[:count]]
    asked = pipeline("question-answering", folders["question-answering"])
    rows = [asked(question, top_k=top_k) for question in questions]
    with serving_folder(folders["question-answering"]) as server:
        body = {"model": "model", "input": questions if count > 1 else questions[0], "top_k": top_k}
        data = server.request("POST", "/v1/answer", body).json["data"]
        blank = server.request("POST", "/v1/answer", {"model": "model", "input": {"question": "a", "context": " "}})
    names = ("answer", "score", "start", "end")
    for i, row in enumerate(rows):
        expected = [{name: answer[name] for name in names} for answer in ([row] if top_k == 1 else row)]
        assert data[i] == {"index": i, "answers": expected}
    assert (blank.status, blank.error["param"]) == (400, "input")


def test_requests_that_wait_are_one_batch(folders):
    """And one that fails is its own: the others get what they get alone."""
    served, _ = load(folders["text-classification"], "model", Limits())
    batches, real = [], pipeline("text-classification", served.engine.model, served.tokenizer)

    def counting(texts, top_k):
        batches.append(len(texts))
        if any("fail" in text for text in texts):
            raise ValueError("this text fails")
        return real(texts, top_k=top_k)

    from gptcore.serving import tasks

    expected = [real([text], top_k=None)[0] for text in TEXTS]
    with serving(served, [tasks.routes(served, "classify", counting)], served.engine.model) as server:

        def ask(text: str) -> Answer:
            return server.request("POST", "/v1/classify", {"model": "model", "input": text})

        busy = threading.Event()
        served.engine.call(lambda: busy.wait(10))
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, text) for text in (*TEXTS, "fail")]
            while len(served.engine._calls) < 4:
                pass
            busy.set()
            answers = [future.result() for future in asked]
    assert [answer.json["data"][0]["labels"] for answer in answers[:3]] == expected
    assert answers[3].status == 400
    assert batches == [4, 1, 1, 1, 1]  # together, and then each alone


def test_adapters_are_models_by_their_name(tokenizer, tmp_path):
    base = tiny_gpt(tokenizer)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    add_adapter(base, "poems", r=2)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora" in name.lower():
                parameter.normal_()
    save_adapter(base, tmp_path / "poems")
    with pytest.raises(ValueError, match="--adapter base has the name of the model"):
        load(tmp_path / "base", "base", Limits(), adapters={"base": tmp_path / "poems"})
    served, routers = load(tmp_path / "base", "base", Limits(), adapters={"poems": tmp_path / "poems"})
    with serving(served, routers, served.engine.model) as server:

        def said(model: str) -> Answer:
            body = {"model": model, "prompt": "the", "max_tokens": 12, "temperature": 0}
            return server.request("POST", "/v1/completions", body)

        with ThreadPoolExecutor(4) as pool:
            texts = [answer.json["choices"][0]["text"] for answer in pool.map(said, ["base", "poems"] * 2)]
        assert texts[:2] == texts[2:] == [said(model).json["choices"][0]["text"] for model in ("base", "poems")]
        assert texts[0] != texts[1]
        assert said("other").error["code"] == "model_not_found"
        cards = server.request("GET", "/v1/models").json["data"]
        assert [(card["id"], card["root"]) for card in cards] == [("base", "base"), ("poems", "base")]
        rows = [
            server.request("POST", "/v1/embeddings", {"model": name, "input": "the"}).json["data"][0]["embedding"]
            for name in ("base", "poems", "base")
        ]
        assert rows[0] == rows[2] != rows[1]


def test_an_adapter_with_another_tokenizer_is_refused(tokenizer, tmp_path):
    model = tiny_gpt(tokenizer)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    add_adapter(model, r=2)
    save_adapter(model, tmp_path / "same")
    tokenizer.save_pretrained(tmp_path / "same")
    save_adapter(model, tmp_path / "other")
    with_special_tokens(tokenizer, ["<|more|>"]).save_pretrained(tmp_path / "other")
    served, _ = load(tmp_path / "base", "base", Limits(), adapters={"poems": tmp_path / "same"})
    served.close()
    with pytest.raises(ValueError, match=r"other has another tokenizer than .*base, so they cannot be served together"):
        load(tmp_path / "base", "base", Limits(), adapters={"poems": tmp_path / "other"})


def test_a_model_without_a_route_is_refused(tokenizer, tmp_path):
    GPTForMultipleChoice(tiny_gpt(tokenizer).config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a model for the task choice, which has no route here"):
        load(tmp_path, "model", Limits())
