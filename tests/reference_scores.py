"""The scores of classification in numpy's float64, each as its definition has it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special

BINS = 15


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of `[N, K]`, over the classes."""
    return logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)


def summary(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The scores of logits `[N, K]` on a set with labels `[N]`."""
    log_p = log_softmax(logits)
    p = np.exp(log_p)
    confidence, correct = p.max(-1), np.argmax(logits, -1) == labels
    five = np.argsort(-logits, axis=-1, kind="stable")[:, :5]
    lower = np.arange(BINS) / BINS
    wide = [np.flatnonzero((confidence > x) & (confidence <= x + 1 / BINS)) for x in lower]
    equal = np.array_split(np.argsort(confidence, kind="stable"), BINS)
    return dict(
        accuracy=correct.mean(),
        top5=np.any(five == labels[:, None], -1).mean(),
        nll=-log_p[np.arange(len(labels)), labels].mean(),
        brier=np.sum((p - np.eye(p.shape[-1])[labels]) ** 2, -1).mean(),
        entropy=-np.sum(p * log_p, -1).mean(),
        ece=calibration_error(confidence, correct, wide),
        adaptive_ece=calibration_error(confidence, correct, equal),
        reliability=dict(
            count=[len(rows) for rows in wide],
            confidence=[mean(confidence[rows]) for rows in wide],
            accuracy=[mean(correct[rows]) for rows in wide],
        ),
    )


def mean(values: np.ndarray) -> float | None:
    """None of no values."""
    return values.mean() if len(values) else None


def calibration_error(
    confidence: np.ndarray, correct: np.ndarray, bins: Sequence[np.ndarray]
) -> float:
    """The mean distance of accuracy from confidence over bins, each the rows that are in it."""
    gaps = [len(x) * abs(correct[x].mean() - confidence[x].mean()) for x in bins if len(x)]
    return sum(gaps) / len(confidence)


def class_accuracy(logits: np.ndarray, labels: np.ndarray) -> list[float | None]:
    """Of each class, None without an example of it."""
    correct = np.argmax(logits, -1) == labels
    return [mean(correct[labels == label]) for label in range(logits.shape[-1])]


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """That which minimises the NLL, between 0.01 and 100."""

    def nll(log_temperature):
        return summary(logits / np.exp(log_temperature), labels)["nll"]

    ends = (-np.log(100), np.log(100))
    options = dict(xatol=1e-9)
    found = scipy.optimize.minimize_scalar(nll, bounds=ends, method="bounded", options=options)
    return float(np.exp(found.x))


def agreement(logits: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Of a network with another one, and KL(other || network), in nats."""
    log_q, log_p = log_softmax(logits), log_softmax(others)
    same = np.argmax(logits, -1) == np.argmax(others, -1)
    return dict(agreement=same.mean(), kl_at_1=np.sum(np.exp(log_p) * (log_p - log_q), -1).mean())
