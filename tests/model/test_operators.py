"""Torch has a kernel on CUDA and MPS for every operator of a training step and of generation.

The tests run on fake tensors, which claim to be on a device and carry shapes but no values, so the
code takes the branches of that device. Every operator that reaches the dispatcher is recorded and
looked up in native_functions.yaml, torch's own list of kernels per device.

Not covered are values (the tests marked any_device run on the device itself), kernels that exist
but reject a shape or a dtype, operators that torch's composite kernels call inside, and GradScaler,
which reads a value. Autocast, fused attention and fused dropout are chosen in C++, which does not
see the fake device. The kernels that attention and dropout may end in are looked up by name."""

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

# from Muon's matrix norm, only with fake tensors
pytestmark = pytest.mark.filterwarnings('ignore:at..frobenius_norm is deprecated')

# kernels that C++ may choose on the device in place of the recorded operators
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
    """Map each operator to the dispatch keys it has kernels for. An operator without a dispatch
    section is made of other operators."""
    text = (resources.files('torchgen') / 'packaged/ATen/native/native_functions.yaml').read_text()
    entries = {
        e['func'].split('(')[0]: e
        for e in yaml.load(text, getattr(yaml, 'CSafeLoader', yaml.SafeLoader))}

    def keys(entry):
        entry = entries[entry['structured_delegate']] if 'structured_delegate' in entry else entry
        generated = 'ufunc_inner_loop' in entry  # torch generates these kernels
        names = [*entry.get('dispatch', () if generated else ('CompositeImplicitAutograd',))]
        return {
            key.strip() for name in names + ['CPU, CUDA'] * generated for key in name.split(',')}

    return {op: keys(entry) for op, entry in entries.items()}


def faults(calls, kernels, device):
    """Return what would fail on the device: operators without a kernel, dtypes it lacks, and
    operands on two devices."""
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
    """Record every operator below autograd and autocast.

    The C++ side of torch may be built without the device, so it sees meta tensors instead. Python
    sees the device. Reading a value returns True, so checks such as isfinite pass."""

    def __init__(self, device):
        super().__init__()
        # with an index, because without one torch asks the real device
        self.device, self.calls = torch.device(device, 0), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # C++ asks a fake tensor for its device
            device = args[0].fake_device
            return torch.device('meta') if device == self.device else device
        kwargs = dict(kwargs or {})
        if kwargs.get('device') == torch.device('meta'):  # C++ makes one like another
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
        """Replace a meta tensor by a fake one. x[:, [-1]] makes its index in C++, past the
        dispatcher."""
        if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) and x.is_meta:
            return torch.empty(x.shape, dtype=x.dtype, device=self.device)
        return x


def operands(tree):
    return [
        Operand(x.device.type, x.dtype, x.dim())
        for x in tree_leaves(tree)
        if isinstance(x, torch.Tensor)]


def record(device, f):
    """Return the operators that f(device) calls."""
    with FakeTensorMode(), Recorder(device) as recorder:
        f(recorder.device)
    return recorder.calls


@pytest.fixture(autouse=True)
def like_the_device(monkeypatch):
    """Make clip_grad_norm_ and the optimizers take the path, foreach or not, of the real device.
    They group tensors by device in C++ and treat subclasses of Tensor differently."""
    monkeypatch.setattr(_foreach_utils, '_foreach_supported_types',
                        [*_foreach_utils._foreach_supported_types, FakeTensor])
    group = torch._C._group_tensors_by_device_and_dtype

    def group_by_python_device(lists, with_indices=False):
        device = next(t.device for tensors in lists for t in tensors if t is not None)
        return {(device, dtype): v for (_, dtype), v in group(lists, with_indices).items()}

    monkeypatch.setattr(torch._C, '_group_tensors_by_device_and_dtype', group_by_python_device)


# --------------------------------------------------------------------------------------------------
# the code under test


def train_and_generate(device, **options):
    """Run two training steps and generate.

    In 'causal' scope there are two bases, the first from fewer rows than columns. Muon runs without
    an SVD only, because its parameters are the same in all cases."""
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
    moved = {}  # .to() swaps parameters, which fake ones do not allow
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
        MuonAdamW(model, 0.1, 1e-3, betas, device.type, dtype, per_head=True)
        for dtype in (torch.float32, torch.bfloat16)
        if not options]
    for _ in range(2):  # a cold and a warm start
        model(tokens, tokens)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
    assert all(p.grad.device == p.device == device for p in model.parameters())
    model.eval()
    # seven tokens: a sliding window, a cache up to its first basis, and one prompt for two rows
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
        'shared keys': dict(svd_method='gram', svd_scope='causal', svd_targets='q,k', n_kv_head=1),
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
    """Every operator of training and generating has a kernel on the device. Exact decompositions
    run in float64, on the CPU for MPS. Cholesky runs on the device in the widest dtype that it
    has."""
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
    """The checker reports a missing kernel, a missing dtype and mixed devices, and nothing else."""
    assert faults(record(device, f), kernels, device) == expected
    unknown = Call('made_up', [Operand(device, torch.float32, 1)], [])
    assert faults([unknown], kernels, device) == {f'made_up: not on {device}'}
