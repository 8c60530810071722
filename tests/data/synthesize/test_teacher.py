"""What is read from the exported float model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import Vit
from data.synthesize.nets import SIZE, normed
from fewbit.data.synthesize.losses import distance
from fewbit.data.synthesize.teacher import Teacher
from fewbit.load import load_model


def images(seed: int = 0) -> torch.Tensor:
    return 0.5 + torch.randn(32, *SIZE, generator=torch.Generator().manual_seed(seed))


def test_a_batch_with_the_running_statistics_has_no_loss_and_another_one_has() -> None:
    net = normed(images())
    teacher = Teacher(load_model(net, overrides={"input_size": SIZE}).program)
    seen = teacher(images())
    assert len(teacher.running) == 3
    assert teacher.eps == (1e-5, 1e-5, 1e-5)
    torch.testing.assert_close(seen.logits, net(images()))
    # batch norms in eval mode standardise exactly, so each layer sees what it saw
    assert float(distance(seen.moments, teacher.running)) < 1e-9
    assert float(distance(teacher(images() * 2).moments, teacher.running)) > 0.01


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    program = load_model(normed(images()), overrides={"input_size": SIZE}).program
    torch.export.save(program, tmp_path / "net.pt2")
    again = Teacher(load_model(str(tmp_path / "net.pt2")).program)
    before = Teacher(program).running
    assert len(before) == 3
    for kind in ("means", "variances"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(again.running, kind), getattr(before, kind), strict=True))


def test_gradients_reach_the_images_and_not_the_model() -> None:
    net = normed(images())
    teacher = Teacher(load_model(net, overrides={"input_size": SIZE}).program)
    x = images(1).requires_grad_()
    distance(teacher(x).moments, teacher.running).backward()
    slope = x.grad.norm()
    with torch.no_grad():
        up, down = (float(distance(teacher(x + step * x.grad / slope).moments, teacher.running)) for step in (0.1, -0.1))
    assert float(slope) == pytest.approx((up - down) / 0.2, rel=1e-2)
    assert all(p.grad is None for p in net.parameters())


def test_attention_is_found_behind_a_fused_call_and_is_probabilities_times_values() -> None:
    torch.manual_seed(0)
    net = Vit().eval()
    kept: list[torch.Tensor] = []
    plain = torch.nn.functional.scaled_dot_product_attention
    teacher = Teacher(load_model(net, overrides={"input_size": SIZE}).program)
    assert teacher.has_attention
    assert len(teacher.running) == 0
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v: kept.append(plain(q, k, v)) or kept[-1]
    try:
        with torch.no_grad():
            net(images()[:4])
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
    with torch.no_grad():
        (found,) = teacher(images()[:4]).attention
    torch.testing.assert_close(found, kept[0])
