# fine-tune the weights of a run with LoRA adapters alone; they go to a folder of their own:
# python train.py config/finetune_lora.py --init_from=out-baseline-test --dataset=my.txt

out_dir = 'out-lora'
init_from = 'gpt2'              # or the folder of a run, or one in Hugging Face's format
eval_interval = 50
eval_iters = 20
log_interval = 10

dataset = 'shakespeare'
gradient_accumulation_steps = 1
batch_size = 4

lora_rank = 8
lora_alpha = 16                 # B A counts twice, as in the paper's code
lora_targets = 'c_q,c_v'        # the paper's choice
lora_init = 'lora'              # 'pissa' and 'milora' begin with a part of the weights

learning_rate = 1e-3            # adapters want 3 to 10 times what all weights would get
min_lr = 1e-4                   # learning_rate / 10
weight_decay = 0.0
max_iters = 200
warmup_iters = 10
