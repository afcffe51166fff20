"""lowrank/linear.py against F.linear."""

import pytest
import torch
from torch.nn import functional as F

from lowrank import linear as module
from lowrank.linear import FEW_ROWS, LARGE, VERY_FEW_ROWS, Linear, linear


@pytest.fixture(params=[1, 2, 3, 7])
def threads(request, monkeypatch):
    """As if torch had so many; how the work is shared does not depend on who does it."""
    monkeypatch.setattr(torch, 'get_num_threads', lambda: request.param)
    return request.param


@pytest.fixture
def products(monkeypatch):
    """The batched products that are made: lists of the shapes of both factors."""
    made = []
    for name, first in (('bmm', 0), ('baddbmm', 1)):
        real = getattr(torch, name)

        def record(*args, real=real, first=first):
            made.append([tuple(t.shape) for t in args[first:]])
            return real(*args)
        monkeypatch.setattr(module.torch, name, record)
    return made


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(512,), (1, 512), (1, 1, 512), (4, 1, 512), (2, 3, 512), (FEW_ROWS, 512)])
@pytest.mark.parametrize('m', [LARGE // 512, LARGE // 512 + 1, LARGE // 512 + 5])
def test_it_is_the_same_product(threads, products, m, shape, bias, dtype):
    generator = torch.Generator().manual_seed(m)
    x, weight = (torch.randn(s, generator=generator, dtype=dtype) for s in (shape, (m, 512)))
    b = torch.randn(m, generator=generator, dtype=dtype) if bias else None
    expected, y = F.linear(x, weight, b), linear(x, weight, b)
    assert y.shape == expected.shape
    assert (y - expected).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()
    rows, share = x.numel() // 512, m // threads
    assert products == [[(threads, share, 512), (threads, 512, rows)] if rows <= VERY_FEW_ROWS else
                        [(threads, rows, 512), (threads, 512, share)]]


@pytest.mark.parametrize('change', ['many rows', 'small weight', 'gradients', 'other dtype', 'autocast', 'transposed'])
def test_elsewhere_it_is_the_library(products, monkeypatch, change):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    x = torch.ones(FEW_ROWS + (change == 'many rows'), 512, dtype=torch.bfloat16 if change == 'other dtype' else None)
    weight = torch.ones(LARGE // 512 - (change == 'small weight'), 512, dtype=x.dtype)
    weight = weight.t().contiguous().t() if change == 'transposed' else weight
    with torch.set_grad_enabled(change == 'gradients'), torch.autocast('cpu', enabled=change == 'autocast'):
        y = linear(x.float() if change == 'autocast' else x, weight)
    assert torch.equal(y.float(), torch.full_like(y, 512).float())
    assert bool(products) == (change == 'other dtype')              # both are bfloat16 there: split, too


def test_the_module_learns_as_nn_linear_does():
    ours, theirs = Linear(512, 256), torch.nn.Linear(512, 256)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 512)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    assert torch.equal(ours.weight.grad, theirs.weight.grad) and torch.equal(ours.bias.grad, theirs.bias.grad)
