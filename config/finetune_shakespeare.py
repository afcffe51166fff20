# fine-tune GPT-2 XL on Shakespeare (BPE); nanoGPT's settings
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'           # the largest GPT-2; gpt2 fits smaller machines
always_save_checkpoint = False  # only when the validation loss improves

# 1 sequence * 32 micro-batches * 1024 tokens = 32,768 tokens a step; the 301,966 tokens are 9 steps an epoch
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5            # constant and small: the weights are good already
decay_lr = False
