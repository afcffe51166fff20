# a small character model on Shakespeare; nanoGPT's settings (about 3 minutes on an A100)

out_dir = 'out-shakespeare-char'
eval_interval = 250             # often, because the model overfits
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # ckpt.pt keeps the best validation loss, because the model overfits

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'    # prepared by the first run
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3            # small models can use a higher one
max_iters = 5000
lr_decay_iters = 5000           # = max_iters; change both for a shorter run
min_lr = 1e-4
beta2 = 0.99                    # above the usual 0.95, because a step has few tokens
warmup_iters = 100
