# fine-tune GPT-2 XL on Shakespeare (BPE tokens); nanoGPT's settings
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'           # the largest GPT-2; 'gpt2' fits smaller machines
always_save_checkpoint = False  # save only when the validation loss improves

# 1 sequence * 32 micro-batches * 1024 tokens = 32,768 tokens per step;
# an epoch of 301,966 tokens is 9 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5            # small and constant, because the weights are already trained
decay_lr = False
