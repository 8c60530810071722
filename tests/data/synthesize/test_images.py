"""Images from batch norms and from attention: deterministic, closer to what they are held to, refused where they cannot be."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import ConvNet, Vit
from data.synthesize.nets import SIZE, normed
from fewbit.data.images import Preprocess, open_images
from fewbit.data.synthesize.fdda import Centres, Fdda, centres_of
from fewbit.data.synthesize.generator import ClassNorm, generator_of
from fewbit.data.synthesize.inversion import COLOUR, GREY, photographic, spread
from fewbit.data.synthesize.losses import apart, distance, patch_entropy, roughness
from fewbit.data.synthesize.norms import NormInversion
from fewbit.data.synthesize.patches import PatchDiversity
from fewbit.data.synthesize.source import Synthesis, asked_for, in_steps, method_for
from fewbit.data.synthesize.teacher import Moments, Teacher
from fewbit.errors import BadFile, BadImages, BadModel
from fewbit.load import load_model

TINY = Fdda(epochs=4, iterations=3, warm_up=2, trusting=1, batch=4, latent=8, channels=8, drops=(3,))
LOW, HIGH = torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return 0.5 + torch.randn(32, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def teacher(pictures: torch.Tensor) -> Teacher:
    return Teacher(load_model(normed(pictures), overrides={"input_size": SIZE}).program)


@pytest.fixture(scope="module")
def seer() -> Teacher:
    torch.manual_seed(0)
    return Teacher(load_model(Vit().eval(), overrides={"input_size": SIZE}).program)


def test_the_centre_of_one_image_is_what_the_model_sees_in_it_and_of_two_their_mean(
    teacher: Teacher, pictures: torch.Tensor
) -> None:
    found = centres_of(teacher, iter(pictures[:3].split(1)), torch.tensor([2, 0, 2]), 4)
    alone = [teacher(pictures[i : i + 1]).moments for i in range(3)]
    for layer in range(3):
        torch.testing.assert_close(found.moments.means[layer][0], alone[1].means[layer])
        both = (alone[0].variances[layer] + alone[2].variances[layer]) / 2
        torch.testing.assert_close(found.moments.variances[layer][2], both)
    assert found.known.tolist() == [True, False, True, False]


def test_classes_are_those_with_images_and_later_those_that_the_model_gets_right(
    teacher: Teacher, pictures: torch.Tensor
) -> None:
    answers = teacher(pictures).logits.argmax(1)
    i, j = 0, int((answers != answers[0]).nonzero()[0])
    right, wrong = int(answers[i]), int(answers[i])  # image j is given the class of image i, which it has not
    others = [c for c in range(4) if c != right]
    labels = torch.tensor([right, others[0]])
    found = centres_of(teacher, iter([pictures[i : i + 1], pictures[i : i + 1]]), labels, 4)
    assert found.classes(trusted=False) == sorted([right, others[0]])
    assert found.classes(trusted=True) == [right]
    mixed = centres_of(teacher, iter([pictures[i : i + 1], pictures[j : j + 1]]), torch.tensor([right, wrong]), 4)
    assert not mixed.right.any()
    assert mixed.classes(trusted=True) == [right]  # none is right: all that are known
    own = centres_of(teacher, iter(pictures[[i, j]].split(1)), None, 4)
    assert torch.equal(own.known, own.right)
    assert sorted(own.classes(trusted=True)) == sorted({int(answers[i]), int(answers[j])})


def test_labels_that_are_no_classes_are_refused(teacher: Teacher, pictures: torch.Tensor) -> None:
    with pytest.raises(BadImages, match="labels go from 0 to 7; the model has 4 classes"):
        centres_of(teacher, iter(pictures[:2].split(1)), torch.tensor([0, 7]), 4)
    with pytest.raises(BadImages, match="no calibration images"):
        centres_of(teacher, iter(()), None, 4)


def test_the_class_enters_the_generator_and_its_size_follows_the_images() -> None:
    for size in ((3, 8, 8), (3, 10, 14), (3, 32, 32)):
        generator = generator_of(size, 4, 8, 8, 0)
        made = generator(torch.randn(6, 8), torch.zeros(6, dtype=torch.long))
        assert made.shape == (6, *size)
        torch.testing.assert_close(made.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(made.var((0, 2, 3), unbiased=False), torch.ones(3), atol=0.05, rtol=0)
    plain, x = ClassNorm(5, 3), torch.randn(4, 5, 6, 6)
    torch.testing.assert_close(plain(x, torch.tensor([0, 1, 2, 0])), torch.nn.BatchNorm2d(5)(x))
    plain.scale.weight.data[1] = 2.0
    plain.shift.weight.data[1] = 1.0
    torch.testing.assert_close(plain(x, torch.ones(4, dtype=torch.long)), 2 * torch.nn.BatchNorm2d(5)(x) + 1)


def test_a_seed_gives_the_same_images_and_leaves_the_random_state_of_torch_alone(teacher: Teacher) -> None:
    state = torch.random.get_rng_state()
    first, labels = TINY(teacher, SIZE, 4, 7, seed=1)
    again, _ = TINY(teacher, SIZE, 4, 7, seed=1)
    other, _ = TINY(teacher, SIZE, 4, 7, seed=2)
    assert first.shape == (7, *SIZE)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 3] or sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2, 3]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


def no_damage_is_gone_on_from(state: Path, go_on: Callable[[Path], object]) -> None:
    """One error that names the file, whatever has happened to it."""
    good = state.read_bytes()
    with zipfile.ZipFile(state) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    place = good.index(largest.filename.encode()) + 200 + largest.file_size // 2  # behind its header: among its numbers
    other, wrong = io.BytesIO(), io.BytesIO()
    torch.save({}, other)
    torch.save([torch.zeros(1, 3, 2, 2)], wrong)
    for damaged in (
        b"", b"no archive", good[: len(good) // 2], good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :],
        other.getvalue(), wrong.getvalue(),
    ):  # fmt: skip
        state.write_bytes(damaged)
        with pytest.raises(BadFile, match=rf"{state} is damaged .*starts anew"):
            go_on(state)


def test_a_killed_generator_goes_on_where_it_was(teacher: Teacher, pictures: torch.Tensor, tmp_path: Path) -> None:
    centres = centres_of(teacher, iter(pictures[:4].split(1)), None, 4)
    whole, _ = TINY(teacher, SIZE, 4, 8, centres)
    epochs = 0

    def stop(text: str) -> None:
        nonlocal epochs
        epochs += 1
        if epochs == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TINY(teacher, SIZE, 4, 8, centres, kept=tmp_path / "state.pt", progress=stop)
    said: list[str] = []
    found, _ = TINY(teacher, SIZE, 4, 8, centres, kept=tmp_path / "state.pt", progress=said.append)
    assert len(said) == 1
    assert torch.equal(found, whole)
    no_damage_is_gone_on_from(tmp_path / "state.pt", lambda kept: TINY(teacher, SIZE, 4, 8, centres, kept=kept))


def test_training_brings_the_statistics_of_a_class_to_its_centre(teacher: Teacher, pictures: torch.Tensor) -> None:
    """Held to the centre of one class alone, images come closer to it."""
    known = torch.tensor([False, True, False, False])
    one = centres_of(teacher, iter(pictures[:1].split(1)), torch.tensor([1]), 4)
    centres = Centres(one.moments, known, known)
    settings = Fdda(
        epochs=2, iterations=40, warm_up=1, batch=8, latent=8, channels=8, ce=0, bns=0, distorted=0, centralized=1, rate=0.02
    )
    made = {n: settings.shorter(2, n)(teacher, SIZE, 4, 8, centres)[0] for n in (1, 40)}
    apart = {n: float(distance(teacher(x).moments.from_layer(0), centres.moments.of(1))) for n, x in made.items()}
    assert apart[40] < 0.7 * apart[1]


def test_the_loss_is_the_papers_sum(teacher: Teacher, pictures: torch.Tensor) -> None:
    seen = teacher(pictures[:4])
    labels = torch.tensor([0, 1, 2, 3])
    ce = float(torch.nn.functional.cross_entropy(seen.logits, labels))
    bns = float(distance(seen.moments, teacher.running))
    assert float(Fdda().loss(seen, labels, teacher.running)) == pytest.approx(ce + 0.2 * bns, rel=1e-5)
    centre = Moments(tuple(m + 1 for m in seen.moments.means), seen.moments.variances)
    quiet = Fdda(mean_noise=0, variance_noise=0)
    alike = float(torch.nn.functional.cross_entropy(seen.logits, torch.full((4,), 2)))
    found = float(quiet.loss_of_class(seen, 2, centre, torch.Generator()))
    assert found == pytest.approx(0.5 * alike + 0.9 * 1 + 0.01 * 1, rel=1e-5)  # every mean is 1 off


def test_a_shorter_schedule_keeps_its_shares() -> None:
    short = Fdda().shorter(40, 100)
    assert (short.warm_up, short.trusting, short.drops) == (5, 0, (10, 20, 30))
    assert in_steps(short, 20).epochs * in_steps(short, 20).iterations == 20
    with pytest.raises(ValueError, match="epochs > warm_up"):
        Fdda(epochs=50)


def test_patches_become_more_diverse_and_the_same_for_the_same_seed(seer: Teacher) -> None:
    settings = PatchDiversity(iterations=15, rounds=1, warm_up=1, batch=4, ce=0.1, variation=1.0, rate=0.05)
    found, labels = settings(seer, SIZE, 4, 6, LOW, HIGH)
    again, _ = settings(seer, SIZE, 4, 6, LOW, HIGH)
    assert torch.equal(found, again)
    assert labels.tolist() == [0, 2, 1, 3, 0, 2]
    assert bool(((found >= LOW) & (found <= HIGH)).all())
    start = photographic(4, SIZE, LOW, HIGH, torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (float(patch_entropy(seer(x).attention[0], 201, 0.05)) for x in (start, found[:4]))
    assert after > before


def test_images_of_a_batch_do_not_depend_on_how_many_follow(seer: Teacher) -> None:
    settings = PatchDiversity(iterations=2, rounds=1, warm_up=1, batch=4)
    long, _ = settings(seer, SIZE, 4, 8, LOW, HIGH)
    short, _ = settings(seer, SIZE, 4, 4, LOW, HIGH)
    assert torch.equal(long[:4], short)


@pytest.mark.parametrize("classes", [1, 2, 4, 7, 10, 200, 1000])
def test_every_class_has_an_image_before_any_has_two_and_the_first_are_far_apart(classes: int) -> None:
    labels = spread(2 * classes, classes)
    assert sorted(labels[:classes].tolist()) == list(range(classes))
    assert torch.equal(labels[classes:], labels[:classes])
    assert torch.equal(spread(classes, classes), labels[:classes])  # and do not depend on how many follow
    if classes >= 200:
        few = torch.tensor(sorted(labels[:32].tolist()))
        assert int(few.diff().max()) <= 2 * int(few.diff().min())
        assert int(few.max() - few.min()) > 0.9 * classes


def test_photographic_noise_has_the_spectrum_and_the_spread_that_it_says() -> None:
    low, high = torch.tensor([-2.0, -1.0, 0.0]).view(3, 1, 1), torch.tensor([2.0, 3.0, 1.0]).view(3, 1, 1)
    found = photographic(64, (3, 64, 96), low, high, torch.Generator().manual_seed(0))
    assert bool(((found >= low) & (found <= high)).all())
    x = (found - low) / (high - low)
    grey = x.mean(1, keepdim=True)
    assert float(grey.std()) == pytest.approx((GREY**2 + COLOUR**2 / 3) ** 0.5, rel=0.1)  # a little is cut off at the ends
    assert float((x - grey).std()) == pytest.approx(COLOUR * (2 / 3) ** 0.5, rel=0.1)
    radius = (torch.fft.fftfreq(64)[:, None] ** 2 + torch.fft.fftfreq(96)[None] ** 2).sqrt()
    power = torch.fft.fft2(grey[:, 0] - 0.5).abs().square().mean(0)
    for r in (0.03, 0.1):
        near, far = ((radius > f) & (radius < 1.2 * f) for f in (r, 4 * r))
        assert float(power[near].mean() / power[far].mean()) == pytest.approx(16, rel=0.2)  # amplitudes as 1 / f


def test_images_come_to_what_batch_norms_saw_in_training(teacher: Teacher, pictures: torch.Tensor) -> None:
    settings = NormInversion(iterations=40, warm_up=1, batch=16, ce=1.0, variation=0.0)
    found, labels = settings(teacher, SIZE, 4, 16, LOW, HIGH)
    assert torch.equal(found, settings(teacher, SIZE, 4, 16, LOW, HIGH)[0])
    start = photographic(16, SIZE, LOW, HIGH, torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = teacher(start), teacher(found)
    statistics = [float(apart(seen.moments, teacher.running, teacher.eps)) for seen in (before, after)]
    wrong = [float(torch.nn.functional.cross_entropy(seen.logits, labels)) for seen in (before, after)]
    assert statistics[1] < 0.3 * statistics[0]
    assert wrong[1] < wrong[0] - 0.1
    smooth, _ = replace(settings, variation=10.0)(teacher, SIZE, 4, 16, LOW, HIGH)
    assert float(roughness(smooth / (HIGH - LOW))) < 0.7 * float(roughness(found / (HIGH - LOW)))


def test_a_killed_inversion_goes_on_behind_the_batches_that_are_ready(teacher: Teacher, tmp_path: Path) -> None:
    settings = NormInversion(iterations=3, warm_up=1, batch=4)
    whole, _ = settings(teacher, SIZE, 4, 10, LOW, HIGH)
    said: list[str] = []

    def stop(text: str) -> None:
        said.append(text)
        if len(said) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settings(teacher, SIZE, 4, 10, LOW, HIGH, kept=tmp_path / "state.pt", progress=stop)
    said = ["from here on nothing stops"] * 5
    found, _ = settings(teacher, SIZE, 4, 10, LOW, HIGH, kept=tmp_path / "state.pt", progress=said.append)
    assert len(said) - 5 == 6  # two of three batches
    assert torch.equal(found, whole)
    no_damage_is_gone_on_from(tmp_path / "state.pt", lambda kept: settings(teacher, SIZE, 4, 10, LOW, HIGH, kept=kept))


def test_a_model_without_batch_norm_is_told_what_works(seer: Teacher) -> None:
    with pytest.raises(BadModel, match=r"no batch norm.*has attention.*--images synthetic.*--recipe mse"):
        TINY(seer, SIZE, 4, 4)
    with pytest.raises(BadModel, match="no batch norm"):
        NormInversion()(seer, SIZE, 4, 4, LOW, HIGH)
    with pytest.raises(BadModel, match="no batch norm"):
        method_for(seer, real=True)
    assert isinstance(method_for(seer, real=False), PatchDiversity)


def test_a_model_with_neither_needs_real_images(teacher: Teacher) -> None:
    bare = Teacher(load_model(ConvNet().eval(), overrides={"input_size": SIZE}).program)
    with pytest.raises(BadModel, match=r"neither batch norm nor attention.*--images DIR"):
        method_for(bare, real=False)
    with pytest.raises(BadModel, match="no attention"):
        PatchDiversity()(teacher, SIZE, 4, 4, LOW, HIGH)
    assert isinstance(method_for(teacher, real=False), NormInversion)
    assert isinstance(method_for(teacher, real=True), Fdda)


def test_synthetic_images_are_a_source_like_any_other_and_are_made_once(teacher: Teacher, tmp_path: Path) -> None:
    preprocess = Preprocess(SIZE)
    asked = Synthesis(TINY, 6, 4, preprocess)
    said: list[str] = []
    images = asked(teacher, tmp_path / "made.safetensors", said.append)
    assert len(said) == asked.total == TINY.epochs
    made, labels = TINY(teacher, SIZE, 4, 6)
    assert torch.equal(torch.cat(list(images.batches(4))), made)
    assert torch.equal(images.labels, labels)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["made.safetensors"]
    again = asked(teacher, tmp_path / "made.safetensors", said.append)
    assert len(said) == asked.total
    assert again.fingerprint() == images.fingerprint()
    assert images.source == "6 synthetic images by Fdda (seed 0)"


def test_the_key_changes_with_everything_that_decides_the_images(pictures: torch.Tensor) -> None:
    preprocess = Preprocess(SIZE)
    real = open_images((pictures[:4], torch.arange(4)), preprocess, classes=4)
    other = open_images((pictures[:4], torch.tensor([1, 0, 2, 3])), preprocess, classes=4)
    asked = [
        Synthesis(TINY, 6, 4, preprocess),
        Synthesis(TINY, 7, 4, preprocess),
        Synthesis(TINY.shorter(4, 5), 6, 4, preprocess),
        Synthesis(TINY, 6, 4, preprocess, seed=1),
        Synthesis(TINY, 6, 4, preprocess, real=real),
        Synthesis(TINY, 6, 4, preprocess, real=other),
    ]
    keys = {a.key("model") for a in asked}
    assert len(keys | {asked[0].key("another model")}) == len(asked) + 1


def test_the_word_synthetic_is_a_source() -> None:
    assert asked_for("synthetic") == (True, None)
    assert asked_for("synthetic:few") == (True, "few")
    assert asked_for("folder") == (False, None)
    assert asked_for(None) == (False, None)
