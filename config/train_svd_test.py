# the main job: a small character model on Shakespeare with a truncated SVD on V, minutes on two CPU cores;
# change svd_rank, svd_scope or svd_method and compare with config/train_baseline_test.py

out_dir = 'out-svd-test'
eval_interval = 300             # a few looks on the way; each costs a second or two
eval_iters = 20                 # the final evaluation covers the whole validation split anyway
log_interval = 10

dataset = 'shakespeare_char'    # prepares itself
gradient_accumulation_steps = 1
batch_size = 4                  # 1,024 tokens a step: many small steps suit Muon on a CPU
block_size = 256

n_layer = 4
n_head = 4
n_embd = 128                    # heads of 32

use_svd = True
svd_rank = 16                   # of 32; None or 32 is the baseline
svd_method = 'gram'             # same V_k as 'standard', faster
svd_scope = 'sequence'          # the classic definition; it sees the future, so two losses are reported
svd_basis_grad = False          # with it Muon learns to smuggle the answer through the basis: docs/RESULTS.md

optimizer = 'muon'              # a quarter of AdamW's steps on nanoGPT's CPU recipe: docs/RESULTS.md
learning_rate = 5e-3            # 3e-3 and 8e-3 are slower off the plateau at 2.5
min_lr = 5e-4                   # learning_rate / 10
max_iters = 1200
warmup_iters = 60               # 5% of the run
