"""GGUF files as models and tokenizers, the layers that stay quantized, and the command that quantizes."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from test_export import TEXT, make, read

from gptcore import GPT, GPTForSequenceClassification, TextDataset, Tokenizer, Trainer, TrainingArguments, cli
from gptcore.hf.gguf import export_gguf
from gptcore.hf.pretrained import load_config
from gptcore.ops.quantized_linear import dequantize
from gptcore.quantized import CHUNK, QuantizedEmbedding, QuantizedLinear, kinds_of

KINDS = ["q8_0", "q4_0"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return Tokenizer.train(path, vocab_size=285)


@pytest.fixture(scope="module")
def files(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same tied model in every dtype."""
    folder = tmp_path_factory.mktemp("models")
    for dtype in ("f32", "f16", "bf16", *KINDS):
        export_gguf(make(), tokenizer, folder / f"{dtype}.gguf", dtype)
    return folder


# ---- our files


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", *KINDS])
def test_export_and_import_are_exact(tokenizer: Tokenizer, tmp_path: Path, dtype: str, tied: bool) -> None:
    original = make(tie_word_embeddings=tied, n_inner=96, bos_token_id=0, eos_token_id=tokenizer.eos_token_id)
    if dtype in ("f16", "bf16"):
        original.to(torch.float16 if dtype == "f16" else torch.bfloat16)
    export_gguf(original, tokenizer, tmp_path / "a.gguf", dtype)
    model, loaded = GPT.from_pretrained(tmp_path / "a.gguf"), Tokenizer.from_pretrained(tmp_path / "a.gguf")
    expected = dataclasses.replace(original.config, initializer_range=0.02)
    assert model.config == expected == load_config(tmp_path / "a.gguf")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.eos_token_id == tokenizer.eos_token_id
    assert loaded.encode(TEXT + "<|endoftext|>") == tokenizer.encode(TEXT + "<|endoftext|>")
    assert bool(kinds_of(model)) == (dtype in KINDS)
    if dtype not in KINDS:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    export_gguf(model, loaded, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_computes_what_its_numbers_say(files: Path, kind: str) -> None:
    model = GPT.from_pretrained(files / f"{kind}.gguf")
    plain = GPT.from_pretrained(files / f"{kind}.gguf", dtype=torch.float32)
    kinds = kinds_of(model)
    assert kinds["wte.weight"] == "q8_0"
    assert {found for name, found in kinds.items() if name != "wte.weight"} == {kind}
    assert isinstance(model.h[1].mlp.c_proj, QuantizedLinear)
    assert isinstance(model.wte, QuantizedEmbedding)
    for name, found in kinds.items():
        assert torch.equal(dequantize(model.state_dict()[name], found), plain.state_dict()[name])
    assert not kinds_of(plain)
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(non_embedding=True) == plain.num_parameters(non_embedding=True)
    assert model.estimate_flops(7) == plain.estimate_flops(7)
    ids = torch.randint(0, 285, (CHUNK // 20, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids, labels=ids), plain(ids, labels=ids)
    assert float((ours.logits - theirs.logits).norm() / theirs.logits.norm()) < 0.03
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=0.01, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=ids, return_logits=False).loss, ours.loss)
        assert torch.equal(model(ids[3:4]).logits[0], ours.logits[3])  # a row has the same bits alone
        half = model.bfloat16()(ids).logits
    assert half.dtype == torch.bfloat16
    assert float((half - ours.logits).norm() / ours.logits.norm()) < 0.05


def test_gradients_pass_through_quantized_layers(files: Path) -> None:
    """Those of the parameters of a quantized model, which are frozen until something else is asked for."""
    model = GPT.from_pretrained(files / "q8_0.gguf")
    plain = GPT.from_pretrained(files / "q8_0.gguf", dtype=torch.float32)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in plain.parameters())
    ids = torch.arange(48).view(2, 24)
    for part in (model, plain):
        part.wpe.weight.requires_grad_()  # type: ignore[union-attr]
        part(ids, labels=ids, return_logits=False).loss.backward()
    ours, theirs = (part.wpe.weight.grad for part in (model, plain))  # type: ignore[union-attr]
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05
    assert model.h[0].mlp.c_fc.bias.grad is None


