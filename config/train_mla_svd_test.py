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
n_embd = 128                    # heads of 32

use_mla = True
mla_latent_dim = 32             # all heads' values together have rank 32 at most

use_svd = True
svd_rank = 16                   # of 32; None or 32 is config/train_mla_test.py
svd_method = 'gram'             # the standard SVD's V_k, faster; --svd_method=standard takes torch.linalg.svd
svd_scope = 'causal'            # sees no future, so latents can be cached; 'sequence' is the classic definition

optimizer = 'muon'
learning_rate = 5e-3
min_lr = 5e-4
max_iters = 1200
warmup_iters = 60
