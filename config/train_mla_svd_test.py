# config/train_mla_test.py with a truncated SVD on the values that the latents expand to

out_dir = 'out-mla-svd-test'
eval_interval = 300
eval_iters = 20
log_interval = 10

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 4
block_size = 256

n_layer = 4
n_head = 4
n_embd = 128                    # head size 32

use_mla = True
mla_latent_dim = 32             # the values of all heads together have at most rank 32

use_svd = True
svd_rank = 16                   # of 32; None or 32 gives config/train_mla_test.py
svd_method = 'gram'             # same V_k as 'standard' (torch.linalg.svd), faster
svd_scope = 'causal'            # sees no later tokens, so latents can be cached

optimizer = 'muon'
muon_per_head = True
weight_init = 'mimetic'
beta1 = 0.0
learning_rate = 3.5e-3
min_lr = 3.5e-4
max_iters = 1200
warmup_iters = 60
