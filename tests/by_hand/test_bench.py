"""The contest of tests/bench/train_step.py is fair: both sides train on the same tokens and have the same loss."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from train_step import Side, in_turn, parse, prepare


def test_both_sides_train_on_the_same_tokens_with_the_same_loss(tiny_base: str, tmp_path: Path) -> None:
    args = parse(f"--model {tiny_base} --batch-size 6 --chunk-size 2 --max-tokens 32 --threads 1".split())
    ours, theirs = in_turn(prepare(args, str(tmp_path)), [Side("ours", 2), Side("theirs", 4, theirs=True)], rounds=2, warm_up=0)
    assert len(ours) == len(theirs) == 2
    for own, their in zip(ours, theirs):  # after the first update too: the same gradient went through the same optimizer
        assert own.encode_tokens == their.encode_tokens > 0
        assert their.loss == pytest.approx(own.loss, rel=1e-4)
    assert ours[0].loss != pytest.approx(ours[1].loss, rel=1e-2)  # the control: another batch, another loss
