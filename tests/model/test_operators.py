"""Which operators a training step and generation call on CUDA and MPS, and whether torch has
kernels for them there.

Fake tensors say that they are on a device and carry shapes but no values, so the code under test
takes the branches it would take there. Every operator that reaches the dispatcher is recorded and
looked up in native_functions.yaml, torch's own list of the kernels each device has.

Not covered: numbers (the tests marked any_device run on the device itself), kernels that exist but
refuse a shape or a type, what a composite kernel of torch calls inside, GradScaler (it reads a
value), and three things that C++ does by a device it is not told here: autocast (adds casts), fused
attention and fused dropout. What the last two can end in is looked up by name. """

import re
from collections import namedtuple
from importlib import resources

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lowrank.svd import EXACT_METHODS, METHODS, truncated_svd
from model import GPT, SCOPES, GPTConfig
from runtime.optimizer import MuonAdamW

# Muon's matrix norm, by a route that only fake tensors take
pytestmark = pytest.mark.filterwarnings('ignore:at..frobenius_norm is deprecated')

# what C++ may pick on the device in place of the operators recorded here
CHOSEN_IN_C = {
    'mps': ('_scaled_dot_product_attention_math_for_mps', 'native_dropout',
            'native_dropout_backward'),
    'cuda': (
        '_fused_sdp_choice',
        'native_dropout',
        'native_dropout_backward',
        *(f'_scaled_dot_product_{kind}_attention{backward}'
          for kind in ('flash', 'efficient', 'cudnn')
          for backward in ('', '_backward')),
    ),
}

Call = namedtuple('Call', 'op arguments results')  # arguments, results: lists of Operand
Operand = namedtuple('Operand', 'device dtype dim')


# --------------------------------------------------------------------------------------------------
# the checker


@pytest.fixture(scope='module')
def kernels():
    """Operator -> the dispatch keys it has kernels for; what has no dispatch section is made of
    other operators."""
    text = (resources.files('torchgen') / 'packaged/ATen/native/native_functions.yaml').read_text()
    entries = {
        e['func'].split('(')[0]: e
        for e in yaml.load(text, getattr(yaml, 'CSafeLoader', yaml.SafeLoader))}

    def keys(entry):
        entry = entries[entry['structured_delegate']] if 'structured_delegate' in entry else entry
        generated = 'ufunc_inner_loop' in entry  # kernels that torch generates
        names = [*entry.get('dispatch', () if generated else ('CompositeImplicitAutograd',))]
        return {
            key.strip() for name in names + ['CPU, CUDA'] * generated for key in name.split(',')}

    return {op: keys(entry) for op, entry in entries.items()}


def faults(calls, kernels, device):
    """What would fail on the device: operators without a kernel, types it lacks, operands on two
    devices."""
    found = set()
    for op, arguments, results in calls:
        there = [operand for operand in (*arguments, *results) if operand.device == device]
        if there and not any(
            key == device.upper() or key.startswith('Composite') for key in kernels.get(op, ())):
            found.add(f'{op}: not on {device}')
        if device == 'mps':
            found |= {
                f'{op}: {operand.dtype} on mps'
                for operand in there
                if operand.dtype in (torch.float64, torch.complex128)}
        if (
            op not in ('_to_copy', 'copy_')
            and len({a.device for a in arguments if not (a.device == 'cpu' and a.dim == 0)}) > 1):
            found.add(f'{op}: operands on two devices')
    return found


