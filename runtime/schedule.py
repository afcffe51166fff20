"""The learning rate over the steps of a run: nanoGPT's, whose warm-up may be longer than a short run."""

import math

LENGTH = 600000                     # nanoGPT's default, in its checkpoints and older ones


def schedule_length(cfg):
    """lr_decay_iters, or max_iters where that was left at its default. Stopped early, a run keeps its schedule."""
    return cfg.max_iters if cfg.lr_decay_iters == LENGTH else cfg.lr_decay_iters


def warmup_iters(cfg):
    """Steps of warm-up: as asked for if the schedule is longer than that, else a tenth of it."""
    return cfg.warmup_iters if cfg.warmup_iters < schedule_length(cfg) else schedule_length(cfg) // 10


def get_lr(it, cfg):
    """Learning rate of step `it`: linear warm-up, cosine to min_lr at lr_decay_iters, min_lr after it."""
    warmup = warmup_iters(cfg)
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < warmup:
        return cfg.learning_rate * (it + 1) / (warmup + 1)
    if it >= cfg.lr_decay_iters:
        return cfg.min_lr
    ratio = (it - warmup) / (cfg.lr_decay_iters - warmup)               # 0 to 1
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (cfg.learning_rate - cfg.min_lr)
