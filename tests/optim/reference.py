"""Optimizers written out from their papers, in float64 numpy, for one parameter of one layer at a time."""

import numpy as np


def adamw(p, grads, lr, wd, b1, b2, eps):
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p = p * (1 - lr(t - 1) * wd)
        p = p - lr(t - 1) * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


def lion(p, grads, lr, wd, b1, b2):
    m = np.zeros_like(p)
    for t, g in enumerate(grads):
        u = np.sign(b1 * m + (1 - b1) * g)
        m = b2 * m + (1 - b2) * g
        p = p - lr(t) * (u + wd * p)
    return p


def newton_schulz(x, steps):
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def muon(p, grads, lr, wd, momentum, steps, rms):
    """p is a matrix [rows, columns]; Nesterov momentum with the bias corrected (its scale does not matter)."""
    m = np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m = momentum * m + (1 - momentum) * g
        ahead = momentum * m / (1 - momentum ** (t + 1)) + (1 - momentum) * g / (1 - momentum**t)
        p = p - lr(t - 1) * (rms * np.sqrt(max(p.shape)) * newton_schulz(ahead, steps) + wd * p)
    return p


def adafactor(p, grads, lr, wd, power, clip, factored):
    row = col = full = 0.0
    for t, g in enumerate(grads, start=1):
        forget = 1 - t**-power
        square = g * g + 1e-30
        if factored:
            row = forget * row + (1 - forget) * square.mean(1)
            col = forget * col + (1 - forget) * square.mean(0)
            u = g / np.sqrt(np.outer(row, col) / row.mean())
        else:
            full = forget * full + (1 - forget) * square
            u = g / np.sqrt(full)
        u = u / max(1.0, np.sqrt(np.mean(u * u)) / clip)
        u = u * max(1e-3, np.sqrt(np.mean(p * p)))
        p = p - lr(t - 1) * (u + wd * p)
    return p


def schedule_free_adamw(p, grads, lr, wd, b1, b2, eps):
    """Constant learning rate -> (y, x): where gradients are taken, and what is evaluated."""
    x, z, y = p, p, p
    v, total = np.zeros_like(p), 0.0
    for t, g in enumerate(grads, start=1):
        v = b2 * v + (1 - b2) * g * g
        z = z - lr(t - 1) * (g / (np.sqrt(v / (1 - b2**t)) + eps) + wd * y)
        total += lr(t - 1) ** 2
        x = x + lr(t - 1) ** 2 / total * (z - x)
        y = (1 - b1) * z + b1 * x
    return y, x
