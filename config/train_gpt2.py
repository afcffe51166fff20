# GPT-2 (124M) on OpenWebText to a loss of about 2.85; nanoGPT's settings
# a few days on 8 A100 40GB:
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# 12 sequences * 1024 tokens * 5 micro-batches * 8 processes = 491,520 tokens per step
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000              # 300 billion tokens
lr_decay_iters = 600000         # = max_iters; change both for a shorter run

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1

use_svd = False                 # True: truncated SVD on V
svd_rank = 32                   # of head size 64
svd_scope = 'weight'            # sees no later tokens; one small SVD per layer, for any batch size
