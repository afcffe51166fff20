"""Models of a configuration, and whole training steps of them on random tokens, to be timed: forward, backward,
clipping and the optimizer."""

from dataclasses import fields, replace

import torch

from model import GPT, GPTConfig
from runtime.evaluation import FINAL_GAP_POSITIONS, GAP_POSITIONS
from runtime.optimizer import new_optimizer
from tools.timing import quartiles, time_it
from train import new_state, train_step


def model_config(cfg, **changes):
    """The GPTConfig of a configuration, with these changes."""
    return GPTConfig(**{f.name: getattr(cfg, f.name) for f in fields(GPTConfig)} | changes)


def new_model(cfg, device, **changes):
    """The model of a configuration, with these changes, its weights drawn from cfg.seed."""
    torch.manual_seed(cfg.seed)
    return GPT(model_config(cfg, **changes)).to(device)


def step_of(cfg, device, warm=True, **changes):
    """-> a function that runs one training step of a new model, on random tokens. changes: of the configuration. warm:
    whether 'randomized' starts from the step before."""
    model = new_model(cfg, device, **changes)
    state = new_state(replace(cfg, compile=False, **changes), model, device)
    if not warm:
        state.optimizer = new_optimizer(cfg, model, device)
    batches = [random_tokens(cfg, device)]
    return lambda: train_step(state, batches)


def random_tokens(cfg, device):
    """x, y (B, T)."""
    generator = torch.Generator().manual_seed(cfg.seed)
    return [torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size), generator=generator).to(device)
            for _ in range(2)]


def run_seconds(cfg, data, device):
    """Seconds that a run of train.py will take, from five of its steps. A batch of an evaluation counts a third of a
    step: it has no backward pass."""
    step = step_of(cfg, device)
    step()
    _, seconds, _ = quartiles([time_it(step, device) for _ in range(5)])
    looks = cfg.max_iters // cfg.eval_interval + 1
    windows = looks * 2 * cfg.eval_iters * cfg.batch_size + len(data.tokens('val')) / cfg.block_size
    if cfg.is_noncausal:                                         # whole, and again up to a random place: half
        windows += 1.5 * (looks * GAP_POSITIONS + FINAL_GAP_POSITIONS)
    return seconds * (cfg.max_iters * cfg.gradient_accumulation_steps + windows / cfg.batch_size / 3)
