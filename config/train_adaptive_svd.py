# adaptive SVD of W_q in the first block, which protects what W_q has learned if gradients would
# overwrite it

out_dir = 'out-adaptive-svd'
eval_interval = 50
eval_iters = 20
log_interval = 1

dataset = 'shakespeare_char'    # prepared by the first run
gradient_accumulation_steps = 1
batch_size = 1                  # 512 tokens per step
block_size = 512

n_layer = 4
n_head = 4
n_embd = 256                    # r, the number of trained components, starts at 256 - 10 = 246

adaptive_svd = True
adaptive_svd_target_layer = 0
adaptive_svd_targets = 'c_q'
adaptive_svd_interval = 20      # analyses at steps 20, 40, ... 100

learning_rate = 1e-3            # AdamW
min_lr = 1e-4
max_iters = 100
warmup_iters = 10               # 10% of the run
