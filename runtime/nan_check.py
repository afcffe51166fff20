"""Where numbers stopped being finite."""

from contextlib import suppress

import torch


def first_nonfinite_layer(model, batches, context):
    """The layer to name when the loss or a gradient is not finite.

    It is the first parameter that is not finite; else the first module whose output is not, in a forward pass over
    `batches` [(x, y), ...]; else the first parameter, in the order of the backward pass, whose gradient is not; else
    None. Dropout masks of the forward pass are new ones.
    """
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            return f'{name} (the parameter)'
    bad = []

    def check(name):
        def hook(module, args, output):
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(t.isfinite().all() for t in tensors if t is not None):
                bad.append(f'{name} (its output)')
        return hook

    hooks = [module.register_forward_hook(check(name)) for name, module in model.named_modules() if name]
    with torch.no_grad(), suppress(torch.linalg.LinAlgError):       # a decomposition refused what is not finite
        for x, y in batches:
            with context:
                model(x, y)
    for hook in hooks:
        hook.remove()
    bad += [f'{name} (its gradient)' for name, p in reversed(list(model.named_parameters()))
            if p.grad is not None and not p.grad.isfinite().all()]
    return bad[0] if bad else None


def first_nonfinite_tensor(tree, path):
    """The path of the first tensor in nested dicts and lists that has a non-finite number, or None."""
    if torch.is_tensor(tree):
        return path if tree.is_floating_point() and not tree.isfinite().all() else None
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return next(filter(None, (first_nonfinite_tensor(value, f'{path}.{key}') for key, value in items)), None)
