# adaptive SVD in one layer: is what W_q of the first block has learned under attack by gradients? If so, protect it

out_dir = 'out-adaptive-svd'
eval_interval = 50
eval_iters = 20
log_interval = 1

dataset = 'shakespeare_char'    # prepares itself
gradient_accumulation_steps = 1
batch_size = 1                  # 512 tokens a step
block_size = 512

n_layer = 4
n_head = 4
n_embd = 256                    # r begins at 256 - 10 = 246

adaptive_svd = True
adaptive_svd_target_layer = 0   # the first block
adaptive_svd_targets = 'c_q'
adaptive_svd_interval = 20      # analyses at steps 20, 40, ... 100

learning_rate = 1e-3            # AdamW
min_lr = 1e-4                   # learning_rate / 10
max_iters = 100
warmup_iters = 10