@pytest.mark.parametrize("kind", ["bf16", *KINDS])
def test_a_head_starts_from_a_gguf_file(files: Path, kind: str) -> None:
    """Its body is that of the language model; of a quantized one, only the head is trained."""
    model = GPTForSequenceClassification.from_pretrained(files / f"{kind}.gguf", num_labels=3, pad_token_id=0)
    body = GPT.from_pretrained(files / f"{kind}.gguf")
    assert kinds_of(model.transformer) == {
        name: found for name, found in kinds_of(body).items() if "lm_head" not in name
    }
    for name, tensor in model.transformer.state_dict().items():
        assert torch.equal(tensor, body.state_dict()[name]), name
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == ({"score.weight"} if kind in KINDS else {name for name, _ in model.named_parameters()})
    ids = torch.arange(48).view(2, 24)
    loss = model(ids, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert model.score.weight.dtype == body.wpe.weight.dtype  # type: ignore[union-attr]
    assert model.score.weight.grad is not None
    assert model.score.weight.grad.any()


def test_the_padding_token_is_exported(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = Tokenizer.train(tmp_path / "text.txt", vocab_size=285, special_tokens=["<|endoftext|>", "<|pad|>"])
    tokenizer.pad_token = "<|pad|>"
    export_gguf(make(), tokenizer, tmp_path / "a.gguf")
    assert Tokenizer.from_pretrained(tmp_path / "a.gguf").pad_token == "<|pad|>"
    assert read(tmp_path / "a.gguf")[0]["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id


def test_generation_from_a_quantized_model(files: Path) -> None:
    model = GPT.from_pretrained(files / "q4_0.gguf")
    whole = model.generate([[1, 2, 3], [4]], 12)
    assert torch.equal(model.generate([[4]], 12), whole[1:, 2:])
    assert torch.equal(model.generate([[1, 2, 3]], 12, use_cache=False), whole[:1])
    assert [token.token for token in model.stream([[1, 2, 3]], 12)] == whole[0, 3:].tolist()


def test_what_a_quantized_model_cannot_do(files: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = GPT.from_pretrained(files / "q4_0.gguf")
    with pytest.raises(
        ValueError, match=r"the weights are in q4_0, q8_0, which only a GGUF file holds: use export_gguf"
    ):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="the model is q4_0 already; make q8_0 from the model that it was made from"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []
    export_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")  # decoded
    decoded = GPT.from_pretrained(files / "q4_0.gguf", dtype=torch.float32)
    assert all(map(torch.equal, GPT.from_pretrained(tmp_path / "m.gguf").parameters(), decoded.parameters()))


# ---- files as llama.cpp's convert_hf_to_gguf.py writes them


def convert(theirs: Any, tokenizer: Tokenizer, path: Path, *, copy_output: bool = False, alignment: int = 32) -> None:
    """Write a GPT2LMHeadModel in float16, as the script does: its metadata, names, transposes and types."""
    config, state = theirs.config, theirs.state_dict()
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_custom_alignment(alignment)
    writer.add_type("model")
    writer.add_name("cats")
    writer.add_tags(["text-generation", "cats"])
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    vocab = tokenizer._tokenizer.get_vocab()
    words = sorted(vocab, key=vocab.__getitem__)
    extra = config.vocab_size - len(words)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*words, *(f"[PAD{len(words) + i}]" for i in range(extra))])
    writer.add_token_types([*(3 if word == "<|endoftext|>" else 1 for word in words), *([5] * extra)])
    merges = [pair.split() for pair in read_merges(tokenizer)]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for name, tensor in state.items():
        if name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
            continue
        values = tensor.float()
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            values = values.t()
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new_name is not None, name
        narrow = values.ndim == 2 and new_name != "position_embd.weight"
        array = values.contiguous().numpy().astype(np.float16 if narrow else np.float32)
        writer.add_tensor(new_name, array)
        if copy_output and new_name == "token_embd.weight":  # as before March 2025
            writer.add_tensor("output.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_merges(tokenizer: Tokenizer) -> Iterator[str]:
    for pair in json.loads(tokenizer._tokenizer.to_str())["model"]["merges"]:
        yield pair if isinstance(pair, str) else " ".join(pair)


@pytest.mark.parametrize("copy_output", [False, True])
def test_a_converted_file(tokenizer: Tokenizer, tmp_path: Path, copy_output: bool) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=24, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    convert(theirs, tokenizer, tmp_path / "m.gguf", copy_output=copy_output, alignment=64 if copy_output else 32)
    model, loaded = GPT.from_pretrained(tmp_path / "m.gguf"), Tokenizer.from_pretrained(tmp_path / "m.gguf")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.config.tie_word_embeddings
    assert loaded.fingerprint == tokenizer.fingerprint
    ids = torch.tensor([loaded.encode("the cat sat")])
    model = GPT.from_pretrained(tmp_path / "m.gguf", dtype=torch.float32)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-2, atol=1e-2)
    assert torch.equal(model.wpe.weight, theirs.transformer.wpe.weight)  # type: ignore[union-attr]


# ---- files that are not right


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def value(name: str, kind: int, content: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + content


ARCHITECTURE = value("general.architecture", 8, text("gpt2"))


def tensor(name: str = "a", shape: tuple[int, ...] = (2, 4), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def made(*tensors: bytes, values: tuple[bytes, ...] = (ARCHITECTURE,), data: int = 96, start: str = "GGUF") -> bytes:
    header = start.encode() + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join((*values, *tensors))
    return header + b"\0" * (-len(header) % 32) + b"\0" * data


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"it has 0 bytes, but should have 24 from byte 0"),
    "magic": (made(start="GGML"), "it begins with b'GGML', expected b'GGUF'"),
    "version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "its version is 1, expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "its version is 50,331,648, expected 2 or 3, little-endian"),
    "tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0), "it should have 4,611,686,018,427,387,904 tensors"),
    "values": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62), "it should have 4,611,686,018,427,387,904 values"),
    "name": (made(struct.pack("<Q", 2**40)), "it has .* bytes, but should have 1,099,511,627,776 from byte"),
    "terminal": (made(tensor("\x1b[31m")), r"a tensor in it has the name .*x1b\[31m', which cannot be printed"),
    "utf-8": (made(tensor(b"\xff")), "invalid start byte"),  # type: ignore[arg-type]
    "value twice": (made(values=(ARCHITECTURE, ARCHITECTURE)), "its value general.architecture is there twice"),
    "type": (made(values=(value("x", 77, b""),)), "it has a value of type 77, expected one of 0, 1, 2"),
    "nested": (made(values=(value("x", 9, struct.pack("<IQ", 9, 1)),)), "it has a value of type 9, expected"),
    "strings": (made(values=(value("x", 9, struct.pack("<IQ", 8, 2**60)),)), "its value x should have .* strings"),
    "numbers": (made(values=(value("x", 9, struct.pack("<IQ", 4, 2**63)),)), "should have 36,893,488,147,419,103,232"),
    "alignment": (
        made(tensor(), values=(value("general.alignment", 4, struct.pack("<I", 24)),)),
        "its general.alignment is 24, expected a power of 2",
    ),
    "no number": (
        made(tensor(), values=(value("general.alignment", 8, text("32")),)),
        "its general.alignment is '32', expected a power of 2",
    ),
    "dimensions": (made(tensor(shape=())), "its tensor a has 0 dimensions, expected 1 to 4"),
    "length": (made(tensor(shape=(0, 2))), r"its tensor a has shape \(2, 0\), expected lengths from 1 on"),
    "overflow": (made(tensor(shape=(2**32, 2**32))), "its tensor a ends at byte .* it may be cut off"),
    "offset": (made(tensor(offset=2**63)), "its tensor a ends at byte .* it may be cut off"),
    "misaligned": (made(tensor(offset=4)), "its tensor a begins at byte 132, expected a multiple of 32 from 128 on"),
    "overlap": (made(tensor(), tensor("b")), "its tensor b begins at byte 160, expected a multiple of 32 from 192 on"),
    "tensor twice": (made(tensor(), tensor(offset=32)), "its tensor a is there twice"),
    "cut off": (made(tensor(), data=31), "its tensor a ends at byte 160 of 159; it may be cut off"),
    "q4_K": (made(tensor(kind=12)), "its tensor a is of type q4_K, expected f32, f16, bf16, q8_0 or q4_0; `gptcore"),
    "width": (made(tensor(shape=(33, 2), kind=8)), r"its tensor a is q8_0 of shape \(2, 33\), expected rows of a mult"),
    "vector": (made(tensor(shape=(32,), kind=8)), r"its tensor a is q8_0 of shape \(32,\)"),
    "another model": (
        made(tensor(), values=(value("general.architecture", 8, text("llama")),)),
        "its general.architecture is 'llama', expected 'gpt2'",
    ),
    "no embedding": (made(tensor()), "it has no token_embd.weight"),
    "no metadata": (made(tensor("token_embd.weight")), "has no 'gpt2.attention.layer_norm_epsilon'"),
    "embedding": (made(tensor("token_embd.weight", (8,))), r"its token_embd.weight has shape \(8,\), expected a"),
    "weight twice": (
        made(tensor("token_embd.weight"), tensor("blk.0.ffn_up.bias", (8,), offset=32),
             tensor("blk.00.ffn_up.bias", (8,), offset=64)),
        "two of its tensors are the same weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    content, message = DAMAGED[name]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        GPT.from_pretrained(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in str(caught.value)
    assert str(caught.value).isprintable()


def test_weights_that_do_not_fit_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"

    def refused(match: str, kind: str, change: Callable[[bytes], bytes]) -> None:
        export_gguf(make(n_layer=1), tokenizer, file, kind)
        changed = change(file.read_bytes())
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=match):
            GPT.from_pretrained(file)

    def layers(content: bytes) -> bytes:
        key = text("gpt2.block_count") + struct.pack("<I", 4)
        assert content.count(key) == 1
        return content.replace(key + struct.pack("<I", 1), key + struct.pack("<I", 500))

    def name(content: bytes) -> bytes:
        return content.replace(b"blk.0.ffn_up.weight", b"blk.9.ffn_up.weight")

    def scale(content: bytes) -> bytes:  # of the last block of the last matrix, before two vectors of 64 numbers
        end = len(content) - 2 * 256 - 256  # ffn_down.bias, output_norm.weight and output_norm.bias
        return content[: end - 34] + b"\0\x7c" + content[end - 32 :]

    refused("n_layer 500, but the weights in it are 16 tensors", "f32", layers)
    refused("missing weights: h.0.mlp.c_fc.weight", "q8_0", name)
    refused("h.0.mlp.c_proj.weight has blocks with a scale that is not finite", "q8_0", scale)
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        GPT.from_pretrained(tmp_path / "none.gguf")
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        Tokenizer.from_pretrained(str(tmp_path / "none.gguf"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (text("gpt-2"), text("llama"), "its tokenizer.ggml.pre is 'llama', expected 'gpt-2'"),
        (b"tokenizer.ggml.pre", b"tokenizer.ggml.prf", "its tokenizer.ggml.pre is None, expected 'gpt-2'"),
        (text("gpt2"), text("bert"), "its tokenizer.ggml.model is 'bert', expected 'gpt2'"),
        (b"ggml.token_type", b"ggml.token_typo", "has no 'token_type'"),
        (text("[PAD319]"), text("[PAD318]"), "its 320 tokens are 319 different ones, and have 320 types"),
        (text("a t"), text("a-t"), "merge .: a merge is two tokens with a space between them, not 'a-t'"),
        (b"add_bos_token" + struct.pack("<I?", 7, 0), b"add_bos_token" + struct.pack("<I?", 7, 1), "add_bos_token is"),
        (b"eos_token_id" + struct.pack("<II", 4, 0), b"eos_token_id" + struct.pack("<II", 4, 319), "_id is 319"),
        (text("h e"), text("h h"), "no merge makes|out of vocabulary"),
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_is_refused(files: Path, tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    content = (files / "f32.gguf").read_bytes()
    assert old in content
    (tmp_path / "m.gguf").write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in str(caught.value)


# ---- the commands


@pytest.mark.parametrize("kind", KINDS)
def test_the_quantize_command(
    tokenizer: Tokenizer, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model, folder, out = make(), str(tmp_path / "model"), tmp_path / "q.gguf"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert cli.main(["quantize", folder, "-o", str(out), "--type", kind]) == 0
    assert capsys.readouterr().out.split() == [str(out), f"{out.stat().st_size:,}", "bytes"]
    for tensor in gguf.GGUFReader(out).tensors:  # the bytes of gguf's own quantizer
        values = read(files / "f32.gguf")[1][tensor.name]
        if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            assert np.array_equal(tensor.data, gguf.quants.quantize(values, tensor.tensor_type)), tensor.name
    whole = out.read_bytes()
    for source, message in (
        (folder, f"{out} exists; replace it with --overwrite"),
        (str(tmp_path / "none"), "exists; replace it with --overwrite"),
    ):
        assert cli.main(["quantize", source, "-o", str(out), "--type", kind]) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["quantize", str(files / "q8_0.gguf"), "-o", str(out), "--overwrite"]) == 1
    assert "is in q8_0 already; quantize the model that it was made from" in capsys.readouterr().err
    assert out.read_bytes() == whole
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "model.gguf").write_bytes((files / "f32.gguf").read_bytes())
    source, same = str(tmp_path / "again" / "model.gguf"), str(tmp_path / "again" / "q.gguf")
    assert cli.main(["quantize", source, "-o", same, "--type", kind]) == 0
    assert Path(same).read_bytes() == whole


def test_commands_take_a_gguf_file(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    model, words, cache = str(files / "q4_0.gguf"), str(tmp_path / "text.txt"), ["--cache-dir", str(tmp_path / "c")]
    assert cli.main(["generate", model, "--prompt", "the cat", "--max-new-tokens", "4", "--greedy"]) == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert cli.main(["evaluate", model, words, *cache]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert cli.main(["train", words, "--init-from", model, "--output-dir", str(tmp_path / "out"), *cache]) == 1
    assert "is in q4_0, q8_0, and quantized weights are not trained; decode them first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main(["export", model, "--to", "hf", "-o", str(tmp_path / "hf")]) == 1
    assert "which only a GGUF file holds" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert cli.main(["export", model, "--to", "hf", "--dtype", "f32", "-o", str(tmp_path / "hf")]) == 0
    decoded = GPT.from_pretrained(files / "q4_0.gguf", dtype=torch.float32)
    assert all(map(torch.equal, GPT.from_pretrained(tmp_path / "hf").parameters(), decoded.parameters()))
    capsys.readouterr()
    assert cli.main(["info"]) == 0
    assert "quantized layers  q8_0 and q4_0 on the CPU in gptcore's kernel" in capsys.readouterr().out


def test_perplexity_of_a_trained_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """8 bits change it by less than a percent, and 4 bits by less than 15, which an untrained model would not show."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    dataset = TextDataset(tokenizer, tmp_path / "text.txt", 24, cache_dir=tmp_path)
    model = make(initializer_range=0.02)
    arguments: Any = {"max_steps": 60, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "disable_tqdm": True}
    Trainer(model, TrainingArguments(str(tmp_path / "out"), save_steps=0, **arguments), dataset).train()
    found = {}
    for dtype in ("f32", *KINDS):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype)
        loaded = GPT.from_pretrained(tmp_path / "m.gguf")
        found[dtype] = Trainer(loaded, TrainingArguments(str(tmp_path), disable_tqdm=True), None, dataset).evaluate()
    perplexity = {dtype: metrics["perplexity"] for dtype, metrics in found.items()}
    assert perplexity["f32"] < 100, perplexity
    assert abs(perplexity["q8_0"] / perplexity["f32"] - 1) < 0.01, perplexity
    assert abs(perplexity["q4_0"] / perplexity["f32"] - 1) < 0.15, perplexity
