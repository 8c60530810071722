"""The rows of `make breadth`, their weights and images."""

from __future__ import annotations

import torch
from bench.breadth import line, pictures, settle
from bench.families import rows
from torch import nn


def test_rows_are_many_and_different() -> None:
    keys = [row.key for row in rows()]
    assert len(set(keys)) == len(keys) >= 200
    assert len({row.library for row in list(rows())[:3]}) == 3


def test_pictures_are_seeded_and_differ_from_each_other() -> None:
    images = pictures(16)
    assert (images == pictures(16)).all()
    assert len({image.tobytes() for image in images}) == len(images) == 16


def test_settled_norms_have_the_statistics_of_the_images() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)).eval()
    x = 3 * torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
    settle(net, x)
    norm = net[0]
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, x.var((0, 2, 3)))
    assert not norm.training
    assert len(set(norm.weight.tolist())) == 3  # they were all 1
    assert len(set(norm.bias.tolist())) == 3


def test_a_row_that_came_to_no_verdict_shows_its_last_line() -> None:
    about = {
        "library": "timm",
        "name": "a",
        "size": 64,
        "end": "crashed",
        "stage": "load",
        "message": "Traceback\n  x\nError: b|c",
    }
    assert line(about) == "| timm a | 64 | crashed | load | Error: b/c |||||"
