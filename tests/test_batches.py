"""Batches of texts of different lengths: packed, grouped, counted; and steps that recompute or are compiled."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import collate, losses, rows, same, tiny_model, tiny_trainer, weights
from torch import nn

from gptcore.training.batches import pack
from gptcore.training.trainer import Trainer


def test_packing_leaves_padding_out_and_keeps_the_loss(tmp_path: Path) -> None:
    model = tiny_model(dropout=0.0)
    batch = collate(rows(6))
    packed = pack(batch)
    assert packed["input_ids"].shape == (1, int(batch["attention_mask"].sum()))
    assert model.count_targets(packed) == model.count_targets(batch)
    torch.testing.assert_close(model(**packed).loss, model(**batch).loss)
    plain, dense = (
        tiny_trainer(tmp_path / str(packing), model=tiny_model(dropout=0.0), packing=packing)
        for packing in (False, True)
    )
    plain.train()
    dense.train()
    padded, full = losses(tmp_path / "False"), losses(tmp_path / "True")
    assert [entry["loss"] for entry in full] == pytest.approx([entry["loss"] for entry in padded], rel=1e-4)
    assert all(0 < entry["padding"] < 0.7 for entry in padded)
    assert not any("padding" in entry for entry in full)
    with pytest.raises(ValueError, match="packing=True packs input_ids and labels, but a batch has scores as well"):
        pack({**batch, "scores": torch.ones(6)})


def padding_of(trainer: Trainer) -> float:
    masks = [batch["attention_mask"] for step in range(trainer.steps_per_epoch) for batch in trainer.batches.of(step)]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def test_groups_of_similar_length_have_less_padding_and_each_example_once(tmp_path: Path) -> None:
    data = rows(50)
    plain, grouped = (tiny_trainer(tmp_path, data=data, group_by_length=grouped) for grouped in (False, True))
    assert padding_of(grouped) < 0.3 * padding_of(plain)
    for epoch in range(2):
        steps = [grouped.batches.indices(13 * epoch + step) for step in range(13)]
        assert sorted(i for step in steps for batch in step for i in batch) == list(range(50))
        assert len(steps[-1][-1]) == 2
    assert grouped.batches.indices(0) != grouped.batches.indices(13)
    with pytest.raises(TypeError, match="group_by_length=True needs examples with a length"):
        tiny_trainer(tmp_path, data=[1, 2, 3], group_by_length=True).batches.indices(0)


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"fp16": True}])
def test_recomputed_blocks_give_the_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain, recomputed = (tiny_trainer(tmp_path / str(on), gradient_checkpointing=on, **changes) for on in (False, True))
    calls = []
    recomputed.model.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain.train()
    recomputed.train()
    assert same(weights(plain.model), weights(recomputed.model))
    assert losses(tmp_path / "False") == losses(tmp_path / "True")
    assert len(calls) == 2 * 6
    assert "forward" not in vars(recomputed.model.h[0])


def test_recomputing_needs_blocks(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "out", model=nn.Linear(2, 2), gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"recomputes the blocks model.h, but Linear has none"):
        trainer.train()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_compiled_runs_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    settings: Any = {"torch_compile": True, "data": [torch.arange(i, i + 8) for i in range(20)]}
    whole = tiny_trainer(tmp_path / "whole", max_steps=4, **settings)
    assert whole.model is not whole.own_model
    whole.train()
    tiny_trainer(tmp_path / "parts", max_steps=4, max_time=1e-6, **settings).train()
    resumed = tiny_trainer(tmp_path / "parts", max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.own_model), weights(whole.own_model))
    plain = tiny_trainer(tmp_path / "plain", max_steps=4, data=settings["data"])
    plain.train()
    assert [e["loss"] for e in losses(tmp_path / "whole")] == pytest.approx(
        [e["loss"] for e in losses(tmp_path / "plain")], rel=1e-2
    )
