# a small character-level model on Shakespeare; nanoGPT's settings (about 3 minutes on an A100)

out_dir = 'out-shakespeare-char'
eval_interval = 250             # often, because it will overfit
eval_iters = 200
log_interval = 10               # not every step
always_save_checkpoint = False  # it overfits: keep the checkpoint of the best validation loss

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256                # context of up to 256 earlier characters

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3            # small models bear a higher one
max_iters = 5000
lr_decay_iters = 5000           # = max_iters
min_lr = 1e-4                   # learning_rate / 10
beta2 = 0.99                    # above the usual 0.95: few tokens a step
warmup_iters = 100
