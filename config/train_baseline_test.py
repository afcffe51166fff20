# the baseline: config/train_svd_test.py without SVD; everything else is the same

out_dir = 'out-baseline-test'
eval_interval = 300
eval_iters = 20
log_interval = 10

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 4
block_size = 256

n_layer = 4
n_head = 4
n_embd = 128

optimizer = 'muon'
muon_per_head = True
weight_init = 'mimetic'
beta1 = 0.0
learning_rate = 3.5e-3
min_lr = 3.5e-4
max_iters = 1200
warmup_iters = 60
