"""tests/compare_checkouts.py finds a planted difference between two trees, and none between equal
trees."""

import shutil

import pytest

import compare_checkouts
from helpers import ROOT

# appended to model.py: each makes one small change and uses only GPT and names of nanoGPT
HEAD = '''
_init, _forward = GPT.__init__, GPT.forward
def changed(self, config):
    _init(self, config)
'''
PLANTED = {
    'nothing': '', 'an initialisation': HEAD +
    '    with torch.no_grad(): self.transformer.wpe.weight[0, 0] += 1e-6',
    'a gradient': HEAD + '    self.transformer.wpe.weight.register_hook(lambda g: g * (1 + 1e-6))',
    'a random stream': HEAD + '    torch.rand(1)', 'the order of data': HEAD +
    '    torch.randint = lambda *a, real=torch.randint, **k: real(*a, **k).flip(0)',
    'a checkpoint': HEAD +
    '    self._register_state_dict_hook(lambda m, state, *_: '
    'state.update({"transformer.ln_f.weight": '
    'state["transformer.ln_f.weight"] + 1e-6}))', 'a cached row': HEAD +
    '    self.transformer.h[0].attn.c_attn.register_forward_hook(lambda module, args, out: '
    'type(out)(o * (1 + 1e-6) for o in out) if args[0].size(1) == 1 else out)'
}


@pytest.mark.slow
@pytest.mark.parametrize('change', PLANTED)
def test_a_planted_change_is_found(tmp_path, capfd, change):
    """Each small planted change is found: an initial weight, a gradient, a random number, the data
    order, a checkpoint and a cached row."""
    tree = shutil.copytree(
        ROOT, tmp_path / 'tree', ignore=shutil.ignore_patterns('.git', 'tests', 'docs', 'data',
                                                               'out', 'out-*'))
    with open(tree / 'model.py', 'a') as f:
        f.write(PLANTED[change] + ('\nGPT.__init__ = changed\n' if PLANTED[change] else ''))
    code = compare_checkouts.main([str(ROOT), str(tree), '--only=plain dropout'])
    verdict, expected = capfd.readouterr().out, ('equal', 0) if change == 'nothing' else ('DIFF ',
                                                                                          1)
    assert (verdict[:5], code) == expected, verdict


def test_a_name_in_a_file_may_change_but_no_value_is_lost():
    """Entries of a file may be added and renamed, but a missing or changed value counts as a
    difference."""
    old = {'a.pt step 0': '1', 'a.pt step 1': '1', 'a.pt config seed': '2', '00001 logits': 'x'}
    for new, different in [({'a.pt steps': '1', 'a.pt steps 1': '1'}, []),
                           ({'a.pt steps': '1'}, ['a.pt step 1'])]:
        new |= {'a.pt config more': '3', '00001 logits': 'x', 'a.pt config seed': '2'}
        assert compare_checkouts.differences(old, new)[0] == different
        assert '00001 logits' in compare_checkouts.differences(old, new | {'00001 logits': 'y'})[0]


@pytest.mark.parametrize('argv', [['one'], ['--only=no such'], ['nowhere', str(ROOT)]])
def test_wrong_input_is_refused(capsys, argv):
    assert compare_checkouts.main(argv) == 2 and len(capsys.readouterr().err.splitlines()) == 1
