"""Search for NaN and infinite values."""

import torch


def first_nonfinite_layer(model, batches, context):
    """Return the name of the layer to report if the loss or a gradient is NaN or infinite.

    The search has three stages and stops at the first finding: a parameter that is not finite; a
    module whose output is not finite, in a forward pass over `batches`, a list of (x, y); a
    parameter whose gradient is not finite, in the order of the backward pass. If nothing is found,
    the result is None. The forward pass runs within `context`, with new dropout masks.
    """
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            return f'{name} (the parameter)'
    bad, entered, names = (
        [], [], {module: name for name, module in model.named_modules() if name})

    def check(module, args, output):
        tensors = output if isinstance(output, tuple) else (output,)
        if not all(t.isfinite().all() for t in tensors if torch.is_tensor(t)):
            bad.append(f'{names[module]} (its output)')

    hooks = []
    for module in names:
        hooks.append(
            module.register_forward_pre_hook(lambda module, args: entered.append(names[module])))
        hooks.append(module.register_forward_hook(check))
    try:
        with torch.no_grad(), context:
            for x, y in batches:
                model(x, y)
    except torch.linalg.LinAlgError:
        bad.append(f'{entered[-1]} (its decomposition)')
    for hook in hooks:
        hook.remove()
    bad += [f'{name} (its gradient)' for name, p in reversed(list(model.named_parameters()))
            if p.grad is not None and not p.grad.isfinite().all()]
    return bad[0] if bad else None


def first_nonfinite_tensor(tree, path):
    """Return the path of the first tensor in nested dicts and lists that has a NaN or infinite
    value, or None. `path` is the path of `tree` itself."""
    if torch.is_tensor(tree):
        return path if tree.is_floating_point() and not tree.isfinite().all() else None
    items = (tree.items() if isinstance(tree, dict) else
             enumerate(tree) if isinstance(tree, (list, tuple)) else ())
    return next(filter(None, (
        first_nonfinite_tensor(value, f'{path}.{key}') for key, value in items)), None)
