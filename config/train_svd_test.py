# the main config: a small character model on Shakespeare with a truncated SVD on the values V;
# takes minutes on two CPU cores. Compare with config/train_baseline_test.py, the same without SVD

out_dir = 'out-svd-test'
eval_interval = 300             # an evaluation takes a second or two
eval_iters = 20                 # the final evaluation uses the whole validation split
log_interval = 10

dataset = 'shakespeare_char'    # prepared by the first run
gradient_accumulation_steps = 1
batch_size = 4                  # 1,024 tokens per step: many small steps suit Muon on a CPU
block_size = 256

n_layer = 4
n_head = 4
n_embd = 128                    # head size 32

use_svd = True
svd_rank = 16                   # of 32; None or 32 gives the baseline
svd_method = 'gram'             # same V_k as 'standard', faster
svd_scope = 'sequence'          # best approximation; sees later tokens, so two losses are reported
svd_basis_grad = False          # True: training learns to use later tokens: docs/RESULTS.md

optimizer = 'muon'              # reaches AdamW's loss in a fifth of the steps: docs/RESULTS.md
muon_per_head = True            # same loss as whole W_q, W_k, W_v (two seeds), less arithmetic
weight_init = 'mimetic'         # attention starts at nearby tokens, GELU not linear
beta1 = 0.0                     # embeddings and vectors learn faster without momentum
learning_rate = 3.5e-3          # chosen of 2.5e-3, 3.5e-3 and 5e-3
min_lr = 3.5e-4                 # learning_rate / 10
max_iters = 1200
warmup_iters = 60               # 5% of the run