class Recorder(TorchDispatchMode):
    """Notes every operator below autograd and autocast, and lets the C++ side of torch, which has
    no guard for a device that it was built without, take tensors of this device for meta tensors.
    Python sees the device. A value that anybody looks at is true: finite, ordinary."""

    def __init__(self, device):
        super().__init__()
        # one without an index needs the device
        self.device, self.calls = torch.device(device, 0), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # how C++ asks a fake tensor for its device
            device = args[0].fake_device
            return torch.device('meta') if device == self.device else device
        kwargs = dict(kwargs or {})
        if kwargs.get('device') == torch.device('meta'):  # C++ makes a tensor "where that one is"
            kwargs['device'] = self.device
        args, kwargs = tree_map(self.fake, (args, kwargs))
        looks = func is torch.ops.aten._local_scalar_dense.default
        results = True if looks else func(*args, **kwargs)
        if func.namespace == 'aten':
            op = func._schema.name.removeprefix('aten::') + '.' * bool(func._schema.overload_name)
            self.calls.append(
                Call(op + func._schema.overload_name, operands((args, kwargs)), operands(results)))
        return results

    def fake(self, x):
        """x[:, [-1]] makes its index in C++, without the dispatcher."""
        if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) and x.is_meta:
            return torch.empty(x.shape, dtype=x.dtype, device=self.device)
        return x


def operands(tree):
    return [
        Operand(x.device.type, x.dtype, x.dim())
        for x in tree_leaves(tree)
        if isinstance(x, torch.Tensor)]


def record(device, f):
    """The operators that f(device) calls."""
    with FakeTensorMode(), Recorder(device) as recorder:
        f(recorder.device)
    return recorder.calls


@pytest.fixture(autouse=True)
def like_the_device(monkeypatch):
    """clip_grad_norm_ and the optimizers group tensors by device in C++ and are wary of subclasses:
    let them take the path, foreach or not, that they take there."""
    monkeypatch.setattr(_foreach_utils, '_foreach_supported_types',
                        [*_foreach_utils._foreach_supported_types, FakeTensor])
    group = torch._C._group_tensors_by_device_and_dtype

    def group_by_python_device(lists, with_indices=False):
        device = next(t.device for tensors in lists for t in tensors if t is not None)
        return {(device, dtype): v for (_, dtype), v in group(lists, with_indices).items()}

    monkeypatch.setattr(torch._C, '_group_tensors_by_device_and_dtype', group_by_python_device)


# --------------------------------------------------------------------------------------------------
# what is run


