"""Where numbers went bad: which layer of a model first gave something that is not finite."""

import torch


def first_nonfinite_layer(model, batches, context):
    """What to name when the loss or a gradient is not finite: the first parameter that is not; else the first module
    whose output is not, in a forward pass over `batches` [(x, y), ...]; else the first parameter, as the backward pass
    goes, whose gradient is not; else None. Restores what it hooks; dropout draws anew."""
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            return f'{name} (the parameter)'
    name = _first_bad_output(model, batches, context)
    if name:
        return f'{name} (its output)'
    for name, p in reversed(list(model.named_parameters())):
        if p.grad is not None and not p.grad.isfinite().all():
            return f'{name} (its gradient)'
    return None


@torch.no_grad()
def _first_bad_output(model, batches, context):
    entered, bad = [], []

    def enter(name):
        return lambda module, args: entered.append(name)

    def leave(name):
        def look(module, args, output):
            entered.remove(name)
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(t.isfinite().all() for t in tensors if t is not None):
                bad.append(name)
        return look

    modules = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_pre_hook(enter(name)) for name, module in modules]
    hooks += [module.register_forward_hook(leave(name)) for name, module in modules]
    try:
        for x, y in batches:
            with context:
                model(x, y)
            if bad:
                break
    except torch.linalg.LinAlgError:                                # a decomposition refused its input
        return (bad or entered[-1:] or [None])[0]
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None


def first_nonfinite_tensor(tree, path):
    """The path of the first tensor in nested dicts and lists that has a non-finite number, or None."""
    if torch.is_tensor(tree):
        return path if tree.is_floating_point() and not tree.isfinite().all() else None
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return next(filter(None, (first_nonfinite_tensor(value, f'{path}.{key}') for key, value in items)), None)
