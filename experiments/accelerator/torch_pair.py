"""The step of the pair in torch: ResNets for CIFAR, the textbook's divergence, SGD."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.accelerator import textbook, torch_peers
from experiments.accelerator.rows import Call

_WIDTHS = (16, 16, 32, 64)
_PAD = 4
_RATE = 0.05


def arm(
    depths: Sequence[int],
    student: Mapping[str, Any],
    batch: int,
    images: int,
    steps: int,
    *,
    compiles: bool,
) -> Call:
    """A call that trains so many steps further.

    Args:
        depths: of the teacher and of the student.
        student: its group of the config, for the numbers of its loss and of its optimizer.
        batch: how many images a step has.
        images: how many there are.
        steps: of a call.
        compiles: whether `torch.compile` compiles the loss.
    """
    import torch

    device = torch_peers.device()[0]
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # as JAX does on such a device by default
    layout = {"device": device, "memory_format": torch.channels_last}
    teacher, learner = (network(torch, depth).to(**layout) for depth in depths)
    teacher.eval()
    padded, labels = (torch.from_numpy(x).to(device) for x in _data(images))
    numbers = {name: student["optimizer"][name] for name in ("momentum", "weight_decay")}
    optimizer = torch.optim.SGD(learner.parameters(), lr=_RATE, **numbers)
    loss = functools.partial(_loss, torch, teacher, learner, student["terms"]["distill"])
    if compiles:
        torch.compiler.reset()
        loss = torch.compile(loss, dynamic=False)

    def call():
        for step in range(steps):
            chosen = torch.arange(step * batch, (step + 1) * batch, device=device) % images
            optimizer.zero_grad()
            loss(_augmented(torch, padded, chosen), labels[chosen]).backward()
            optimizer.step()
        torch_peers.wait()

    return call


def _data(images: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images with a margin for crops, and their labels."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 32, 32, 3), np.uint8)
    margin = (_PAD, _PAD)
    return np.pad(pixels, ((0, 0), margin, margin, (0, 0))), rng.integers(0, 100, images)


def network(torch: Any, depth: int) -> Any:
    """A ResNet for 32x32 images and 100 classes, as in CRD's model zoo."""
    nn = torch.nn

    def conv_norm(inputs, outputs, size, stride):
        conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs))

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.first = conv_norm(inputs, outputs, 3, stride)
            self.second = conv_norm(outputs, outputs, 3, 1)
            same = stride == 1 and inputs == outputs
            self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

        def forward(self, x):
            y = self.second(torch.relu(self.first(x)))
            return torch.relu(y + self.shortcut(x))

    stem, *stages = _WIDTHS
    layers, inputs = [conv_norm(3, stem, 3, 1), nn.ReLU()], stem
    for stage, width in enumerate(stages):
        for index in range((depth - 2) // 6):
            layers.append(Block(inputs, width, 2 if stage > 0 and index == 0 else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 100))


def _augmented(torch: Any, padded: Any, chosen: Any) -> Any:
    """Random crops and flips of the chosen images, `[B, 3, 32, 32]` in [0, 1]."""
    size, device = len(chosen), chosen.device
    at = torch.arange(32, device=device)
    rows, columns = (torch.randint(2 * _PAD + 1, (size, 1), device=device) + at for _ in range(2))
    flips = torch.rand(size, 1, device=device) < 0.5
    columns = torch.where(flips, columns.flip(1), columns)
    images = padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
    return images.permute(0, 3, 1, 2).float() / 255


def _loss(torch: Any, teacher: Any, learner: Any, distill: Mapping[str, Any], images, labels):
    """Cross-entropy and the divergence, as the config weighs them."""
    with torch.no_grad():
        target = teacher(images)
    logits = learner(images)
    numbers = {name: distill["divergence"][name] for name in ("alpha", "beta")}
    tempered = (x / distill["temperature"] for x in (logits, target))
    operations = textbook.of_torch(torch)
    divergence = textbook.mean_divergence(operations, "alpha_beta", *tempered, **numbers)
    return torch.nn.functional.cross_entropy(logits, labels) + distill["weight"] * divergence