def train_and_generate(device, **options):
    """Two bases in 'causal' scope, fewer rows than columns in the first. Muon sees the same
    parameters in all cases."""
    model = GPT(
        GPTConfig(
            block_size=16,
            vocab_size=17,
            n_layer=1,
            n_head=2,
            n_embd=16,
            dropout=0.1,
            svd_block=4,
            svd_rank=3,
            **options,
        ))
    moved = {}  # fake parameters cannot be swapped, as .to() does
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = moved.setdefault(
                    p, torch.nn.Parameter(p.detach().to(device)))
        module._buffers.update(
            {name: buffer.to(device) for name, buffer in module._buffers.items()})
    tokens, betas = torch.zeros(2, 16, dtype=torch.long, device=device), (0.9, 0.95)
    optimizers = [model.configure_optimizers(0.1, 1e-3, betas, device.type)]
    optimizers += [
        MuonAdamW(model.param_groups(0.1), 1e-3, betas, device.type, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        if not options]
    for _ in range(2):  # from a random basis, and from that of the first
        model(tokens, tokens)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
    assert all(p.grad.device == p.device == device for p in model.parameters())
    model.eval()
    # seven tokens: a window that slides; a cache, up to its first basis; one prompt for two rows
    for prompt, n in ((tokens, 2), (tokens[:, :3], 3), (tokens[:1, :2].expand(2, 2), 2)):
        use_cache = not model.config.is_noncausal
        assert model.generate(prompt, n, 0.8, top_k=5, top_p=0.9,
                              use_cache=use_cache).device == device


CASES = (
    {'baseline': {}}
    | {
        f'{method}-{scope}': dict(svd_method=method, svd_scope=scope)
        for method in METHODS
        for scope in SCOPES}
    | {
        f'{method}-{scope}-constant': dict(svd_method=method, svd_scope=scope, svd_basis_grad=False)
        for method, scope in zip(METHODS, SCOPES)}
    | {
        'oversampled': dict(svd_method='randomized', svd_scope='sequence', svd_oversample=1),
        'latents': dict(use_mla=True, svd_method='gram', use_svd=False),
        **{
            f'latents-{method}-{scope}': dict(use_mla=True, svd_method=method, svd_scope=scope)
            for method, scope in (
                ('standard', 'sequence'),
                ('gram', 'causal'),
                ('randomized', 'causal'),
                ('gram', 'weight'),
            )
        },
    }
)


@pytest.mark.slow
@pytest.mark.parametrize(
    'device, name',
    [
        (device, name)
        for device in ('mps', 'cuda')
        for name in CASES
    ],
)
def test_the_device_has_every_operator_of_a_training_step_and_of_generating(kernels, device, name):
    options = CASES[name] and dict(use_svd=True) | CASES[name]
    method = options['svd_method'] if options.get('use_svd') else None
    calls = record(device, lambda device: train_and_generate(device, **options))
    assert faults(calls, kernels, device) == set()
    named = {call.op for call in calls}
    assert {'native_layer_norm_backward', '_fused_adamw_', 'multinomial'} <= named
    assert options or {'lerp_.Scalar', 'baddbmm'} <= named  # Muon
    wide, decomposed = (torch.float32, 'cpu') if device == 'mps' else (torch.float64, device)
    for pattern, expected, at in (
        (
            'eig|svd|geqrf|ormqr|householder|linalg_l|inv_ex|solve_ex',
            method in EXACT_METHODS,
            (decomposed, torch.float64),
        ),
        ('cholesky', method == 'randomized', (device, wide)),
    ):
        found = {(a.device, a.dtype) for call in calls if re.search(pattern, call.op)
                 for a in call.arguments}
        assert found == ({at} if expected else set())


@pytest.mark.parametrize('device', ['mps', 'cuda'])
@pytest.mark.parametrize('method', METHODS)
def test_the_device_has_every_operator_of_truncated_svd(kernels, device, method):
    for shape in ((9, 5), (5, 9)):
        calls = record(device,
                       lambda device: truncated_svd(torch.ones(*shape, device=device), 2, method))
        assert calls and faults(calls, kernels, device) == set()
    stand_ins = [Call(op, [Operand(device, torch.float32, 2)], []) for op in CHOSEN_IN_C[device]]
    assert faults(stand_ins, kernels, device) == set()


# --------------------------------------------------------------------------------------------------
# the checker can fail


@pytest.mark.parametrize(
    'device, f, expected',
    [
        ('mps', lambda device: torch.linalg.eigh(torch.eye(3, device=device)),
         {'_linalg_eigh: not on mps'}),
        ('cuda', lambda device: torch.linalg.eigh(torch.eye(3, device=device)), set()),
        ('mps', lambda device: torch.ones(3, device=device).double(),
         {'_to_copy: torch.float64 on mps'}),
        ('mps', lambda device: torch.ones(3, device=device).cpu().double(), set()),
        ('cuda', lambda device: torch.ones(3, device=device).double(), set()),
        (
            'mps',
            lambda device: torch.ones(3, device=device)[torch.tensor([0, 2])],
            {'index.Tensor: operands on two devices'},
        ),
        ('mps', lambda device: torch.ones(3, device=device) * torch.tensor(2.0), set()),
        (
            'cuda',
            lambda device: torch.ops.aten._scaled_dot_product_attention_math_for_mps(*(torch.ones(
                1, 1, 3, 3, device=device), ) * 3),
            {'_scaled_dot_product_attention_math_for_mps: not on cuda'},
        ),
    ],
)
def test_the_checker_finds_what_a_device_lacks(kernels, device, f, expected):
    assert faults(record(device, f), kernels, device) == expected
    unknown = Call('made_up', [Operand(device, torch.float32, 1)], [])
    assert faults([unknown], kernels, device) == {f'made_up: not on {device}'}
