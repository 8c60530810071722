"""Synthetic images as a source like any other: `--images synthetic`, or `synthetic:DIR` with a few real ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fewbit.data.images import Images, open_images
from fewbit.data.preprocess import Preprocess
from fewbit.data.synthesize.fdda import Centres, Fdda, centres_of
from fewbit.data.synthesize.inversion import Inversion
from fewbit.data.synthesize.norms import NormInversion
from fewbit.data.synthesize.patches import PatchDiversity
from fewbit.data.synthesize.teacher import Teacher, refuse_without_norms
from fewbit.errors import BadModel, FewbitError
from fewbit.files import read_state, write_state

WORD = "synthetic"
STATE = "synthesize.pt"  # a generator while it is trained, or the images that are ready
Method = Fdda | Inversion


def asked_for(source: object) -> tuple[bool, str | None]:
    """Whether images are to be synthetic, and the folder or file of real ones that they are made beside (None: none)."""
    text = source if isinstance(source, str) else ""
    if text == WORD:
        return True, None
    if text.startswith(f"{WORD}:"):
        return True, text.removeprefix(f"{WORD}:") or None
    return False, None


def method_for(teacher: Teacher, *, real: bool, steps: int | None = None) -> Method:
    """The synthesis method for a model: by attention or by batch norms; with real images, a generator trained on batch norms.

    `steps` are iterations of an image, or of a generator (in epochs of at most 100). Raises BadModel if the model has neither.
    """
    if real:
        refuse_without_norms(teacher)
        return SHORT if steps is None else in_steps(SHORT, steps)
    if not teacher.has_attention and not len(teacher.running):
        raise BadModel(
            "the model has neither batch norm nor attention, so no images can be made from it; give real ones: --images DIR."
        )
    method: Inversion = PATCHES if teacher.has_attention else NormInversion()
    return method if steps is None else method.shorter(-(-steps // method.rounds))


SHORT = Fdda().shorter(40, 100)  # a twentieth of the paper's steps
PATCHES = PatchDiversity().shorter(75)  # 150 in place of 1,000: as good as real images already (bench/README.md)


def in_steps(method: Fdda, steps: int) -> Fdda:
    """About so many iterations in all, in at most as many epochs as there were."""
    if steps < 1:
        raise FewbitError(f"--steps {steps}: at least 1 is needed.")
    epochs = min(method.epochs, max(1, steps // 5))
    return method.shorter(epochs, -(-steps // epochs))


@dataclass(frozen=True)
class Synthesis:
    """A request for images: how, how many, of how many classes, and the few real ones that give classes their centres."""

    method: Method
    count: int
    classes: int
    preprocess: Preprocess
    seed: int = 0
    real: Images | None = None

    @property
    def source(self) -> str:
        beside = "" if self.real is None else f" beside {len(self.real)} of {self.real.source}"
        return f"{self.count} synthetic images by {type(self.method).__name__} (seed {self.seed}){beside}"

    def key(self, model: str) -> str:
        """SHA-256 over everything that decides the images; `model` is the program's fingerprint."""
        real, labels = "", ""
        if self.real is not None:
            real = self.real.fingerprint()
            labels = "" if self.real.labels is None else str(self.real.labels.tolist())
        parts = (repr(self.method), self.count, self.classes, self.preprocess, self.seed, model, real, labels)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def total(self) -> int:
        """How often `progress` is called."""
        if isinstance(self.method, Fdda):
            return self.method.epochs
        return self.method.steps(self.count)

    def __call__(
        self,
        teacher: Teacher,
        file: Path,
        progress: Callable[[str], None] = lambda text: None,
    ) -> Images:
        """The images from `file`; if it does not exist they are made and saved there, with unfinished work beside it."""
        if not file.exists():
            images, labels = self._generate(teacher, file.with_name(STATE), progress)
            write_state(file, {"images": images, "labels": labels}, {})
            file.with_name(STATE).unlink(missing_ok=True)
        tensors, _ = read_state(file)
        opened = open_images((tensors["images"], tensors["labels"]), self.preprocess, classes=self.classes)
        return replace(opened, source=self.source)

    def centres(self, teacher: Teacher) -> Centres | None:
        """The centres of classes, from the real images if there are any."""
        if self.real is None:
            return None
        return centres_of(teacher, self.real.batches(1), self.real.labels, self.classes)

    def _generate(self, teacher: Teacher, state: Path, progress: Callable[[str], None]) -> tuple[Tensor, Tensor]:
        size = self.preprocess.size
        if isinstance(self.method, Fdda):
            centres = self.centres(teacher)
            return self.method(teacher, size, self.classes, self.count, centres, seed=self.seed, kept=state, progress=progress)
        low, high = self.preprocess.ends()
        return self.method(teacher, size, self.classes, self.count, low, high, seed=self.seed, kept=state, progress=progress)
